"""The drawn set: true captions, pictures that show what the scenes say, disjoint splits."""

import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_shapes as shapes
from lib.cli import UserError
from lib.scenes import COLUMN, PLACES, ROW, judge
from tokenizer import Tokenizer

ROOT = Path(shapes.__file__).parent
scenes = st.integers(0, 1 << 32).map(lambda seed: shapes.random_scene(random.Random(seed)))


def scene_of(*objects):
    names = ("size", "colour", "shape", "x", "y")
    return {"objects": [dict(zip(names, o)) for o in objects]}


# --------------------------------------------------------------------------------------------------
# the pictures


@given(scenes)
def test_objects_lie_apart_and_inside(scene):
    boxes = [(o["x"], o["y"], shapes.SIZES[o["size"]] / 2) for o in scene["objects"]]
    for x, y, half in boxes:
        assert half < x < 1 - half and half < y < 1 - half
    for (x, y, half), (u, v, other) in itertools.combinations(boxes, 2):
        assert max(abs(x - u), abs(y - v)) > half + other
        assert max(abs(x - u), abs(y - v)) > 5 * min(abs(x - u), abs(y - v))


@settings(deadline=None)
@given(scenes, st.sampled_from([64, 96]))
def test_pictures_show_each_object_where_the_scene_says(scene, size):
    picture = shapes.draw(scene, size, random.Random(0))
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    centres = (np.arange(size) + 0.5) / size
    for o in scene["objects"]:
        cell = np.ones((size, size), bool)                              # holds no other object
        for distance in (centres[:, None] - o["y"], centres - o["x"]):
            cell &= abs(distance) < min(1 / 6, 0.7 * shapes.SIZES[o["size"]])
        assert size < 96 or (cell & (picture == shapes.COLOURS[o["colour"]]).all(-1)).sum() > 4
        found = cell & (abs(picture.astype(int) - picture[0, 0]).max(-1) > 50)
        width = shapes.SIZES[o["size"]]
        for axis, seen in zip("yx", np.nonzero(found)):
            assert abs((centres[seen].min() + centres[seen].max()) / 2 - o[axis]) < 0.1 * width + 2 / size
            extent = np.ptp(centres[seen]) + 1 / size
            assert 0.87 * width - 3 / size < extent < 1.05 * width + 3 / size


def test_shapes_differ_in_pixels():
    def drawn(shape, size):
        return shapes.draw(scene_of((size, "red", shape, 0.5, 0.5)), 64, random.Random(0)).astype(int)
    for size in shapes.SIZES:
        for a, b in itertools.combinations(shapes.SHAPES, 2):
            assert (abs(drawn(a, size) - drawn(b, size)).sum(-1) > 100).sum() > 10, (a, b, size)


# --------------------------------------------------------------------------------------------------
# the set


@pytest.fixture(scope="module")
def full():
    return shapes.draw_scenes(shapes.ShapesConfig())


def test_train_never_shows_what_is_held_out_but_all_its_parts(full):
    shown = {kind for scene in full["train"] for kind in shapes.kinds_of(scene)}
    assert shown == set(shapes.KINDS) - shapes.HELD_OUT
    for kind in shapes.HELD_OUT:
        for pair in itertools.combinations(range(3), 2):
            assert any(all(kind[i] == other[i] for i in pair) for other in shown), (kind, pair)
    for name in ("val", "test"):
        unseen = sum(not shapes.HELD_OUT.isdisjoint(shapes.kinds_of(scene)) for scene in full[name])
        assert 0.3 < unseen / len(full[name]) < 0.8
        assert {k for scene in full[name] for k in shapes.kinds_of(scene)} >= shapes.HELD_OUT


def test_splits_share_no_arrangement(full):
    seen = {name: {(s["arrangement"], *shapes.kinds_of(s)) for s in full[name]} for name in full}
    assert {name: len(full[name]) for name in full} == {"train": 8000, "val": 500, "test": 500}
    for a, b in itertools.combinations(seen, 2):
        assert seen[a].isdisjoint(seen[b])


def test_train_shows_every_arrangement_and_number(full):
    arrangements = Counter(scene["arrangement"] for scene in full["train"])
    assert set(arrangements) == {*PLACES, ROW, COLUMN}
    assert min(Counter(len(s["objects"]) for s in full["train"]).values()) > 1000


def small(out, **changes):
    return shapes.ShapesConfig(out=str(out), **{**dict(train_scenes=40, eval_scenes=10), **changes})


def test_prepare_writes_the_whole_set(tmp_path):
    shapes.prepare(small(tmp_path, image_size=48))
    meta = json.loads((tmp_path / "meta.json").read_text())
    texts = json.loads((tmp_path / "captions.json").read_text())
    drawn = [json.loads(line) for line in (tmp_path / "scenes.jsonl").read_text().splitlines()]
    tokens, index = np.fromfile(tmp_path / "tokens.bin", np.uint16), np.load(tmp_path / "index.npz")
    tokenizer = Tokenizer.load(tmp_path)
    assert (tmp_path / "images.bin").stat().st_size == 60 * 48 * 48 * 3
    assert meta["splits"] == {"train": [*range(40)], "val": [*range(40, 50)], "test": [*range(50, 60)]}
    assert meta["preprocessing"]["image_size"] == 48
    assert len(meta["images"]) == len(set(meta["images"])) == len(drawn) == 60
    assert Counter(index["image"].tolist()) == dict.fromkeys(range(60), 5)
    for i, (image, text) in enumerate(zip(index["image"], texts)):
        assert judge(text, drawn[image])
        assert tokenizer.decode(tokens[index["offset"][i] : index["offset"][i + 1]].tolist()) == text
    assert all(len(set(texts[i : i + 5])) == 5 for i in range(0, 300, 5))


def test_prepare_is_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shapes.prepare(small(tmp_path / name, seed=seed))
    for file in ("images.bin", "tokens.bin", "scenes.jsonl", "captions.json", "index.npz", "meta.json"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b, file
        assert a != c or file == "meta.json", file


def test_prepare_refuses_sizes_that_cannot_be(tmp_path):
    for changes in (dict(train_scenes=0), dict(eval_scenes=0), dict(image_size=16)):
        with pytest.raises(UserError, match=next(iter(changes))):
            shapes.prepare(small(tmp_path / "set", **changes))
    assert not (tmp_path / "set").exists()


def test_prepare_never_replaces_files_that_are_not_of_a_set(tmp_path):
    (tmp_path / "scenes.jsonl").write_text("my work")
    with pytest.raises(UserError, match="holds a file scenes.jsonl"):
        shapes.prepare(small(tmp_path))
    assert (tmp_path / "scenes.jsonl").read_text() == "my work" and len(list(tmp_path.iterdir())) == 1


def test_script_prints_a_summary(tmp_path):
    flags = ["--out", tmp_path / "set", "--train-scenes=20", "--eval-scenes=5"]
    done = subprocess.run([sys.executable, ROOT / "prepare_shapes.py", *flags], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "20 train, 5 val and 5 test scenes" in done.stdout and not done.stderr
