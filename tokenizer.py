"""Text to tokens: GPT-2's byte-level BPE, or a small one trained on given texts, as a tiktoken.Encoding."""

import base64
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch

from lib.cli import UserError, write_text
from lib.records import read_bytes, read_json

END = "<|endoftext|>"
LARGEST = 16 * 2**20               # bytes of a tokenizer file
# how GPT-2 cuts text into the pieces within which tokens form: contractions, words, numbers, signs, spaces
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@dataclass
class TokenizerFile:
    """tokenizer.json: the tokens, in base64, in the order of their ranks."""
    name: str
    pattern: str
    specials: dict[str, int]
    ranks: list[str]


class Tokenizer:
    """Text <-> token ids. `eos_id`, the last, starts and ends a caption; END in a text is ordinary text."""

    def __init__(self, name: str, ranks: dict[bytes, int]):
        whole = {bytes([b]) for b in range(256)} <= ranks.keys() and b"" not in ranks
        if not whole or set(ranks.values()) != set(range(len(ranks))):      # tiktoken would panic
            raise UserError(f"the tables of tokenizer {name!r} are damaged: bytes or ranks are missing; "
                            "copy them again")
        self.name, self.ranks = name, ranks
        self.eos_id, self.vocab_size = len(ranks), len(ranks) + 1
        self.encoding = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks,
                                          special_tokens={END: self.eos_id}, explicit_n_vocab=self.vocab_size)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts):
        return self.encoding.encode_ordinary_batch(texts)

    def decode(self, tokens):
        """Token ids -> text; end tokens are left out, bytes that are no UTF-8 become the replacement sign."""
        return self.encoding.decode([t for t in tokens if t != self.eos_id])

    def save(self, folder):
        """Write `folder`/tokenizer.json, a TokenizerFile."""
        tokens = [base64.b64encode(t).decode() for t in sorted(self.ranks, key=self.ranks.get)]
        content = {"name": self.name, "pattern": PATTERN, "specials": {END: self.eos_id}, "ranks": tokens}
        write_text(Path(folder) / "tokenizer.json", json.dumps(content))

    @classmethod
    def load(cls, folder):
        """Read `folder`/tokenizer.json. Raises UserError if it is missing or damaged."""
        file = Path(folder) / "tokenizer.json"
        try:
            content = read_json(TokenizerFile, file, LARGEST)
        except FileNotFoundError:
            raise UserError(f"{file} is missing; it belongs to every prepared set and checkpoint, and to "
                            "weights/. GPT-2's own is written by python convert_weights.py --gpt2 "
                            "FOLDER-WITH-merges.txt") from None
        if content.pattern != PATTERN or content.specials != {END: len(content.ranks)}:
            raise UserError(f"{file} is damaged (pattern and specials are not GPT-2's); copy it again")
        try:
            ranks = {base64.b64decode(token, validate=True): rank for rank, token in enumerate(content.ranks)}
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); copy it again") from None
        return cls(content.name, ranks)

    @classmethod
    def gpt2(cls, file=None):
        """GPT-2's encoding: from `file` (merges.txt, vocab.bpe, .tiktoken), weights/, or through tiktoken."""
        if file is not None:
            ranks = _read_ranks(Path(file))
            if len(ranks) != 50256:
                raise UserError(f"{file} holds {len(ranks)} tokens, GPT-2 has 50256")
            return cls("gpt2", ranks)
        if Path("weights/tokenizer.json").exists() and (converted := cls.load("weights")).name == "gpt2":
            return converted
        try:
            return cls("gpt2", tiktoken.get_encoding("gpt2")._mergeable_ranks)
        except Exception as error:                        # whatever the network stack below tiktoken raises
            raise UserError(
                f"GPT-2's tokenizer tables could not be downloaded ({type(error).__name__}): convert GPT-2 "
                "from a folder with its merges.txt (python convert_weights.py --gpt2 FOLDER), or set "
                "TIKTOKEN_CACHE_DIR to a filled tiktoken cache") from None

    @classmethod
    def train(cls, texts, vocab_size):
        """A byte-level BPE of at most `vocab_size` tokens, end token included (Sennrich et al. 2016).

        Of equally frequent pairs the first in byte order is merged: the same texts give the same tokens.
        """
        if vocab_size < 257:
            raise UserError(f"vocab_size is {vocab_size}, but 256 bytes and the end token need 257")
        import regex  # comes with tiktoken
        pieces = Counter(piece for text in texts for piece in regex.findall(PATTERN, text))
        words = [[bytes([b]) for b in piece.encode(errors="replace")] for piece in pieces]
        counts = list(pieces.values())
        pairs, where = Counter(), defaultdict(set)        # how often a pair occurs, and in which words
        for index, word in enumerate(words):
            for pair in zip(word, word[1:]):
                pairs[pair] += counts[index]
                where[pair].add(index)
        ranks = {bytes([b]): b for b in range(256)}
        while len(ranks) + 1 < vocab_size and pairs:
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            if pairs[best] < 2:
                break
            ranks.setdefault(best[0] + best[1], len(ranks))
            for index in where.pop(best):
                word, count = words[index], counts[index]
                for pair in zip(word, word[1:]):
                    pairs[pair] -= count
                merged, i = [], 0
                while i < len(word):
                    joined = tuple(word[i : i + 2]) == best
                    merged.append(word[i] + word[i + 1] if joined else word[i])
                    i += 2 if joined else 1
                words[index] = merged
                for pair in zip(merged, merged[1:]):
                    pairs[pair] += count
                    where[pair].add(index)
            del pairs[best]
        return cls("bpe", ranks)


