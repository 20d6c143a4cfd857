"""Prepare Flickr8k, or pictures and captions of your own, for training.

    python prepare_flickr8k.py                                             # downloads Flickr8k: 1 GB, then a minute
    python prepare_flickr8k.py --images Flickr8k_Dataset.zip --captions Flickr8k_text.zip
    python prepare_flickr8k.py --images photos/ --captions captions.csv --out data/mine

Captions: Flickr8k's own files, Kaggle's captions.txt, Karpathy's dataset_flickr8k.json, COCO's captions_*.json, Hugging
Face parquet (with pyarrow), or a CSV or JSON-lines file with `image`, `caption` and, if you like, `split`. Folders and
zips are searched for them; where only one of --images and --captions is given, the other is searched for there too.
Splits: that column, else Flickr8k's lists, else train, val or test in a file's name, else 80/10/10 by hash.
"""

import collections
import concurrent.futures
import hashlib
import io
import json
import os
import re
import sys
import time
from dataclasses import dataclass

import numpy as np

import cli
import data
import sources
import vit
from cli import UserError
from sources import basename
from tokenizer import Tokenizer

MIRROR = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
ARCHIVES = {"Flickr8k_Dataset.zip": "f18a1e2920de5bd84dae7cf08ec78978",          # md5
            "Flickr8k_text.zip": "bf6c1abcb8e4a833b7f922104de18627"}
SPLITS = {"train": "train", "training": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val",
          "dev": "val", "test": "test", "testing": "test"}


@dataclass
class PrepareConfig:
    images: str = cli.flag("", "zip or folder with the pictures", metavar="ZIP|DIR")
    captions: list[str] = cli.flag(list, "captions, in files, zips or folders", metavar="FILE|ZIP|DIR")
    out: str = cli.flag("data/flickr8k", "folder to write the set to")
    image_size: int = cli.flag(224, "pictures are squashed to squares of this side")
    raw_captions: bool = cli.flag(False, "leave the spaces before punctuation that Flickr8k's captions have")
    limit: int = cli.flag(0, "only N images, the first of each split in proportion, for a quick trial; 0 is all",
                          metavar="N")

    def __post_init__(self):
        if self.image_size < 1 or self.limit < 0:
            raise UserError(f"--image-size {self.image_size} must be above 0 and --limit {self.limit} not below")


def locate(config):
    """The path of the pictures and those of the captions; downloads the official archives where neither was given."""
    if not config.images and not config.captions:
        from download import fetch
        pictures, text = [fetch(MIRROR + name, os.path.join("downloads", name), md5=md5) for name, md5 in ARCHIVES.items()]
        return str(pictures), [str(text)]
    captions = config.captions or [config.images]
    beside = os.path.isfile(captions[0]) and not captions[0].lower().endswith(".zip")
    return config.images or (os.path.dirname(captions[0]) or "." if beside else captions[0]), captions


# ----------------------------------------------------------------------------------------------------------------------
# splits


def assign_splits(captions, lists):
    """{image: train, val, test or None}, and in words what said so. `lists` are Flickr8k's, {split: file names}."""
    in_name = {c.file: split_word(c.file) for c in captions}
    if any(c.split for c in captions):
        origin, found = "the split column", [(c.image, SPLITS.get((c.split or "").strip().lower())) for c in captions]
        unknown = sorted({c.split for c in captions if c.split and c.split.strip().lower() not in SPLITS})
        warn("splits that are neither train, val nor test; their images are in none", unknown)
    elif lists:
        origin, found = "Flickr8k's lists", [(c.image, s) for c in captions for s in lists if basename(c.image) in lists[s]]
        warn("split lists not found; their splits are empty", [n for n, s in sources.LISTS.items() if s not in lists])
        warn("images in a split list, but without captions",
             sorted(set().union(*lists.values()) - {basename(c.image) for c in captions}))
    elif any(in_name.values()):
        origin, found = "the file names", [(c.image, in_name[c.file]) for c in captions]
    else:
        origin, found = "a hash of the file names", [(c.image, hashed_split(c.image)) for c in captions]
        print("note: nothing says which images are for testing, so a hash of the file names decides, 80/10/10; a column "
              "`split`, or Flickr8k's three lists given with --captions too, would", file=sys.stderr)
    named = collections.defaultdict(set)
    for image, split in found:
        named[image].add(split)
    warn("images in two splits, used in one of them", [i for i, s in named.items() if len(s - {None}) > 1])
    return {c.image: next((s for s in ("test", "val", "train") if s in named[c.image]), None) for c in captions}, origin


