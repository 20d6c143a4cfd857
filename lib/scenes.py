"""What may be said of a drawn scene: every true sentence of a small grammar, and whether a caption is one.

A scene is a dict, a line of scenes.jsonl; only size, colour, shape and centre (x, y in fractions of the
picture, from the top left) of its one to three objects count here.
"""

import itertools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lib import records
from lib.cli import UserError

PLACES = ["at the top left", "at the top", "at the top right",             # ninths of the picture, row by row
          "on the left", "in the middle", "on the right",
          "at the bottom left", "at the bottom", "at the bottom right"]
ROW, COLUMN = "from left to right", "from top to bottom"
ORDERS = {"left of": ROW, "above": COLUMN}                                 # of each object to the next
RELATIONS = {"left of": ["left of", "to the left of"], "right of": ["right of", "to the right of"],
             "above": ["above", "over"], "below": ["below", "under"]}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = [None, "one shape", "two shapes", "three shapes"]
VERBS = ["there is", "we see"]


@dataclass
class Thing:
    size: str
    colour: str
    shape: str
    x: float = field(metadata=dict(min=0, max=0.9999))
    y: float = field(metadata=dict(min=0, max=0.9999))


@dataclass
class Scene:
    arrangement: Literal[ROW, COLUMN, *PLACES]
    objects: list[Thing]

    def __post_init__(self):
        if not 1 <= len(self.objects) <= 3:
            raise UserError(f"a scene has one to three objects, not {len(self.objects)}")
        if (self.arrangement in PLACES) != (len(self.objects) == 1):
            raise UserError(f"{len(self.objects)} objects are not {self.arrangement}")


def read_scenes(folder: str, count: int) -> list[dict] | None:
    """The scenes of a prepared set of `count` images; None where it has none. Raises UserError for damage."""
    file = Path(folder, "scenes.jsonl")
    try:
        lines = records.read_bytes(file).splitlines()
    except FileNotFoundError:
        return None
    if len(lines) != count:
        raise UserError(f"{file} has {len(lines)} lines for {count} images; prepare the set again")
    return [asdict(records.parse_json(Scene, line, f"{file} line {number}"))
            for number, line in enumerate(lines, 1)]


def place(o: dict) -> str:
    """The ninth of the picture in which an object's centre lies."""
    return PLACES[3 * int(3 * o["y"]) + int(3 * o["x"])]


def relation(a: dict, b: dict) -> str:
    """Where `a` lies as seen from `b`, by the axis on which they are further apart."""
    dx, dy = b["x"] - a["x"], b["y"] - a["y"]
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def true_captions(objects: list[dict]) -> list[str]:
    """Every true sentence that names the objects in this order."""
    things = [f"a {o['size']} {o['colour']} {o['shape']}" for o in objects]
    listed = " and ".join(", ".join(things).rsplit(", ", 1))
    openings = ["", "there is ", "here is ", "the picture shows ", f"{NUMBERS[len(things)]}: "]
    relations = {relation(a, b) for a, b in itertools.pairwise(objects)}
    where = ORDERS.get(relations.pop()) if len(relations) == 1 else None
    if len(things) == 1:
        where = place(objects[0])
    texts = []
    if where:
        texts += [f"{opening}{listed} {where}" for opening in openings]
        texts += [f"{where} {verb} {listed}" for verb in VERBS]
    if len(things) == 2:
        (a, b), forward = things, relation(*objects)
        texts += [f"{opening}{a} {words} {b}" for opening in openings for words in RELATIONS[forward]]
        texts += [f"{words} {a} {verb} {b}" for words in RELATIONS[OPPOSITE[forward]] for verb in VERBS]
    return texts


def judge(caption: str, scene: dict) -> bool:
    """Is the caption right in every word: number, size, colour, shape and position of all objects?"""
    return any(caption in true_captions(objects) for objects in itertools.permutations(scene["objects"]))
