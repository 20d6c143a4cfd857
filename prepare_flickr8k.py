"""Prepare Flickr8k, or pictures and captions of your own, for training.

    python prepare_flickr8k.py                              # downloads Flickr8k: 1 GB, then a minute
    python prepare_flickr8k.py --images Flickr8k_Dataset.zip --captions Flickr8k_text.zip
    python prepare_flickr8k.py --images photos/ --captions captions.csv --out data/mine

Captions: Flickr8k's own files, Kaggle's captions.txt, Karpathy's dataset_flickr8k.json, COCO's
captions_*.json, Hugging Face parquet (with pyarrow), or CSV or JSON lines with `image`, `caption` and, if you
like, `split`. Folders and zips are searched for them; given --images or --captions alone, so for the other.
Splits: that column, else Flickr8k's lists, else train, val or test in a file's name, else 80/10/10 by hash.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import threading
import time
import typing
from dataclasses import dataclass

import numpy as np

import data
from lib import caption_formats, cli
from lib.caption_formats import basename
from lib.cli import UserError
from lib.images import load_image, resize
from tokenizer import Tokenizer

MIRROR = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
ARCHIVES = {"Flickr8k_Dataset.zip": "f18a1e2920de5bd84dae7cf08ec78978",          # md5
            "Flickr8k_text.zip": "bf6c1abcb8e4a833b7f922104de18627"}
SPLIT_NAMES = ("train", "val", "test")
SPLITS = {"train": "train", "training": "train", "restval": "train", "test": "test", "testing": "test",
          "val": "val", "valid": "val", "validation": "val", "dev": "val"}


@dataclass
class PrepareConfig:
    images: str = cli.flag("", "zip or folder with the pictures", metavar="ZIP|DIR")
    captions: list[str] = cli.flag(list, "captions, in files, zips or folders", metavar="FILE|ZIP|DIR")
    out: str = cli.flag("data/flickr8k", "folder to write the set to")
    image_size: int = cli.flag(224, "pictures are squashed to squares of this side")
    raw_captions: bool = cli.flag(False, "leave the spaces before punctuation that Flickr8k's captions have")
    limit: int = cli.flag(0, "a quick trial: N images, the first of each split in proportion", metavar="N")

    def __post_init__(self):
        if self.image_size < 1 or self.limit < 0:
            raise UserError(f"--image-size {self.image_size} or --limit {self.limit} is too small")


class Image(typing.NamedTuple):
    name: str                     # as the captions name it
    split: str | None
    image_id: int | None
    texts: list
    file: caption_formats.File


def locate(config):
    """The path of the pictures and those of the captions; if none is given, downloads the official zips."""
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


# ------------------------------------------------------------------------------------------------------------
# splits


def assign_splits(captions, lists):
    """{image: train, val, test or None}, and in words what said so. `lists`: Flickr8k's, {split: names}."""
    in_name = {c.file: split_word(c.file) for c in captions}
    if any(c.split for c in captions):
        origin = "the split column"
        found = [(c.image, SPLITS.get(c.split.strip().lower(), c.split)) for c in captions if c.split]
        unknown = {split for _, split in found} - set(SPLIT_NAMES)
        warn("splits that are neither train, val nor test, so that their images are in none", unknown)
    elif lists:
        origin = "Flickr8k's lists"
        found = [(c.image, split) for c in captions for split in lists if basename(c.image) in lists[split]]
        warn("split lists not found, so that their splits are empty", set(SPLIT_NAMES) - set(lists))
        warn("images in a split list, but not in the captions",
             set().union(*lists.values()) - {basename(c.image) for c in captions})
    elif any(in_name.values()):
        origin = "the file names"
        found = [(c.image, in_name[c.file]) for c in captions if in_name[c.file]]
    else:
        origin = "a hash of the file names"
        found = [(c.image, hashed_split(c.image)) for c in captions]
        print("note: nothing says which images are for testing, so a hash of file names decides, 80/10/10; a "
              "column `split` would, or Flickr8k's three lists given with --captions too", file=sys.stderr)
    named = collections.defaultdict(set)
    for image, split in found:
        named[image].add(split)
    warn("images in two splits, used in one", [image for image, splits in named.items() if len(splits) > 1])
    splits = {c.image: next((s for s in SPLIT_NAMES[::-1] if s in named[c.image]), None) for c in captions}
    return splits, origin


def split_word(name):
    """'val' for captions_val2014.json, None where no such word stands by itself."""
    return next((SPLITS[word] for word in re.findall("[a-z]+", name.lower())[::-1] if word in SPLITS), None)


def hashed_split(image):
    digit = int(hashlib.sha256(basename(image).encode("utf-8", "replace")).hexdigest(), 16) % 10
    return {0: "test", 1: "val"}.get(digit, "train")


def first_images(images, limit):
    """The first `limit` images, each split in proportion and with one at least, in their own order."""
    groups = [[image for image in images if image.split == split] for split in SPLIT_NAMES]
    ranked = [(place / len(group), image.name) for group in groups for place, image in enumerate(group)]
    chosen = {name for _, name in sorted(ranked, key=lambda pair: pair[0])[:limit]}
    return [image for image in images if image.name in chosen]


def warn(what, names):
    if names:
        print(f"WARNING: {len(names):,} {what}: {some(sorted(names))}", file=sys.stderr)


def some(names):
    text = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return text.encode("utf-8", "backslashreplace").decode()      # a file name need not be Unicode


# ------------------------------------------------------------------------------------------------------------
# the set


