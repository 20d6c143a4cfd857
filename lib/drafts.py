"""Drafts: guesses of the next tokens, counted in the training captions, that make greedy decoding faster."""

from pathlib import Path

import numpy as np
import torch

from lib.checkpoint import read_tensors, write_tensors
from lib.cli import UserError

FILE = "drafts.safetensors"
CONTEXT = 5                            # tokens at most that a guess follows from
DRAFTS = 4                             # tokens guessed and checked in one step
NEAR_TIE = 4                           # logits may swap if closer than this times the dtype's epsilon
PRIME, LARGEST = 2**31 - 1, 2**22      # keys are below PRIME; entries of a table at most


def extend(key, token):
    """The key of a context that goes back one token further; that two contexts share one is rare."""
    return (key * 1_000_003 + token + 1) % PRIME


def count_drafts(captions_of: list[list], eos_id: int) -> dict[int, int]:
    """The tokens of each image's captions -> {key of a context: the token that follows it most often}.

    Without contexts that occur once, or say what a shorter one says.
    """
    captions = [caption for captions in captions_of for caption in captions]
    text = np.concatenate([part for caption in captions for part in ([eos_id], caption)] + [[eos_id]])
    table, key, guess, V = {}, np.zeros(len(text), np.int64), np.full(len(text), -1), eos_id + 1
    for n in range(1, CONTEXT + 1):                  # place i: the context text[i : i + n], then text[i + n]
        key, guess = extend(key[1:], text[:-n]), guess[1:]
        pairs, count = np.unique(key * V + text[n:], return_counts=True)
        pairs = pairs[count > 1][np.argsort(count[count > 1], kind="stable")]
        best = dict(zip((pairs // V).tolist(), (pairs % V).tolist()))     # the last, most frequent, stays
        found = np.array([best.get(k, -1) for k in key.tolist()])
        new = (found >= 0) & (found != guess)
        table |= dict(zip(key[new].tolist(), found[new].tolist()))
        guess = np.where(new, found, guess)
    return table


def guess_next(table: dict[int, int], text: list[int], count: int, eos_id: int) -> list[int]:
    """The `count` tokens that may follow `text`: each what the longest context known says, or the end."""
    guess = []
    for _ in range(count):
        key, token = 0, eos_id
        for last in reversed((text + guess)[-CONTEXT:]):
            key = extend(key, last)
            token = table.get(key, token)
        guess.append(token)
    return guess


def greedy_with_drafts(step, cache, start, config, eos_id, drafts):
    """Continue `start` (1, T0) greedily; each step also checks a few guesses and keeps those that were right.

    They cost little: most of a step is reading the weights (Leviathan et al. 2023, arXiv:2211.17192). A step
    over several tokens rounds differently from a step over one, so where the two best tokens nearly tie, a
    step over one decides. Takes and returns what `decoding.decode` does; `drafts` is `count_drafts`' table.
    """
    text, total, first, alone = start[0].tolist(), 0.0, start.shape[1], False
    end, near_tie = first + config.max_length, NEAR_TIE * torch.finfo(cache.kv.dtype).eps
    while len(text) == first or text[-1] != eos_id and len(text) < end:
        guess = [] if alone else guess_next(drafts, text, min(DRAFTS, end - len(text) - 1), eos_id)
        fresh = torch.tensor([text[cache.length :] + guess], device=start.device)    # always as many: quicker
        logits = step(fresh, len(guess) + 1)[0].float()                      # (1 + guesses, V)
        best = logits.topk(2).values                                         # (1 + guesses, 2)
        sure = (best[:, 0] - best[:, 1] > near_tie) | alone
        chosen, sure = torch.stack([logits.argmax(-1), sure.long()]).tolist()
        agree = [token == other != eos_id for token, other in zip(guess, chosen)]
        right = [*agree, False].index(False)
        taken = min(right + 1, [*sure, False].index(False))  # the right guesses, and what follows the last
        alone = taken <= right                               # a near tie comes next
        text += chosen[:taken]
        total += (best[:, 0] - logits.logsumexp(-1))[:taken].sum()
        cache.length = len(text) - 1
    new = text[first:]
    return [new[:-1] if new[-1] == eos_id else new], [float(total) / len(new) ** config.length_penalty]


def write_drafts(folder: Path, table: dict[int, int] | None) -> None:
    """Write the table into a checkpoint folder; with None there shall be none."""
    if table is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        rows = torch.tensor([list(table), list(table.values())], dtype=torch.int32)
        write_tensors(folder / FILE, {"drafts": rows})


def read_drafts(folder: Path, vocab_size: int) -> dict[int, int] | None:
    """The table in a checkpoint folder, if any. Raises UserError unless it is of such a vocabulary."""
    if not (folder / FILE).exists():
        return None
    rows = read_tensors(folder / FILE).get("drafts", torch.empty(0))
    if rows.dtype != torch.int32 or rows.shape != (2, min(rows.shape[-1], LARGEST)) or not (
            (rows >= 0) & (rows < torch.tensor([[PRIME], [vocab_size]]))).all():
        raise UserError(f"{folder / FILE} is of another model: delete it, captions will only take longer")
    return dict(zip(*rows.tolist()))
