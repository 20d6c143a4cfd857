"""Drafts of a caption: the likeliest next token after the last few, counted in the training captions.

Greedy decoding checks them (decoding.py): they cost or save time and never change a caption.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from lib.checkpoint import read_tensors, write_tensors
from lib.cli import UserError

FILE = "drafts.safetensors"
CONTEXT = 5                            # tokens at most that a guess follows from
LARGEST = 2**22                        # entries
PRIME = 2**31 - 1


def extend(key, token):
    """The key of a context that goes back one token further; numbers or arrays. A rare collision is harmless."""
    return (key * 1_000_003 + token + 1) % PRIME


def count_drafts(captions: Iterable[np.ndarray], eos_id: int) -> dict[int, int]:
    """Captions, token ids each -> {key of the last 1 to CONTEXT tokens: the token that followed most often}.

    Contexts that occur once, or that say what a shorter one says, are left out.
    """
    text = np.concatenate([part for caption in captions for part in ([eos_id], caption)] + [[eos_id]])
    V, number = eos_id + 1, (text == eos_id).cumsum()                # of the caption
    table, key, guess = {}, np.zeros(len(text), np.int64), np.full(len(text), -1)
    for n in range(1, CONTEXT + 1):                  # place i: the context text[i : i + n], then text[i + n]
        key, guess = extend(key[1:], text[:-n]), guess[1:]
        pairs, count = np.unique(key * V + text[n:], return_counts=True)
        pairs = pairs[count > 1][np.argsort(count[count > 1], kind="stable")]
        best = dict(zip((pairs // V).tolist(), (pairs % V).tolist()))     # the last, most frequent, stays
        found = np.array([best.get(k, -1) for k in key.tolist()])
        told = (found >= 0) & (found != guess) & (number[:-n] == number[n - 1 : -1])
        table |= dict(zip(key[told].tolist(), found[told].tolist()))
        guess = np.where(told, found, guess)
    return table


def guess_next(table: dict[int, int], text: list[int], most: int, eos_id: int) -> list[int]:
    """What may follow `text`: at most so many tokens, each after the longest context that the table knows."""
    guess = []
    while len(guess) < most:
        key, token = 0, eos_id
        for last in reversed((text + guess)[-CONTEXT:]):
            key = extend(key, last)
            token = table.get(key, token)
        if token == eos_id:                                          # nothing follows the end
            break
        guess.append(token)
    return guess


def write_drafts(folder: Path, table: dict[int, int] | None) -> None:
    """Write the table into a checkpoint folder; with None there shall be none."""
    if table is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        content = {"contexts": list(table), "tokens": list(table.values())}
        write_tensors(folder / FILE, {name: torch.tensor(c, dtype=torch.int32) for name, c in content.items()})


def read_drafts(folder: Path, vocab_size: int) -> dict[int, int] | None:
    """The table in a checkpoint folder, if any. Raises UserError unless it is of such a vocabulary."""
    if not (folder / FILE).exists():
        return None
    tensors = read_tensors(folder / FILE)
    contexts, tokens = (tensors.get(name, torch.empty(0)) for name in ("contexts", "tokens"))
    if not (len(tensors) == 2 and contexts.dtype == tokens.dtype == torch.int32 and len(tokens) <= LARGEST
            and contexts.shape == tokens.shape == (len(tokens),) and 0 <= tokens.min() and
            tokens.max() < vocab_size):
        raise UserError(f"{folder / FILE} is not of this model: delete it, captions will only take longer")
    return dict(zip(contexts.tolist(), tokens.tolist()))