def split_word(name):
    """'val' for captions_val2014.json, None where no such word stands by itself."""
    return next((SPLITS[word] for word in re.findall("[a-z]+", name.lower())[::-1] if word in SPLITS), None)


def hashed_split(image):
    digit = int(hashlib.sha256(basename(image).encode("utf-8", "replace")).hexdigest(), 16) % 10
    return {0: "test", 1: "val"}.get(digit, "train")


def first_images(splits, limit):
    """The first images of each split, `limit` in all, in proportion and at least one of each."""
    groups = [[image for image in splits if splits[image] == split] for split in ("train", "val", "test")]
    ranked = sorted(((k / len(group), image) for group in groups for k, image in enumerate(group)), key=lambda r: r[0])
    chosen = {image for _, image in ranked[:limit]}
    return {image: split for image, split in splits.items() if image in chosen}


def warn(what, names):
    if names:
        print(f"WARNING: {len(names):,} {what}: {some(names)}", file=sys.stderr)


def some(names):
    return ", ".join(map(str, names[:5])) + (" ..." if len(names) > 5 else "")


# ----------------------------------------------------------------------------------------------------------------------
# pictures


def finder(files):
    """A function from an image as the captions name it to its file, None, or the several files that it could be.

    Of both paths the shorter one must be the end of the other, so that cats/1.jpg is never taken for dogs/1.jpg.
    """
    by_name = collections.defaultdict(list)
    for file in files:
        by_name[basename(file.path)].append(file)

    def find(image):
        parts, fits = image.split("/"), collections.defaultdict(list)
        for file in by_name[parts[-1]]:
            if file.path == image:
                return file
            other = file.path.split("/")
            common = min(len(parts), len(other))
            if parts[-common:] == other[-common:]:
                fits[common].append(file)
        best = fits[max(fits)] if fits else [None]
        return best[0] if len(best) == 1 or len({sources.read(file) for file in best}) == 1 else tuple(best)

    return find


def decode(files, size):
    """Yield the picture of each file, uint8 (S, S, 3), or None where it is unreadable, in order; on all cores.

    Threads do, as Pillow works outside of Python's lock. Archives are read by one thread, and a little ahead only.
    """
    cores, ahead = os.cpu_count() or 1, collections.deque()
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for file in files:
            ahead.append(pool.submit(decode_one, read_or_nothing(file), size))
            if len(ahead) > 4 * cores:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def read_or_nothing(file):
    try:
        return sources.read(file)
    except UserError:
        return b""


def decode_one(content, size):
    try:
        return np.asarray(vit.resize(vit.load_image(io.BytesIO(content)), size))
    except UserError:
        return None


# ----------------------------------------------------------------------------------------------------------------------
# the set


