"""Decoding against plain decoders without a cache, written here by the definition, and against all texts."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from test_model import tiny_model

from decoding import DecodingConfig, sample
from lib.cli import UserError

INF = float("inf")


def lively_model(vocab_size=10, seed=0):
    """A random model whose text depends much on place and image, and ends after few words or many."""
    model = tiny_model(vocab_size, seed=seed)
    torch.nn.init.normal_(model.gpt2.wpe.weight, std=4)
    torch.nn.init.normal_(model.gpt2.wte.weight, std=0.6)
    torch.nn.init.ones_(model.gpt2.ln_f.weight)
    torch.nn.init.zeros_(model.gpt2.ln_f.bias)
    for cross in model.xattn.values():
        torch.nn.init.normal_(cross.out.weight)
    return model, torch.randn(5, 3, 16) * 2                          # and visual tokens of five images


def next_logits(model, visual, text, config, end, new):
    """Logits of the `new`-th new token after the whole `text`, penalties and bans applied one by one."""
    plain = model(torch.tensor([text]), visual)[0][0, -1].tolist()
    written, n = text[1:], config.no_repeat_ngram
    grams = [tuple(written[i : i + n]) for i in range(len(written) - n + 1)] if n else []
    logits = list(plain)
    for token in set(range(len(logits))) - {end}:
        if token in written:
            p = config.repetition_penalty
            logits[token] = plain[token] / p if plain[token] > 0 else plain[token] * p
        if n and tuple((written + [token])[-n:]) in grams:
            logits[token] = -INF
    if new <= config.min_length:
        logits[end] = -INF
    return torch.tensor(logits, dtype=torch.float64)


def greedy(model, visual, prompt, config):
    end, text, total = model.eos_id, [model.eos_id, *prompt], 0.0
    for new in range(1, config.max_length + 1):
        logprobs = next_logits(model, visual, text, config, end, new).log_softmax(-1)
        total += logprobs.max().item()
        token = logprobs.argmax().item()
        if token == end:
            break
        text.append(token)
    return [text[1 + len(prompt) :]], [total / new**config.length_penalty]


def beams(model, visual, prompt, config):
    """The likeliest unfinished texts go on, each may end at every step; all are followed to max_length."""
    end, live, finished = model.eos_id, [(0.0, [])], []
    for new in range(1, config.max_length + 1):
        longer = []
        for total, row in live:
            logits = next_logits(model, visual, [end, *prompt, *row], config, end, new)
            logprobs = logits.log_softmax(-1).tolist()
            finished.append(((total + logprobs[end]) / new**config.length_penalty, row))
            longer += [(total + p, row + [token]) for token, p in enumerate(logprobs) if token != end]
        live = sorted(longer, reverse=True)[: config.num_beams]
    finished += [(total / config.max_length**config.length_penalty, row) for total, row in live]
    best = sorted(finished, reverse=True)[: config.num_return_sequences]
    return [row for _, row in best], [score for score, _ in best]


@torch.no_grad()
def decode(model, visual, prompt=(), **config):
    return model.generate_tokens(DecodingConfig(**config), prompt, visual=visual)


CONFIGS = [
    dict(max_length=12), dict(max_length=12, min_length=4), dict(max_length=12, repetition_penalty=1.5),
    dict(max_length=12, repetition_penalty=0.7, no_repeat_ngram=2), dict(max_length=12, no_repeat_ngram=1),
    dict(max_length=12, no_repeat_ngram=3, min_length=12), dict(max_length=1),
    dict(max_length=5, length_penalty=0.0)]
BEAMS = [
    dict(num_beams=3), dict(num_beams=3, num_return_sequences=3), dict(num_beams=2, length_penalty=0.0),
    dict(num_beams=5, length_penalty=-1.0, num_return_sequences=2),
    dict(num_beams=4, length_penalty=2.0, min_length=3)]


def test_a_space_at_the_end_of_a_prompt_is_left_to_the_next_token():
    assert DecodingConfig(prompt="two men ").prompt == "two men"


@torch.no_grad()
@pytest.mark.parametrize("prompt", [(), (7, 3, 7)])
@pytest.mark.parametrize("config", CONFIGS + [{**a, **b} for a, b in zip(CONFIGS * 2, BEAMS * 2)], ids=str)
def test_decoding_equals_a_plain_decoder_without_a_cache(config, prompt):
    """In a batch whose rows end at different lengths; and a batch gives what its rows give alone."""
    model, visual = lively_model()
    tokens, scores = decode(model, visual, prompt, **config)
    plain = beams if config.get("num_beams", 1) > 1 else greedy
    n = config.get("num_return_sequences", 1)
    for i in range(5):
        expected, expected_scores = plain(model, visual[i : i + 1], prompt, DecodingConfig(**config))
        rows = slice(i * n, (i + 1) * n)
        assert tokens[rows] == expected
        assert scores[rows] == pytest.approx(expected_scores, abs=1e-4)
        alone, alone_scores = decode(model, visual[i : i + 1], prompt, **config)
        assert alone == expected and alone_scores == pytest.approx(expected_scores, abs=1e-4)
    if config == dict(max_length=12):
        assert len({len(row) for row in tokens}) > 2 and max(map(len, tokens)) == 12   # some are cut


@torch.no_grad()
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 0.5, 2.0, -1.0])
@pytest.mark.parametrize("max_length", [1, 3, 4])
def test_beam_search_with_room_for_all_texts_finds_the_best(length_penalty, max_length):
    (model, visual), end = lively_model(vocab_size=4, seed=4), 3
    texts = [row for n in range(max_length + 1) for row in itertools.product(range(3), repeat=n)]
    tokens, scores = decode(model, visual[:2], (1,), num_beams=len(texts), num_return_sequences=len(texts),
                            max_length=max_length,
                            length_penalty=length_penalty)
    for i in range(2):
        brute = []
        for row in texts:
            target = [*row, end][:max_length]                                # the longest are cut, not ended
            logits, _ = model(torch.tensor([[end, 1, *target[:-1]]]), visual[i : i + 1])
            total = logits[0, 1:].log_softmax(-1)[range(len(target)), target].sum().item()
            brute.append((total / len(target)**length_penalty, row))
        brute.sort(reverse=True)
        found = slice(i * len(texts), (i + 1) * len(texts))
        assert scores[found] == pytest.approx([score for score, _ in brute], abs=1e-4)
        assert [tuple(row) for row in tokens[found]] == [row for _, row in brute]


# --------------------------------------------------------------------------------------------------
# penalties and sampling


def table_model(*rows):
    """A step function whose logits depend on the newest token alone. The last id is the end."""
    table = torch.tensor(rows)
    return lambda tokens: table[tokens[:, -1:]]


def from_table(rows, start, **config):
    from decoding import decode
    config = DecodingConfig(**config)
    cache = SimpleNamespace(select=lambda rows: None)                        # there is nothing to keep
    return decode(table_model(*rows), cache, torch.tensor([start]), config, len(rows) - 1)[0][0]


def test_beam_search_waits_for_an_unlikely_text_that_its_length_makes_the_best():
    """Two texts end soon and well; a third, at 1 %, cannot beat them one token later, but at max_length."""
    rows = torch.tensor([[0.0005, 0.0005, 0.999], [1e-9, 1 - 1e-6, 1e-6], [0.25, 0.01, 0.74]]).log().tolist()
    assert from_table(rows, [2], max_length=8, num_beams=2, length_penalty=2.0) == [1] * 8
    assert from_table(rows, [2], max_length=8, num_beams=2, length_penalty=1.0) == []
    assert from_table(rows, [2], max_length=8, num_beams=2, length_penalty=-1.0) == []


def test_penalties_spare_the_start_and_the_end_token():
    """Both are one id: a caption may end although it began with that token."""
    rows = [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.5]]               # 2 -> 0 -> 2
    for penalty in (dict(repetition_penalty=100.0), dict(no_repeat_ngram=1), dict(repetition_penalty=0.01)):
        assert from_table(rows, [2], max_length=5, **penalty) == [0]
    assert from_table(rows, [2], max_length=5, min_length=1) == [0]          # the end follows
    assert from_table(rows, [2], max_length=5, min_length=3) == [0, 1, 0]
    assert from_table(rows, [2], max_length=2, min_length=2) == [0, 1]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    rows = [[1.0, 0.6, -9.0], [-1.0, -1.5, -9.0], [1.0, 0.0, -9.0]]
    assert from_table(rows, [2], max_length=2) == [0, 0]
    assert from_table(rows, [2], max_length=2, repetition_penalty=1.5) == [0, 0]           # 1 / 1.5 > 0.6
    assert from_table(rows, [2], max_length=2, repetition_penalty=1.8) == [0, 1]
    assert from_table(rows, [2, 0, 1], max_length=1, repetition_penalty=1.8) == [0]    # both were written
    assert from_table(rows, [2, 1], max_length=1, repetition_penalty=1.8) == [0]           # the prompt counts


def test_no_ngram_occurs_twice():
    rows = [[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 0.0, -9.0]]
    assert from_table(rows, [2], max_length=6) == [0] * 6
    assert from_table(rows, [2], max_length=6, no_repeat_ngram=1) == [0, 1]            # only the end is left
    assert from_table(rows, [2], max_length=9, no_repeat_ngram=2) == [0, 0, 1, 0]      # 00 01 10 once each
    assert from_table(rows, [2, 0, 0], max_length=2, no_repeat_ngram=2)[0] == 1            # the prompt counts


def frequencies(logits, **config):
    logits = torch.tensor(logits).expand(40_000, -1)
    tokens = sample(logits, DecodingConfig(**config), torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=logits.shape[1]) / len(logits)


PROBABILITIES = [0.1, 0.4, 0.05, 0.25, 0.2]


@pytest.mark.parametrize("config, expected", [
    (dict(temperature=1.0), PROBABILITIES),
    (dict(temperature=0.5), [p**2 / 0.275 for p in PROBABILITIES]),
    (dict(temperature=1e-4), [0, 1, 0, 0, 0]),
    (dict(top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    (dict(top_k=99), PROBABILITIES),
    (dict(top_p=0.3), [0, 1, 0, 0, 0]),
    (dict(top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),           # the one that crosses 0.6 is kept
    (dict(top_p=1.0), PROBABILITIES),
    (dict(top_k=3, top_p=0.7), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # of the three left, 0.47 + 0.29 crosses
    (dict(temperature=2.0, top_p=0.25), [0, 1, 0, 0, 0])], ids=str)
def test_sampling_draws_from_the_right_distribution(config, expected):
    found = frequencies([math.log(p) for p in PROBABILITIES], **config)
    assert ((found > 0) == (torch.tensor(expected) > 0)).all()
    assert (found - torch.tensor(expected)).abs().max() < 0.012


def test_sampling_repeats_with_the_seed_of_its_generator():
    model, visual = lively_model()
    config = DecodingConfig(temperature=1.0, max_length=8, num_return_sequences=3)
    rows = [model.generate_tokens(config, visual=visual, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)]
    assert len(rows[0][0]) == 15 and rows[0] == rows[1] and rows[0][0] != rows[2][0]
    for tokens in rows[0][0]:
        assert model.eos_id not in tokens and len(tokens) <= 8
    torch.manual_seed(5)
    one = model.generate_tokens(config, visual=visual)[0]
    torch.manual_seed(5)
    assert model.generate_tokens(config, visual=visual)[0] == one    # without a generator torch's seed rules


def test_return_sequences_come_image_after_image():
    model, visual = lively_model()
    single = decode(model, visual, max_length=8)[0]
    cold = decode(model, visual, max_length=8, temperature=1e-5, num_return_sequences=2)[0]
    assert cold == [row for row in single for _ in range(2)] and len(set(map(tuple, single))) > 1
    for greedy_too in (dict(temperature=0), dict(temperature=0, top_k=5), dict(top_k=1), dict(num_beams=1)):
        assert decode(model, visual, max_length=8, **greedy_too)[0] == single


@pytest.mark.parametrize("wrong, message", [
    (dict(num_beams=0), "num_beams is 0, but must be from 1 to 1000"), (dict(top_p=1.5), "top_p is 1.5"),
    (dict(top_p=0.0), "top_p is 0.0, but must be from 1e-09 to 1"),
    (dict(temperature=-1.0), "temperature is -1.0"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(temperature=1e-300), "0 .greedy. or at least"),
    (dict(top_k=0), "top_k is 0"),
    (dict(repetition_penalty=0.0), "repetition_penalty is 0.0"), (dict(max_length=0), "max_length is 0"),
    (dict(min_length=9, max_length=8), "min_length 9 is more than max_length 8"),
    (dict(num_beams=3, temperature=1.0), "beam search cannot be combined"),
    (dict(num_return_sequences=2), "needs as many num_beams"),
    (dict(num_return_sequences=3, num_beams=2), "needs as many num_beams")], ids=str)
def test_decoding_config_says_what_is_wrong(wrong, message):
    with pytest.raises(UserError, match=message):
        DecodingConfig(**wrong)
