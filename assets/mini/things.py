"""Add pictures of things to the training pictures of the mini model: Tux Paint's stamps, a caption each.

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb data/stamps
    pip install resvg-py                        # draws the stamps that are SVG
    python assets/mini/things.py                # data/flickr8k and data/stamps -> data/flickr8k-things

Flickr8k shows people and dogs, and a model that has seen nothing else calls a cup a man. Each stamp is pasted
onto parts of three training pictures, of thirty if it shows dishes, food, cats or space. The few training
pictures that most captions describe without people or dogs are repeated, in crops, with these captions.
Validation and test pictures stay Flickr8k's.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from PIL import Image, ImageFilter

from data import CaptionSet, augment
from lib import cli, prepared_set
from lib.cli import UserError, flag

PEOPLE_OR_DOGS = re.compile(
    r"m[ae]n\b|people|person|boy|girl|child|kid|guy|lad(y|ies)|someone|bab[yi]|toddler|couple|group|crowd|team|"
    r"friend|adult|teen|\b(he|she|his|her|him|they|their)\b|\b(?!water|river|other)\w+ers?\b|"
    r"dog|pupp|poodle|hound", re.IGNORECASE)                        # most words in -er are people or terriers
UNLIKE_PHOTOS = {"symbols", "cartoon", "people"}
OFTEN = {"dishes", "food", "cats", "space"}                         # TIMES as many copies
TIMES = 10


@dataclass
class ThingsConfig:
    data: str = flag("data/flickr8k", "prepared set to add to")
    stamps: str = flag("data/stamps", "unpacked package tuxpaint-stamps-default")
    out: str = flag("data/flickr8k-things", "folder to write the new set to")
    copies: int = flag(3, "pictures made of each stamp", min=1)
    crops: int = flag(20, "crops of each training picture without people or dogs", min=0)


def read_stamps(folder: str) -> dict[str, tuple[Image.Image, str]]:
    """{name: (picture, caption)} of the stamps that a short sentence names, without letters and symbols."""
    found = {}
    for file in sorted(Path(folder).rglob("*.txt")):
        kinds = {*file.relative_to(folder).parts}
        picture = next((p for p in (file.with_suffix(".png"), file.with_suffix(".svg")) if p.exists()), None)
        sentence = re.match(r"((An?|Two|Some|The) [\w ',-]+)[.!]", file.read_text().splitlines()[0])
        if picture and sentence and len(sentence[1].split()) < 9 and not UNLIKE_PHOTOS & kinds:
            with contextlib.suppress(ValueError):                              # an SVG without a size
                found[f"{file.parent.name}-{file.stem}"] = read_picture(picture), sentence[1] + "."
    if not found:
        raise UserError(f"{folder} holds no stamps: unpack Debian's tuxpaint-stamps-default there")
    return found


def read_picture(file: Path) -> Image.Image:
    """A stamp with its transparency, without empty margins."""
    if file.suffix == ".svg":
        try:
            import resvg_py
        except ImportError:
            raise UserError("some stamps are SVG, which need: pip install resvg-py") from None
        file = io.BytesIO(resvg_py.svg_to_bytes(svg_path=str(file), width=400))
    stamp = Image.open(file).convert("RGBA")
    return stamp.crop(stamp.getbbox())


def in_other_light(picture: Image.Image, rng: np.random.Generator, dark: float) -> Image.Image:
    """The picture, RGB or RGBA, in other colours, and darkened by a factor from `dark` to 1."""
    factors = rng.uniform(dark, 1) * rng.uniform(0.7, 1.1, 3)
    levels = np.arange(256) * np.append(factors, 1)[: len(picture.mode), None]            # (3 or 4, 256)
    return picture.point(levels.clip(0, 255).astype(np.uint8).flatten().tolist())


def paste(stamp: Image.Image, scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The stamp, turned and stretched, large on a small blurred part of the scene, each in another light."""
    S = scene.width
    side, left, top = rng.uniform(0.2, 0.5) * S, *rng.uniform(0, 0.5, 2) * S
    picture = scene.resize((S, S), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 6) if rng.random() < 0.5 else 16))
    picture, stamp = in_other_light(picture, rng, 0.3), in_other_light(stamp, rng, 0.7)
    size = rng.uniform(0.7, 1.4) * S / max(stamp.size) * rng.uniform(0.6, 1, 2) * stamp.size
    stamp = stamp.resize([max(1, round(n)) for n in size], Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    stamp = stamp.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR, expand=True)
    picture.paste(stamp, [int((S - n) * rng.uniform(0.2, 0.8)) for n in stamp.size], stamp)
    return picture


def add_things(cfg: ThingsConfig) -> tuple[int, int]:
    """Write the set to `cfg.out`; returns the numbers of stamps and of training pictures repeated."""
    data, stamps, rng = CaptionSet(cfg.data), read_stamps(cfg.stamps), np.random.default_rng(1)
    train, S, N = data.split("train"), data.preprocessing["image_size"], len(data.names)
    copies = {name: cfg.copies * (TIMES if name.split("-")[0] in OFTEN else 1) for name in stamps}
    others = {i: [text for text in data.references(i) if not PEOPLE_OR_DOGS.search(text)] for i in train}
    others = {i: texts for i, texts in others.items() if len(texts) >= 3}                       # of 5

    def pictures() -> Iterator[np.ndarray]:
        yield from data.images
        for name, (stamp, _) in cli.progress([*stamps.items()], "stamp"):
            for _ in range(copies[name]):
                yield np.asarray(paste(stamp, Image.fromarray(data.images[rng.choice(train)]), rng))
        for i in [*others] * cfg.crops:
            yield from augment(data.images[[i]], S, rng).numpy()

    added = [(f"{name}-{n}.png", [text]) for name, (_, text) in stamps.items() for n in range(copies[name])]
    added += [(f"{n}-{data.names[i]}", texts) for n in range(cfg.crops) for i, texts in others.items()]
    captions = list(zip(data.image_of.tolist(), data.captions))
    captions += [(N + i, text) for i, (_, texts) in enumerate(added) for text in texts]
    splits = {**data.splits, "train": [*data.splits["train"], *range(N, N + len(added))]}
    with prepared_set.set_folder(cfg.out):
        prepared_set.write_images(cfg.out, pictures())
        prepared_set.write_set(cfg.out, data.names + [name for name, _ in added], captions, splits,
                               data.tokenizer, dict(image_size=S), clean=data.preprocessing["clean_captions"])
    return len(stamps), len(others)


def main():
    cfg = ThingsConfig(**cli.parse(ThingsConfig, __doc__))
    stamps, repeated = add_things(cfg)
    print(f"{cfg.out}: {cfg.data}, {cfg.copies} or {TIMES * cfg.copies} pictures of each of {stamps} stamps, "
          f"and {cfg.crops} crops of each of {repeated} training pictures without people or dogs")


if __name__ == "__main__":
    cli.run(main)