def decode(files, size):
    """Yield each file's picture, uint8 (S, S, 3), or None if it is unreadable, in order; on all cores.

    Threads do, as Pillow works outside of Python's lock; a few pictures are decoded ahead of what is wanted.
    """
    cores, ahead, reading = os.cpu_count() or 1, collections.deque(), threading.Lock()

    def work(file):
        with contextlib.suppress(UserError):
            with reading:                                            # an archive has but one reader
                content = caption_formats.read(file)
            return np.asarray(resize(load_image(io.BytesIO(content)), size))

    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for file in files:
            ahead.append(pool.submit(work, file))
            if len(ahead) > 4 * cores:
                yield ahead.popleft().result()
        yield from (picture.result() for picture in ahead)


def collect(config):
    """Images, what says their splits, {reason: names} of what is unusable. Raises UserError when all is."""
    pictures_path, caption_paths = locate(config)
    given, lists, pictures, broken = caption_formats.read_captions(
        [file for path in caption_paths for file in caption_formats.caption_files(path)])
    captions = [c for c in given if data.clean_caption(c.text)]
    skipped = {"broken entries of the captions": broken,
               "blank captions": [c.image for c in given if not data.clean_caption(c.text)]}
    if not captions:
        raise UserError(f"no caption in {some(caption_paths)} can be used; broken: {some(broken) or 'none'}")
    pictures = pictures or caption_formats.picture_files(pictures_path)
    if not pictures:
        raise UserError(f"no pictures in {pictures_path}; name their folder or zip archive with --images")
    matches = caption_formats.candidates(dict.fromkeys(c.image for c in captions), pictures)
    files = {name: fits[0] for name, fits in matches.items() if len(fits) == 1}
    if not files:
        raise UserError(f"none of the {len(matches):,} images in the captions is among the {len(pictures):,} "
                        f"pictures in {pictures_path}: the captions name {captions[0].image}, a picture is "
                        f"{pictures[0].path}")
    first = {file: name for name, file in reversed(files.items())}     # two spellings of a file are one image
    captions = [c._replace(image=first[files[c.image]]) if c.image in files else c for c in captions]
    splits, origin = assign_splits(captions, lists)
    absent = [name for name in splits if not matches[name]]
    skipped["images without a picture"] = [f"{name} ({splits[name] or 'no split'})" for name in absent]
    skipped["images that could be several pictures"] = [name for name in splits if len(matches[name]) > 1]
    skipped["pictures without a caption"] = [file.path for file in pictures if file not in first]
    texts, ids = collections.defaultdict(list), {}
    for c in captions:
        texts[c.image].append(c.text)
        ids[c.image] = c.image_id
    images = [Image(n, split, ids[n], texts[n], files[n]) for n, split in splits.items() if n in files]
    if not any(image.split for image in images):
        raise UserError(f"by {origin}, none of {len(images):,} images is for training, validation or testing")
    return images, origin, skipped


def prepare(config, tokenizer=None):
    """Write the set that `config` asks for, by default in GPT-2's tokens; return a summary.

    Raises UserError when nothing can be used, or GPT-2's tokenizer is not at hand."""
    start = time.monotonic()
    images, origin, skipped = collect(config)
    if config.limit:
        images = first_images(images, config.limit)
    content = [data.FORMAT_VERSION, config.image_size, config.raw_captions,
               [image[:-1] + (image.file.stamp,) for image in images]]
    source = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if is_complete(config, source):
        return f"{config.out} is complete and was made from the same files: nothing to do"
    tokenizer = tokenizer or Tokenizer.gpt2()                        # may fail, so before anything is written

    kept = []                                                          # fills up as the pictures go by

    def readable():
        decoded = decode([image.file for image in images], config.image_size)
        for image, picture in cli.progress(zip(images, decoded), "pictures", total=len(images)):
            if picture is not None:
                kept.append(image)
                yield picture

    data.write_images(config.out, readable(), config.image_size)
    skipped["unreadable pictures"] = sorted({image.name for image in images} - {image.name for image in kept})
    captions = [(index, text) for index, image in enumerate(kept) for text in image.texts]
    splits = {split: [i for i, image in enumerate(kept) if image.split == split] for split in SPLIT_NAMES}
    ids = [image.image_id for image in kept]
    counts = {split: len(indices) for split, indices in splits.items()}
    counts["no split"] = len(kept) - sum(counts.values())
    skips = {reason: len(names) for reason, names in skipped.items() if names}
    data.write_set(config.out, [image.name for image in kept], captions, splits, tokenizer,
                   dict(image_size=config.image_size), counts=counts | skips, clean=not config.raw_captions,
                   image_ids=ids if None not in ids and len(set(ids)) == len(ids) else None, source=source)
    took = cli.clock(time.monotonic() - start)
    return "\n  ".join([
        f"{config.out}: {len(kept):,} images with {len(captions):,} captions, in {took}",
        f"by {origin}: " + ", ".join(f"{split} {count:,}" for split, count in counts.items()),
        *(f"skipped {count:,} {reason}: {some(skipped[reason])}" for reason, count in skips.items())])


def is_complete(config, source):
    """Whether config.out holds a whole set that was made from the same files in the same way."""
    try:
        with open(os.path.join(config.out, "meta.json")) as file:
            meta = json.load(file)
        pixels = os.path.getsize(os.path.join(config.out, "images.bin"))
    except (OSError, ValueError):
        return False
    return meta.get("source") == source and pixels == len(meta["images"]) * config.image_size**2 * 3


def main():
    print(prepare(PrepareConfig(**cli.parse(PrepareConfig, __doc__))))


if __name__ == "__main__":
    cli.run(main)
