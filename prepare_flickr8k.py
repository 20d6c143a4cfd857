"""Prepare Flickr8k, or pictures and captions of your own, for training.

    python prepare_flickr8k.py                              # downloads Flickr8k (1 GB), then takes a minute
    python prepare_flickr8k.py --images Flickr8k_Dataset.zip --captions Flickr8k_text.zip
    python prepare_flickr8k.py --images photos/ --captions captions.csv --out data/mine

Captions may come as Flickr8k's own files, Kaggle's captions.txt, Karpathy's dataset_flickr8k.json, COCO's
captions_*.json, Hugging Face parquet (needs pyarrow), or as CSV or JSON lines with `image`, `caption` and
optionally `split`. Folders and zip archives are searched for them; with only one of --images and --captions,
the other is looked for in the same place. An image's split comes from its `split` field, else from Flickr8k's
lists, else from the word train, val or test in the caption file's name, else from its name's hash, 80/10/10.
"""

import collections
import contextlib
import hashlib
import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lib import caption_formats, cli, prepared_set
from lib.caption_formats import Caption, basename
from lib.cli import UserError, printable
from lib.images import load_image
from tokenizer import Tokenizer

MIRROR = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
ARCHIVES = {"Flickr8k_Dataset.zip": "f18a1e2920de5bd84dae7cf08ec78978",          # md5
            "Flickr8k_text.zip": "bf6c1abcb8e4a833b7f922104de18627"}
SPLIT_NAMES = ("train", "val", "test")
SPLITS = {"train": "train", "training": "train", "restval": "train", "test": "test", "testing": "test",
          "val": "val", "valid": "val", "validation": "val", "dev": "val"}


@dataclass
class PrepareConfig:
    images: str = cli.flag("", "zip archive or folder of pictures", metavar="ZIP|DIR")
    captions: list[str] = cli.flag(list, "caption files, or zip archives or folders of them",
                                   metavar="FILE|ZIP|DIR")
    out: str = cli.flag("data/flickr8k", "folder to write the set to")
    image_size: int = cli.flag(224, "side of the squares that pictures are squashed to", min=1, max=1024)
    raw_captions: bool = cli.flag(False, "keep the spaces before punctuation in Flickr8k's captions")
    limit: int = cli.flag(0, "for a quick trial: N images, from each split in proportion", metavar="N", min=0)

    def __post_init__(self):
        cli.check_ranges(self)


class Entry(NamedTuple):
    """An image of the set: its name in the captions, what is known of it, and the file that shows it."""
    name: str
    split: str | None
    image_id: int | None
    texts: list[str]
    file: caption_formats.File


def find_sources(config: PrepareConfig) -> tuple[str, list[str]]:
    """The path of the pictures, and those of the captions; without flags, downloads the official archives."""
    if not config.images and not config.captions:
        from lib.download import download_file
        zips = [str(download_file(MIRROR + name, f"downloads/{name}", md5=md5))
                for name, md5 in ARCHIVES.items()]
        return zips[0], zips[1:]
    if config.images:
        return config.images, config.captions or [config.images]
    path = config.captions[0]
    is_file = os.path.isfile(path) and not path.lower().endswith(".zip")
    return (os.path.dirname(path) or ".") if is_file else path, config.captions


