"""Greedy decoding, sampling and beam search over a step function and its cache.

`step(tokens, last=1)` takes the newest tokens (R, T), adds them to the cache and returns the logits
(R, last, V) of what follows each of the last ones. `cache.select(rows)` makes new row i continue old row
rows[i]; lowering `cache.length` drops the last tokens; `cache.kv.dtype` is the model's. Row b * G + g is
the g-th continuation of prompt b.

Letters: B prompts, G rows (beams) per prompt, R rows, T text positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.cli import UserError, check_ranges, flag
from lib.drafts import greedy_with_drafts


@dataclass
class DecodingConfig:
    num_beams: int = flag(1, "number of beams; 1 is greedy decoding or sampling", min=1, max=1000)
    length_penalty: float = flag(1.0, "a beam's score is its log-probability / length**length_penalty",
                                 min=-10, max=10)
    temperature: float | None = flag(None, "sample, with logits divided by this; 0 is greedy", min=0, max=100)
    top_k: int | None = flag(None, "sample from the k most likely tokens", min=1)
    top_p: float | None = flag(None, "sample from the most likely tokens that make up this probability",
                               min=1e-9, max=1)
    repetition_penalty: float = flag(1.0, "above 1, tokens already in the text become less likely",
                                     min=0.01, max=100)
    no_repeat_ngram: int = flag(0, "no sequence of this many tokens occurs twice; 0 is off", min=0)
    num_return_sequences: int = flag(1, "captions per image, the best beams or samples", min=1, max=1000)
    prompt: str = flag("", "text that the caption starts with")
    min_length: int = flag(0, "minimum number of new tokens before the end token", min=0)
    max_length: int = flag(50, "maximum number of new tokens, the end token included", min=1)
    drafts: bool = flag(True, "for greedy captions of one picture at a time: check several likely tokens in "
                              "each step (speculative decoding), which is faster")

    def __post_init__(self):
        check_ranges(self)
        self.prompt = self.prompt.rstrip()                       # GPT-2's tokens begin with the space
        if self.temperature and self.temperature < 1e-6:
            raise UserError(f"temperature is {self.temperature}, but must be 0 (greedy) or at least 1e-6")
        if self.min_length > self.max_length:
            raise UserError(f"min_length {self.min_length} is more than max_length {self.max_length}")
        if self.samples and self.num_beams > 1:
            raise UserError("beam search cannot be combined with sampling: give num_beams, or temperature, "
                            "top_k and top_p")
        if not self.samples and self.num_return_sequences > self.num_beams:
            raise UserError(f"num_return_sequences {self.num_return_sequences} needs as many num_beams "
                            f"({self.num_beams} given), or sampling (temperature, top_k, top_p)")

    @property
    def samples(self):
        given = [v for v in (self.temperature, self.top_k, self.top_p) if v is not None]
        return bool(given) and self.temperature != 0 and self.top_k != 1


def decode(step: Callable, cache, start: Tensor, config: DecodingConfig, eos_id: int,
           generator: torch.Generator | None = None,
           drafts: dict[int, int] | None = None) -> tuple[list[list[int]], list[float]]:
    """Continue each row of `start` (B, T0), whose first token is the start token.

    Returns B * num_return_sequences lists of new tokens without the end token, prompt after prompt, and
    their scores, log-probability / length**length_penalty, of the new tokens and the end token. `drafts`
    are those of lib/drafts.py.
    """
    settings = config.num_beams, config.repetition_penalty, config.no_repeat_ngram, config.min_length
    plain_greedy = settings == (1, 1, 0, 0) and not config.samples   # each token is the model's first choice
    if drafts and config.drafts and plain_greedy and len(start) == 1:
        return greedy_with_drafts(step, cache, start, config, eos_id, drafts)
    search = beam_search if config.num_beams > 1 else greedy_or_sample
    return search(step, cache, start, config, eos_id, generator)


def greedy_or_sample(step, cache, start, config, eos_id, generator):
    """One token a step for each row: the likeliest, or a sample of `num_return_sequences` rows a prompt."""
    logits = step(start)[:, -1]
    widen = torch.arange(len(start), device=start.device).repeat_interleave(config.num_return_sequences)
    if len(widen) > len(start):
        cache.select(widen)
        logits = logits[widen]
    text = start[widen]                                                      # (R, T)
    done = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    total = torch.zeros(len(text), device=text.device)
    length = torch.zeros(len(text), dtype=torch.long, device=text.device)
    for new in range(1, config.max_length + 1):
        logits = process_logits(logits.float(), text, config, eos_id, new)
        token = sample(logits, config, generator) if config.samples else logits.argmax(-1)
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        total += logprob.masked_fill(done, 0)
        length += ~done
        text = torch.cat([text, token[:, None]], dim=1)             # finished rows run on, and are cut
        done |= token == eos_id
        if new == config.max_length or done.all():
            break
        logits = step(token[:, None])[:, -1]
    return cut(text[:, start.shape[1] :], eos_id), (total / length**config.length_penalty).tolist()


def beam_search(step, cache, start, config, eos_id, generator=None):
    """Keeps the G likeliest unfinished texts of each prompt; every one of them may end at every step.

    Stops when no unfinished text can still beat the G best finished ones, or cuts them at max_length.
    """
    B, G, L, device = len(start), config.num_beams, config.max_length, start.device
    logits = step(start)[:, -1]                                              # (B, V)
    rows = torch.arange(B, device=device).repeat_interleave(G)
    cache.select(rows)
    logits, prompt = logits[rows], start[rows]
    live = torch.full((B, G), -torch.inf, device=device)                     # log-probabilities of the beams
    live[:, 0] = 0                                                     # all beams start identical: one counts
    text = torch.full((B * G, L), eos_id, device=device)                        # new tokens, then end tokens
    best = torch.full((B, G), -torch.inf, device=device)                     # scores of the finished texts
    best_text = text.view(B, G, L).clone()

    def finish(logprob, length):
        nonlocal best, best_text
        scores = torch.cat([best, logprob / length**config.length_penalty], dim=1)
        best, keep = scores.topk(G)
        texts = torch.cat([best_text, text.view(B, G, L)], dim=1)
        best_text = texts.gather(1, keep[:, :, None].expand(-1, -1, L))

    for new in range(1, L + 1):
        so_far = torch.cat([prompt, text[:, : new - 1]], dim=1)
        logits = process_logits(logits.float(), so_far, config, eos_id, new)
        total = live.view(-1, 1) - logits.logsumexp(-1, keepdim=True)        # + logit: log-probability
        finish((total + logits[:, eos_id : eos_id + 1]).view(B, G), new)
        logits[:, eos_id] = -torch.inf
        likeliest, token = logits.topk(min(G, logits.shape[-1]))             # (R, K)
        K = token.shape[1]
        live, choice = (likeliest + total).view(B, G * K).topk(G)
        rows = (torch.arange(B, device=device)[:, None] * G + choice // K).flatten()
        token = token.view(B, G * K).gather(1, choice).view(-1)
        text = text[rows]
        text[:, new - 1] = token
        if new == L:
            finish(live, new)
        # upper bound of a live text's score: every further token has probability 1
        hope = live[:, 0] / (L if config.length_penalty > 0 else new + 1) ** config.length_penalty
        if new == L or (best[:, -1] >= hope).all():
            break
        cache.select(rows)
        logits = step(token[:, None])[:, -1]
    n = config.num_return_sequences
    return cut(best_text[:, :n].flatten(0, 1), eos_id), best[:, :n].flatten().tolist()


def cut(texts: Tensor, eos_id: int) -> list[list[int]]:
    """(R, T) -> lists of tokens, each up to its first end token."""
    return [row[: row.index(eos_id)] if eos_id in row else row for row in texts.tolist()]


def process_logits(logits: Tensor, text: Tensor, config: DecodingConfig, eos_id: int, new: int) -> Tensor:
    """Penalties and bans, in place, on logits (R, V) of the `new`-th token after `text` (R, T).

    Repetition penalty of Keskar et al. 2019 (CTRL). The end token, which is the start token too, is spared.
    """
    eos_logit = logits[:, eos_id].clone()
    if config.repetition_penalty != 1:
        held = logits.gather(1, text)
        p = config.repetition_penalty
        logits.scatter_(1, text, torch.where(held > 0, held / p, held * p))
    n = config.no_repeat_ngram
    if n and text.shape[1] >= n:
        grams = text.unfold(1, n, 1)                                         # (R, M, n): all n-grams so far
        tail = text[:, text.shape[1] - n + 1 :]                              # (R, n - 1): the next ends it
        seen = (grams[:, :, :-1] == tail[:, None]).all(-1)                   # (R, M)
        ban = torch.where(seen, -torch.inf, torch.inf)
        logits.scatter_reduce_(1, grams[:, :, -1], ban, "amin")
    logits[:, eos_id] = eos_logit if new > config.min_length else -torch.inf
    return logits


def sample(logits: Tensor, config: DecodingConfig, generator: torch.Generator | None) -> Tensor:
    """Draw one token a row from logits (R, V) after temperature, top-k and top-p (Holtzman et al. 2019)."""
    logits = logits / (config.temperature or 1.0)
    if config.top_k is not None:
        kth = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if config.top_p is not None:
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability                        # the one crossing top_p stays
        ordered[before >= config.top_p] = -torch.inf
        logits = logits.scatter(1, index, ordered)
    probability = logits.softmax(-1)
    return torch.multinomial(probability.to(generator.device if generator else logits.device), 1,
                             generator=generator)[:, 0].to(logits.device)