def prepare(config):
    """Write the set that `config` asks for to config.out; return a summary. Raises UserError when nothing can be used."""
    start = time.monotonic()
    pictures_path, caption_paths = locate(config)
    captions, lists, pictures, broken = sources.read_captions(
        [file for path in caption_paths for file in sources.caption_files(path)])
    skipped = {"broken entries in the captions": broken,
               "blank captions": [c.image for c in captions if not data.clean_caption(c.text)]}
    captions = [c for c in captions if data.clean_caption(c.text)]
    if not captions:
        raise UserError(f"no caption in {', '.join(caption_paths)} can be used" + (broken and f": see {some(broken)}" or ""))
    pictures = pictures or sources.picture_files(pictures_path)
    if not pictures:
        raise UserError(f"no pictures in {pictures_path}; name their folder or zip archive with --images")

    # which picture each caption is of; two spellings of one picture become one image
    find = finder(pictures)
    files = {image: find(image) for image in dict.fromkeys(c.image for c in captions)}
    first = {file: image for image, file in reversed(files.items()) if isinstance(file, sources.File)}
    if not first:
        raise UserError(f"none of the {len(files):,} images in the captions is among the {len(pictures):,} pictures of "
                        f"{pictures_path}: one is named {captions[0].image}, a picture is {pictures[0].path}")
    captions = [c._replace(image=first.get(files[c.image], c.image)) for c in captions]
    splits, origin = assign_splits(captions, lists)
    skipped["images without a picture"] = [f"{i} ({splits[i] or 'in no split'})" for i in splits if files[i] is None]
    skipped["images that could be several pictures"] = [i for i in splits if isinstance(files[i], tuple)]
    skipped["pictures without a caption"] = [file.path for file in pictures if file not in first]
    splits = {image: split for image, split in splits.items() if files[image] in first}
    if not any(splits.values()):
        raise UserError("no image is in a split, so there would be nothing to train on")
    if config.limit:
        splits = first_images(splits, config.limit)

    texts, ids = collections.defaultdict(list), {}
    for c in captions:
        texts[c.image].append(c.text)
        ids[c.image] = c.image_id
    source = fingerprint([config.image_size, config.raw_captions] + [
        (image, files[image].stamp, split, ids[image], texts[image]) for image, split in splits.items()])
    if is_complete(config, source):
        return f"{config.out} is complete and was made from the same files: nothing to do"

    tokenizer, names = Tokenizer.gpt2(), []

    def readable():
        decoded = decode([files[image] for image in splits], config.image_size)
        for image, picture in cli.progress(zip(splits, decoded), "pictures", total=len(splits)):
            if picture is not None:
                names.append(image)
                yield picture

    data.write_images(config.out, readable(), config.image_size)
    skipped["unreadable pictures"] = sorted(set(splits) - set(names))
    indices = {split: [i for i, name in enumerate(names) if splits[name] == split] for split in ("train", "val", "test")}
    counts = {split: len(images) for split, images in indices.items()}
    counts["no split"] = len(names) - sum(counts.values())
    pairs = [(i, text) for i, name in enumerate(names) for text in texts[name]]
    image_ids = [ids[name] for name in names]
    data.write_set(config.out, names, pairs, indices, tokenizer, dict(image_size=config.image_size),
                   image_ids=image_ids if None not in image_ids and len(set(image_ids)) == len(names) else None,
                   counts=counts | {what: len(things) for what, things in skipped.items() if things},
                   clean=not config.raw_captions, source=source)

    lines = [f"{config.out}: {len(names):,} images with {len(pairs):,} captions, in {cli.clock(time.monotonic() - start)}",
             ", ".join(f"{split} {count:,}" for split, count in counts.items()) + f" images, by {origin}"]
    return "\n  ".join(lines + [f"skipped {len(t):,} {what}: {some(t)}" for what, t in skipped.items() if t])


def fingerprint(content):
    return hashlib.sha256(json.dumps([data.FORMAT_VERSION, content]).encode()).hexdigest()


def is_complete(config, source):
    """Whether config.out holds a whole set made from the same files in the same way."""
    try:
        done = data.CaptionSet(config.out)
        with open(os.path.join(config.out, "meta.json")) as file:
            return json.load(file).get("source") == source and len(done.images) == len(done.names)
    except (UserError, OSError, ValueError, KeyError):
        return False


def main():
    try:
        print(prepare(PrepareConfig(**cli.parse(PrepareConfig, __doc__))))
    except OSError as error:                             # a full disk, a folder without permission
        raise UserError(f"{error.filename or 'writing'}: {error.strerror}") from None


if __name__ == "__main__":
    cli.run(main)