def assign_splits(captions: list[Caption], lists: dict[str, set]) -> tuple[dict, str]:
    """{image: train, val, test or None}, and in words what decided. `lists`: Flickr8k's, {split: names}."""
    in_file_name = {c.file: split_in_name(c.file) for c in captions}
    if any(c.split for c in captions):
        origin = "the split column"
        found = [(c.image, SPLITS.get(c.split.strip().lower(), c.split)) for c in captions if c.split]
        warn("splits other than train, val and test, whose images will be in no split",
             {split for _, split in found} - set(SPLIT_NAMES))
    elif lists:
        origin = "Flickr8k's lists"
        found = [(c.image, split) for c in captions for split in lists if basename(c.image) in lists[split]]
        warn("split lists not found, so these splits will be empty", set(SPLIT_NAMES) - set(lists))
        warn("images in a split list but not in the captions",
             set().union(*lists.values()) - {basename(c.image) for c in captions})
    elif any(in_file_name.values()):
        origin = "the file names"
        found = [(c.image, in_file_name[c.file]) for c in captions if in_file_name[c.file]]
    else:
        origin = "a hash of the file names"
        found = [(c.image, hashed_split(c.image)) for c in captions]
        print("note: nothing says which images are for testing, so a hash of their names decides, 80/10/10; "
              "to choose, add a `split` column, or name Flickr8k's lists with --captions", file=sys.stderr)
    named = collections.defaultdict(set)
    for image, split in found:
        named[image].add(split)
    warn("images in two splits, used in only one", [image for image in named if len(named[image]) > 1])
    splits = {c.image: next((s for s in SPLIT_NAMES[::-1] if s in named[c.image]), None) for c in captions}
    return splits, origin


def split_in_name(name: str) -> str | None:
    """'val' for captions_val2014.json; None without such a word."""
    return next((SPLITS[word] for word in re.findall("[a-z]+", name.lower())[::-1] if word in SPLITS), None)


def hashed_split(image: str) -> str:
    digit = int(hashlib.sha256(basename(image).encode("utf-8", "replace")).hexdigest(), 16) % 10
    return {0: "test", 1: "val"}.get(digit, "train")


def first_images(images: list[Entry], limit: int) -> list[Entry]:
    """The first `limit` images in order, from each split in proportion and at least one."""
    groups = [[image for image in images if image.split == split] for split in SPLIT_NAMES]
    ranked = [(place / len(group), image.name) for group in groups for place, image in enumerate(group)]
    chosen = {name for _, name in sorted(ranked, key=lambda pair: pair[0])[:limit]}
    return [image for image in images if image.name in chosen]


def warn(what: str, names):
    if names:
        print(f"WARNING: {what}: {first_few(sorted(names))}", file=sys.stderr)


def first_few(names: list[str]) -> str:
    names_shown = [printable(name[:200]) for name in names[:5]]
    return ", ".join(names_shown) + (f" ... ({len(names):,} in all)" if len(names) > 5 else "")


def decode(files: list[caption_formats.File], size: int) -> Iterator[np.ndarray | None]:
    """Yield each file's picture, uint8 (S, S, 3), or None if it is unreadable, in order; on all cores."""
    cores, reading = os.cpu_count() or 1, threading.Lock()

    def work(file):
        with contextlib.suppress(UserError):
            with reading:                                            # a zip archive has only one file handle
                content = caption_formats.read(file)
            return np.asarray(load_image(io.BytesIO(content), size))

    return cli.load_ahead(work, files, cores, 4 * cores)


