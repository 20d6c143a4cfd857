"""The prepared set on disk: pictures as raw bytes, captions as tokens; written by the prepare scripts, read by training."""

import contextlib
import json
import os
import re

import numpy as np

import cli
from cli import UserError

# ----------------------------------------------------------------------------------------------------------------------
# writing a prepared set

FORMAT_VERSION = 1


def clean_caption(text):
    """A caption as people write it: tokenised corpora put spaces before punctuation, clitics and after brackets."""
    text = re.sub(r" +(?=[.,!?;:)]+( |$))", "", " ".join(text.split()))
    return re.sub(r" +(?=(n't|'(s|re|ve|ll|d|m))\b)", "", text).replace("( ", "(")


def write_images(out, pictures, image_size):
    """Begin the set in folder `out`: stream uint8 (S, S, 3) arrays to images.bin, whatever their number; return it.

    What was a set there before stops being one here, until `write_set` completes the new one."""
    os.makedirs(out, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(out, "meta.json"))
    path, count = os.path.join(out, "images.bin"), 0
    with open(path + ".partial", "wb") as file:
        for picture in pictures:
            assert picture.shape == (image_size, image_size, 3) and picture.dtype == np.uint8, picture.shape
            file.write(np.ascontiguousarray(picture))
            count += 1
    os.replace(path + ".partial", path)
    return count


def write_set(out, names, captions, splits, tokenizer, preprocessing, image_ids=None, counts=None, clean=True):
    """Complete the set begun by `write_images`: captions, tokens, splits, and last of all meta.json.

    names: one per picture; captions: (picture index, source text) pairs, no text blank; splits: {"train", "val", "test":
    picture indices}; preprocessing: at least image_size; counts: what the summary said, for meta.json; clean: tokens
    are of `clean_caption(text)`, not of the text itself."""
    size = preprocessing["image_size"]
    assert os.path.getsize(os.path.join(out, "images.bin")) == len(names) * size * size * 3
    assert set(splits) == {"train", "val", "test"} and tokenizer.vocab_size <= 1 << 16
    texts = [text for _, text in captions]
    tokens = tokenizer.encode_batch([clean_caption(text) if clean else text for text in texts])
    with cli.atomic(os.path.join(out, "tokens.bin")) as path:
        np.concatenate([np.array(ids, np.uint16) for ids in tokens]).tofile(path)
    with cli.atomic(os.path.join(out, "index.npz")) as path, open(path, "wb") as file:     # savez adds .npz to a name
        np.savez(file, offset=np.cumsum([0] + [len(ids) for ids in tokens], dtype=np.int64),
                 image=np.array([image for image, _ in captions], np.int32))
    write_json(os.path.join(out, "captions.json"), texts)
    tokenizer.save(out)
    write_json(os.path.join(out, "meta.json"), {
        "format_version": FORMAT_VERSION, "images": names,
        "image_ids": list(range(len(names))) if image_ids is None else image_ids,
        "splits": {name: [int(i) for i in splits[name]] for name in ("train", "val", "test")},
        "preprocessing": {**preprocessing, "clean_captions": clean},
        "counts": {**(counts or {}), "images": len(names), "captions": len(texts)}})


def write_json(path, value):
    with cli.atomic(path) as temporary, open(temporary, "w") as file:
        json.dump(value, file, indent=0)      # ASCII escapes: a lone surrogate in a caption or name must survive