def pack_captions(captions_of: list[list], eos_id: int,
                  multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put the captions of each image, lists of tokens, into one row: tokens, targets, positions, each (B, T).

    A start token precedes each caption. The target is the next token, or -100 if there is none; positions
    restart at 0 with each caption. Padding looks like captions that have only a start token; T is a multiple
    of `multiple`.
    """
    T = max((sum(len(caption) + 1 for caption in captions) for captions in captions_of), default=1)
    T = -(-T // multiple) * multiple
    tokens = np.full((len(captions_of), T), eos_id, dtype=np.int64)
    targets = np.full((len(captions_of), T), -100, dtype=np.int64)
    positions = np.zeros((len(captions_of), T), dtype=np.int64)
    for row, captions in enumerate(captions_of):
        start = 0
        for caption in captions:
            end = start + len(caption)
            tokens[row, start + 1 : end + 1] = targets[row, start:end] = caption
            targets[row, end] = eos_id
            positions[row, start : end + 1] = np.arange(len(caption) + 1)
            start = end + 1
    return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(positions)


def _read_ranks(file):
    """{token bytes: rank} of merges.txt, vocab.bpe (a merge a line) or .tiktoken (base64 token and rank)."""
    try:
        lines = read_bytes(file, LARGEST).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer file {file}: {error}") from None
    try:
        if file.suffix == ".tiktoken":
            pairs = (line.split() for line in lines if line)
            return {base64.b64decode(token): int(rank) for token, rank in pairs}
        # GPT-2 writes a byte as a printable sign: itself, or for the 68 that are none chr(256), chr(257) ...
        printable = [b for b in range(256) if chr(b).isprintable() and b != 0x20]
        order = printable + [b for b in range(256) if b not in printable]
        byte_of = {chr(b): b for b in printable}
        byte_of |= {chr(256 + i): b for i, b in enumerate(order[len(printable) :])}
        ranks = {bytes([b]): rank for rank, b in enumerate(order)}
        for line in lines[lines[0].startswith("#version") :]:    # only line 0: some merges begin with #
            if line.strip():
                first, second = line.split()
                ranks[bytes(byte_of[c] for c in first + second)] = len(ranks)
        return ranks
    except (ValueError, KeyError):
        raise UserError(f"{file} is not a merges.txt, vocab.bpe or .tiktoken file of GPT-2") from None
