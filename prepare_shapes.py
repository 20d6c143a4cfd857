"""Draw the built-in set: pictures of one to three coloured shapes with five captions each. No download, a few seconds.

    python prepare_shapes.py                                # -> data/shapes
    python prepare_shapes.py --train-scenes 2000 --seed 1 --out data/shapes-small

A caption states everything: size, colour and shape of each object, its place (one object) or the order or relation
(two, three). Val and test are new in two ways: no arrangement of theirs (the same objects in the same order) occurs in
train, and the six kinds of object in HELD_OUT occur nowhere in train, though each of their sizes, colours and shapes
does, and each pair of these.
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

import cli
import data
from cli import UserError, flag
from tokenizer import Tokenizer

COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 20), "yellow": (245, 215, 30),
           "green": (50, 165, 70), "blue": (40, 90, 210), "purple": (140, 60, 180)}
SIZES = {"small": 0.17, "large": 0.29}           # width of an object as a fraction of the picture's
STAR = [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate([0.52, 0.22] * 5)]
SHAPES = {"circle": None, "square": [(-0.44, -0.44), (0.44, -0.44), (0.44, 0.44), (-0.44, 0.44)],
          "triangle": [(0, -0.5), (0.5, 0.45), (-0.5, 0.45)], "star": STAR}       # corners in units of the width
KINDS = list(itertools.product(SIZES, COLOURS, SHAPES))
HELD_OUT = {("large", "red", "star"), ("small", "orange", "circle"), ("large", "yellow", "triangle"),
            ("small", "green", "square"), ("large", "blue", "circle"), ("small", "purple", "triangle")}

GAP = 0.03                                        # least distance of two objects, and of an object from the edge
PLACES = [["at the top left", "at the top", "at the top right"],
          ["on the left", "in the middle", "on the right"],
          ["at the bottom left", "at the bottom", "at the bottom right"]]
ROW, COLUMN = "from left to right", "from top to bottom"
RELATIONS = {ROW: [("left of", "to the left of"), ("right of", "to the right of")],       # first to second object,
             COLUMN: [("above", "over"), ("below", "under")]}                             # second to first
NUMBERS = [None, "one shape", "two shapes", "three shapes"]
VOCAB_SIZE = 512                                  # enough for every word to be one token


@dataclass
class ShapesConfig:
    out: str = flag("data/shapes", "folder to write")
    train_scenes: int = flag(8000, "scenes to train on")
    eval_scenes: int = flag(500, "scenes each of val and test")
    image_size: int = flag(64, "width and height of a picture in pixels")
    seed: int = flag(0, "another seed draws other scenes")


def random_scene(rng):
    """A scene {arrangement, objects in the order of mention}; x, y are centres, in fractions from the top left."""
    kinds = rng.sample(KINDS, rng.choices((1, 2, 3), (2, 3, 3))[0])
    if len(kinds) == 1:
        column, row = rng.randrange(3), rng.randrange(3)
        arrangement = PLACES[row][column]
        centres = [[0.2 + 0.3 * third + rng.uniform(-0.04, 0.04) for third in (column, row)]]
    else:
        arrangement = rng.choice((ROW, COLUMN))
        widths = [SIZES[size] for size, _, _ in kinds]
        spare = 1 - sum(widths) - GAP * (len(kinds) + 1)
        shifts = sorted(rng.uniform(0, spare) for _ in kinds)
        line = rng.uniform(0.22, 0.78)
        centres = []
        for i, shift in enumerate(shifts):                # apart by GAP at least, off the line by little: one axis rules
            along = GAP * (i + 1) + sum(widths[:i]) + widths[i] / 2 + shift
            across = line + rng.uniform(-0.06, 0.06)
            centres.append((along, across) if arrangement == ROW else (across, along))
    objects = [dict(size=size, colour=colour, shape=shape, x=round(x, 4), y=round(y, 4))
               for (size, colour, shape), (x, y) in zip(kinds, centres)]
    return dict(arrangement=arrangement, objects=objects)


def kinds_of(scene):
    return [(o["size"], o["colour"], o["shape"]) for o in scene["objects"]]


def split_of(scene):
    """train, val or test: the same for all scenes that differ in exact positions only; held-out kinds never in train."""
    kinds = kinds_of(scene)
    bucket = zlib.crc32(repr((scene["arrangement"], kinds)).encode()) % 10
    if not HELD_OUT.isdisjoint(kinds):
        return "val" if bucket % 2 else "test"
    return {0: "val", 1: "test"}.get(bucket, "train")


def captions(scene):
    """Every wording that is true of the scene and names its objects in their order; a scene has at least seven."""
    where = scene["arrangement"]
    things = [f"a {o['size']} {o['colour']} {o['shape']}" for o in scene["objects"]]
    listed = " and ".join(filter(None, [", ".join(things[:-1]), things[-1]]))
    openings = ["", "there is ", "here is ", "the picture shows ", f"{NUMBERS[len(things)]}: "]
    verbs = ["there is", "we see"]
    texts = [f"{opening}{listed} {where}" for opening in openings] + [f"{where} {verb} {listed}" for verb in verbs]
    if len(things) == 2:
        (first, second), (forward, backward) = things, RELATIONS[where]
        texts += [f"{opening}{first} {relation} {second}" for opening in openings for relation in forward]
        texts += [f"{relation} {first} {verb} {second}" for relation in backward for verb in verbs]
    return texts


def draw(scene, size, rng):
    """The picture (size, size, 3) uint8 of a scene: flat colours on a pale ground, smooth edges."""
    scale = 4 * size                                      # drawn four times as large, then averaged
    image = Image.new("RGB", (scale, scale), tuple(rng.randint(222, 255) for _ in range(3)))
    canvas = ImageDraw.Draw(image)
    for o in scene["objects"]:
        x, y, width, corners = o["x"], o["y"], SIZES[o["size"]], SHAPES[o["shape"]]
        if corners is None:
            canvas.ellipse([scale * v for v in (x - width / 2, y - width / 2, x + width / 2, y + width / 2)],
                           fill=COLOURS[o["colour"]])
        else:
            canvas.polygon([(scale * (x + width * u), scale * (y + width * v)) for u, v in corners],
                           fill=COLOURS[o["colour"]])
    return np.asarray(image.reduce(4))


def draw_scenes(config):
    """{"train", "val", "test": scenes}, drawn until each split is full; the same for the same seed."""
    rng = random.Random(config.seed)
    wanted = dict(train=config.train_scenes, val=config.eval_scenes, test=config.eval_scenes)
    scenes = {name: [] for name in wanted}
    while any(len(scenes[name]) < wanted[name] for name in wanted):
        scene = random_scene(rng)
        if len(scenes[split_of(scene)]) < wanted[split_of(scene)]:
            scenes[split_of(scene)].append(scene)
    return scenes


def prepare(config):
    """Write the whole set to `config.out` and return its counts. Raises UserError for sizes that cannot be."""
    if min(config.train_scenes, config.eval_scenes) < 1:
        raise UserError("--train-scenes and --eval-scenes must be at least 1")
    if config.image_size < 32:
        raise UserError(f"--image-size is {config.image_size}: below 32 pixels the small shapes cannot be told apart")
    splits = draw_scenes(config)
    scenes = [scene for name in splits for scene in splits[name]]
    ends = list(itertools.accumulate(len(splits[name]) for name in splits))
    indices = {name: list(range(end - len(splits[name]), end)) for name, end in zip(splits, ends)}
    rng = random.Random(config.seed + 1)                     # of its own: the texts stay when the drawing changes
    texts = [(i, text) for i, scene in enumerate(scenes) for text in rng.sample(captions(scene), 5)]
    pictures = (draw(scene, config.image_size, rng) for scene in cli.progress(scenes, "drawing"))
    data.write_images(config.out, pictures, config.image_size)
    with cli.atomic(os.path.join(config.out, "scenes.jsonl")) as path, open(path, "w") as file:
        file.writelines(json.dumps(scene) + "\n" for scene in scenes)
    tokenizer = Tokenizer.train([text for i, text in texts if i < config.train_scenes], VOCAB_SIZE)
    counts = {name: len(splits[name]) for name in splits}
    counts["test_with_unseen_kinds"] = sum(not HELD_OUT.isdisjoint(kinds_of(scene)) for scene in splits["test"])
    names = [f"{i:05}.png" for i in range(len(scenes))]
    data.write_set(config.out, names, texts, indices, tokenizer, dict(image_size=config.image_size), counts=counts)
    return counts


def main():
    config = ShapesConfig(**cli.parse(ShapesConfig, __doc__))
    counts = prepare(config)
    print(f"{config.out}: {counts['train']:,} train, {counts['val']:,} val and {counts['test']:,} test scenes, five "
          f"captions each; {counts['test_with_unseen_kinds']} of test hold a kind of object that train never shows")


if __name__ == "__main__":
    cli.run(main)
