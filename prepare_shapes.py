"""Draw the built-in set: one to three coloured shapes a picture, five captions each. Needs no download.

    python prepare_shapes.py                                # -> data/shapes
    python prepare_shapes.py --train-scenes 2000 --seed 1 --out data/shapes-small

A caption states everything: the size, colour and shape of each object, and its place (one object) or their
order or relation (two or three). Test scenes are new to the model in two ways. No arrangement in val or test
(the same objects in the same order, or one object in the same place) occurs in train. And the three
kinds of object in HELD_OUT occur nowhere in train, although each of their sizes, colours and shapes, and each
pair of these, does; two in five test scenes contain one.
"""

import itertools
import json
import math
import os
import random
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from lib import cli, prepared_set
from lib.cli import flag
from lib.scenes import COLUMN, ROW, place, true_captions
from tokenizer import Tokenizer

COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 20), "yellow": (245, 215, 30),
           "green": (50, 165, 70), "blue": (40, 90, 210), "purple": (140, 60, 180)}
SIZES = {"small": 0.18, "large": 0.29}           # width of an object as a fraction of the picture's
SHAPES = {"circle": None,                         # corners in units of the width
          "square": [(-0.44, -0.44), (0.44, -0.44), (0.44, 0.44), (-0.44, 0.44)],
          "triangle": [(0, -0.5), (0.5, 0.45), (-0.5, 0.45)],
          "star": [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
                   for k, r in enumerate([0.52, 0.22] * 5)]}
KINDS = list(itertools.product(SIZES, COLOURS, SHAPES))
HELD_OUT = {("large", "red", "star"), ("small", "green", "square"), ("large", "blue", "circle")}

JITTER = 0.015                                   # of a centre round its cell's; large neighbours stay apart
OUTLINE = (30, 30, 30)                           # shows the shape whatever its colour
VOCAB_SIZE = 512                                 # enough for every word to be one token


@dataclass
class ShapesConfig:
    out: str = flag("data/shapes", "folder to write")
    train_scenes: int = flag(8000, "scenes to train on", min=1, max=999_999)
    eval_scenes: int = flag(500, "scenes in each of val and test", min=1, max=999_999)
    image_size: int = flag(96, "width and height of a picture in pixels; in small ones, shapes look alike",
                           min=32, max=1024)
    seed: int = flag(0, "another seed draws other scenes")

    def __post_init__(self):
        cli.check_ranges(self)


def random_scene(rng: random.Random) -> dict:
    """A scene {arrangement, objects in the order of mention}; centres x, y in fractions from the top left.

    Each object has a cell of a 3x3 grid to itself; two or three share a row or a column: one axis rules.
    """
    kinds = rng.sample(KINDS, rng.choices((1, 2, 3), (2, 3, 2))[0])
    line, steps = rng.randrange(3), sorted(rng.sample(range(3), len(kinds)))
    in_row = rng.random() < 0.5
    cells = [(step, line) if in_row else (line, step) for step in steps]
    objects = []
    for (size, colour, shape), cell in zip(kinds, cells):
        x, y = (round((2 * i + 1) / 6 + rng.uniform(-JITTER, JITTER), 4) for i in cell)
        objects.append(dict(size=size, colour=colour, shape=shape, x=x, y=y))
    arrangement = place(objects[0]) if len(kinds) == 1 else ROW if in_row else COLUMN
    return dict(arrangement=arrangement, objects=objects)


def kinds_of(scene: dict) -> list[tuple[str, str, str]]:
    return [(o["size"], o["colour"], o["shape"]) for o in scene["objects"]]


def split_of(scene: dict) -> str:
    """train, val or test: one for all scenes of an arrangement, and never train for a held-out kind."""
    kinds = kinds_of(scene)
    bucket = zlib.crc32(repr((scene["arrangement"], kinds)).encode()) % 10
    if not HELD_OUT.isdisjoint(kinds):
        return "val" if bucket % 2 else "test"
    return {0: "val", 1: "test"}.get(bucket, "train")


def draw(scene: dict, size: int, rng: random.Random) -> np.ndarray:
    """The picture (size, size, 3) uint8 of a scene: flat colours with dark outlines on a pale ground."""
    scale = 4 * size                                 # drawn four times as large, then averaged
    line = dict(outline=OUTLINE, width=scale // 60)
    image = Image.new("RGB", (scale, scale), (rng.randint(232, 252),) * 3)
    canvas = ImageDraw.Draw(image)
    for o in scene["objects"]:
        x, y, width = (scale * v for v in (o["x"], o["y"], SIZES[o["size"]]))
        corners, colour = SHAPES[o["shape"]], COLOURS[o["colour"]]
        if corners is None:
            canvas.circle((x, y), width / 2, fill=colour, **line)
        else:
            canvas.polygon([(x + width * u, y + width * v) for u, v in corners], fill=colour, **line)
    return np.asarray(image.reduce(4))


def draw_scenes(config: ShapesConfig) -> dict[str, list[dict]]:
    """{"train", "val", "test": scenes}, drawn until each split is full; the same for the same seed."""
    rng = random.Random(config.seed)
    wanted = dict(train=config.train_scenes, val=config.eval_scenes, test=config.eval_scenes)
    scenes = {name: [] for name in wanted}
    while any(len(scenes[name]) < wanted[name] for name in wanted):
        scene = random_scene(rng)
        name = split_of(scene)
        if len(scenes[name]) < wanted[name]:
            scenes[name].append(scene)
    return scenes


def prepare(config: ShapesConfig) -> dict[str, int]:
    """Write the set to `config.out` and return its counts."""
    scenes, indices = [], {}
    for name, drawn in draw_scenes(config).items():
        indices[name] = list(range(len(scenes), len(scenes) + len(drawn)))
        scenes += drawn
    rng = random.Random(config.seed)
    texts = [(i, text) for i, scene in enumerate(scenes)
             for text in rng.sample(true_captions(scene["objects"]), 5)]
    pictures = (draw(scene, config.image_size, rng) for scene in cli.progress(scenes, "drawing"))
    tokenizer = Tokenizer.train([text for i, text in texts if i < config.train_scenes], VOCAB_SIZE)
    counts = {name: len(split) for name, split in indices.items()}
    counts["test_unseen"] = sum(not HELD_OUT.isdisjoint(kinds_of(scenes[i])) for i in indices["test"])
    names = [f"{i:05}.png" for i in range(len(scenes))]
    with prepared_set.set_folder(config.out):
        prepared_set.write_images(config.out, pictures)
        cli.write_text(os.path.join(config.out, "scenes.jsonl"), "\n".join(map(json.dumps, scenes)))
        prepared_set.write_set(config.out, names, texts, indices, tokenizer,
                               dict(image_size=config.image_size), counts=counts)
    return counts


def main():
    config = ShapesConfig(**cli.parse(ShapesConfig, __doc__))
    counts = prepare(config)
    train, val, test, unseen = counts.values()
    print(f"{config.out}: {train:,} train, {val:,} val and {test:,} test scenes, five captions each; "
          f"{unseen} test scenes hold an object unlike any in train")


if __name__ == "__main__":
    cli.run(main)