def collect(config: PrepareConfig) -> tuple[list[Entry], str, dict[str, list[str]]]:
    """The images, what decided their splits, {reason: names} of the skipped. UserError if none is left."""
    pictures_path, caption_paths = find_sources(config)
    given, lists, pictures, broken = caption_formats.read_captions(
        [file for path in caption_paths for file in caption_formats.caption_files(path)])
    captions = [c for c in given if prepared_set.clean_caption(c.text)]
    skipped = {"broken entries of the captions": broken,
               "blank captions": [c.image for c in given if not prepared_set.clean_caption(c.text)]}
    if not captions:
        raise UserError(f"none of the captions in {first_few(caption_paths)} can be used; broken entries: "
                        f"{first_few(broken) or 'none'}")
    pictures = pictures or caption_formats.picture_files(pictures_path)
    if not pictures:
        raise UserError(f"there are no pictures in {pictures_path}; name their folder or zip with --images")
    matches = caption_formats.match_pictures(dict.fromkeys(c.image for c in captions), pictures)
    files = {name: fits[0] for name, fits in matches.items() if len(fits) == 1}
    if not files:
        raise UserError(f"none of the {len(matches):,} images in the captions is among the {len(pictures):,} "
                        f"pictures in {pictures_path}: the captions name {first_few([captions[0].image])}, "
                        f"but the pictures have names such as {pictures[0].path}")
    first = {file: name for name, file in reversed(files.items())}     # two spellings of a file are one image
    captions = [c._replace(image=first[files[c.image]]) if c.image in files else c for c in captions]
    splits, origin = assign_splits(captions, lists)
    absent = [name for name in splits if not matches[name]]
    skipped["images without a picture"] = [f"{name} ({splits[name] or 'no split'})" for name in absent]
    skipped["images that could be several pictures"] = [name for name in splits if len(matches[name]) > 1]
    skipped["pictures without a caption"] = [file.path for file in pictures if file not in first]
    by_image = collections.defaultdict(list)
    for c in captions:
        by_image[c.image].append(c)
    images = [Entry(name, split, by_image[name][0].image_id, [c.text for c in by_image[name]], files[name])
              for name, split in splits.items() if name in files]
    if not any(image.split for image in images):
        raise UserError(f"according to {origin}, none of {len(images):,} images is in train, val or "
                        "test; --help says where splits come from")
    return images, origin, skipped


def prepare(config: PrepareConfig, tokenizer: Tokenizer | None = None) -> str:
    """Write the set described by `config`, by default in GPT-2's tokens, and return a summary."""
    start = time.monotonic()
    images, origin, skipped = collect(config)
    if config.limit:
        images = first_images(images, config.limit)
    tokenizer = tokenizer or Tokenizer.gpt2()                        # may fail, so before anything is written
    with prepared_set.set_folder(config.out):
        counts = write_entries(config, images, skipped, tokenizer)
    took, out = cli.clock(time.monotonic() - start), printable(config.out)
    return "\n  ".join([
        f"{out}: {counts['images']:,} images with {counts['captions']:,} captions, in {took}",
        f"splits by {origin}: " + ", ".join(f"{s} {counts[s]:,}" for s in (*SPLIT_NAMES, "no split")),
        *(f"skipped {why} ({len(names):,}): {first_few(names)}" for why, names in skipped.items() if names)])


def write_entries(config: PrepareConfig, images: list[Entry], skipped: dict[str, list[str]],
                  tokenizer: Tokenizer) -> dict[str, int]:
    """Write the set, and return its counts. Pictures that cannot be read are added to `skipped`."""
    kept, decoded = [], decode([image.file for image in images], config.image_size)

    def readable():
        for image, picture in cli.progress(zip(images, decoded), "pictures", total=len(images)):
            if picture is not None:
                kept.append(image)
                yield picture

    prepared_set.write_images(config.out, readable())
    skipped["unreadable pictures"] = sorted({image.name for image in images} - {image.name for image in kept})
    captions = [(index, text) for index, image in enumerate(kept) for text in image.texts]
    splits = {split: [i for i, image in enumerate(kept) if image.split == split] for split in SPLIT_NAMES}
    ids = [image.image_id for image in kept]
    distinct = len({i for i in ids if type(i) is int and abs(i) < 1 << 53}) == len(ids)
    counts = {split: len(indices) for split, indices in splits.items()}
    counts |= {"no split": len(kept) - sum(counts.values())}
    counts |= {reason: len(names) for reason, names in skipped.items() if names}
    prepared_set.write_set(config.out, [image.name for image in kept], captions, splits, tokenizer,
                           dict(image_size=config.image_size), counts=counts, clean=not config.raw_captions,
                           image_ids=ids if distinct else None)
    return counts | {"images": len(kept), "captions": len(captions)}


def main():
    print(prepare(PrepareConfig(**cli.parse(PrepareConfig, __doc__))))


if __name__ == "__main__":
    cli.run(main)
