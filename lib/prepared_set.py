"""A prepared set on disk: captions as texts and tokens, pictures as raw bytes. data.py reads it."""

import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lib import cli, records
from lib.cli import UserError

FORMAT_VERSION = 1
SET_FILES = ("images.bin", "tokens.bin", "index.npz", "captions.json", "tokenizer.json", "scenes.jsonl",
             "meta.json")


def clean_caption(text):
    """A caption as people write it: corpora put spaces before punctuation and clitics and after brackets."""
    text = re.sub(r" +(?=[.,!?;:)]+( |$))", "", " ".join(text.split()))
    return re.sub(r" +(?=(n't|'(s|re|ve|ll|d|m))\b)", "", text).replace("( ", "(")


@dataclass
class Splits:
    train: list[int]
    val: list[int]
    test: list[int]


@dataclass
class Preprocessing:
    image_size: int = field(metadata=dict(min=1, max=4096))
    clean_captions: bool


@dataclass
class SetMeta:
    """meta.json; `counts` is what the summary said, `source` comes from former versions."""
    format_version: int = field(metadata=dict(min=1))
    images: list[str]
    image_ids: list[int] | list[str]
    splits: Splits
    preprocessing: Preprocessing
    source: str | None = field(default=None, metadata=dict(optional=True))
    counts: dict[str, int] = field(default_factory=dict, metadata=dict(optional=True))


def read_meta(folder: str) -> SetMeta:
    """meta.json of a prepared set. Raises UserError, or FileNotFoundError where there is none."""
    file = os.path.join(folder, "meta.json")
    try:
        content = records.read_json(dict, file)
        newer = isinstance(version := content.get("format_version"), int) and version > FORMAT_VERSION
        if not newer:
            return records.convert(SetMeta, content, file)
    except UserError as error:
        raise damaged(folder, str(error)) from None
    raise UserError(f"{folder} is of a newer format than this code knows: update the code")


@contextlib.contextmanager
def set_folder(out: str) -> Iterator[None]:
    """Make `out` the folder of the set that is written within it. Raises what `cli.claim_folder` does."""
    ours, unfinished = None, os.path.join(out, ".unfinished")
    with contextlib.suppress(UserError, OSError):
        ours = read_meta(out)
    of = "a prepared set, or only to a damaged one"
    claimed = False
    try:
        with cli.claim_folder(out, SET_FILES, ".unfinished", of, ours is not None):
            claimed = True
            yield
    finally:                                                     # else the mark says that the rest is ours
        held = [name for name in SET_FILES if os.path.lexists(os.path.join(out, name))]
        if claimed and (not held or "meta.json" in held):        # closed by now: Windows removes no open file
            os.remove(unfinished)


def write_images(out, pictures):
    """Begin a set: stream uint8 (S, S, 3) arrays to images.bin, and return their number.

    A former set stays until the last picture has come. Raises UserError when no picture comes.
    """
    os.makedirs(out, exist_ok=True)
    count = 0
    with cli.atomic(os.path.join(out, "images.bin")) as path:
        with open(path, "wb") as file:
            for picture in pictures:
                file.write(np.ascontiguousarray(picture))
                count += 1
        if not count:
            raise UserError("none of the pictures could be read, so there is nothing to prepare")
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out, "meta.json"))
    return count


def write_set(out, names, captions, splits, tokenizer, preprocessing, image_ids=None, counts=None,
              clean=True):
    """Complete the set begun by `write_images`: captions, tokens, splits, and last of all meta.json.

    names: one per picture; captions: (picture index, source text) pairs, no text blank; splits: {"train",
    "val", "test": picture indices}; preprocessing: at least image_size; clean: the tokens are those of
    `clean_caption(text)`; counts: what the summary said.
    """
    texts = [text for _, text in captions]
    tokens, offset = encode_captions(tokenizer, [clean_caption(text) if clean else text for text in texts])
    with cli.atomic(os.path.join(out, "tokens.bin")) as path:
        tokens.tofile(path)
    with cli.atomic(os.path.join(out, "index.npz")) as path, open(path, "wb") as file:   # savez adds .npz
        np.savez(file, offset=offset, image=np.array([image for image, _ in captions], np.int32))
    tokenizer.save(out)
    meta = {"format_version": FORMAT_VERSION, "images": names,
            "image_ids": list(range(len(names))) if image_ids is None else image_ids,
            "splits": {name: [int(i) for i in splits[name]] for name in ("train", "val", "test")},
            "preprocessing": {**preprocessing, "clean_captions": clean},
            "counts": {**(counts or {}), "images": len(names), "captions": len(texts)}}
    for name, content in (("captions.json", texts), ("meta.json", meta)):
        # with ASCII escapes, as a lone surrogate in a text or name must survive
        cli.write_text(os.path.join(out, name), json.dumps(content, indent=0))


def encode_captions(tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts -> all their tokens end to end, uint16, and where each begins and the last ends, int64."""
    tokens = tokenizer.encode_batch(texts)
    packed = np.concatenate([np.array(ids, np.uint16) for ids in tokens] or [np.empty(0, np.uint16)])
    return packed, np.cumsum([0] + [len(ids) for ids in tokens], dtype=np.int64)


def damaged(folder: str, what: str) -> UserError:
    return UserError(f"{folder} is damaged ({what}): move it away, and prepare it again")


def read_array(folder: str, name: str, dtype: type, count: int) -> np.ndarray:
    """A file of exactly `count` numbers, memory-mapped. Raises UserError if it is another."""
    file, size = os.path.join(folder, name), count * np.dtype(dtype).itemsize
    held = os.path.getsize(file) if os.path.isfile(file) else 0
    if held != size or not size:
        raise damaged(folder, f"{name} has {held:,} bytes where {size:,} belong")
    return np.memmap(file, dtype, "r")


def read_index(folder: str, captions: int) -> tuple[np.ndarray, np.ndarray]:
    """index.npz: where each caption's tokens begin and the last one's end, and the image of each."""
    try:
        file = io.BytesIO(records.read_bytes(os.path.join(folder, "index.npz"), 16 * captions + 4096))
        if any(member.compress_type for member in zipfile.ZipFile(file).infolist()):
            raise ValueError("compressed")                           # which could be of any size
        with np.load(file) as index:
            offset, image = index["offset"], index["image"]
    except Exception as error:                                       # numpy and zipfile raise many kinds
        raise damaged(folder, f"index.npz: {cli.printable(str(error))}") from None
    found = offset.dtype, offset.shape, image.dtype, image.shape
    if found != (np.int64, (captions + 1,), np.int32, (captions,)) or offset[0] or (
            offset[1:] < offset[:-1]).any():
        raise damaged(folder, "index.npz does not belong to captions.json")
    return offset, image
