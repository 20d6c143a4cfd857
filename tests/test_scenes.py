"""The sentences about a drawn scene: what is true of it, and that the judge takes nothing else."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_shapes as shapes
from lib.cli import UserError
from lib.scenes import COLUMN, PLACES, ROW, judge, read_scenes, true_captions

scenes = st.integers(0, 1 << 32).map(lambda seed: shapes.random_scene(random.Random(seed)))
GROUPS = [list(shapes.SIZES), list(shapes.COLOURS), list(shapes.SHAPES), ["one", "two", "three"],
          ["left", "right", "top", "bottom", "middle", "above", "below", "over", "under"]]
WORDS = [*itertools.chain(*GROUPS), "a", "and", "of", "to", "from", "there", "shapes", "shape:", "not"]


def scene_of(*objects):
    names = ("size", "colour", "shape", "x", "y")
    return {"objects": [dict(zip(names, o)) for o in objects]}


def captions(scene):
    return true_captions(scene["objects"])


@given(scenes)
def test_captions_state_the_arrangement_that_was_drawn(scene):
    """random_scene knows it from the grid, true_captions from the centres."""
    texts, number = captions(scene), len(scene["objects"])
    assert len(set(texts)) == len(texts) == {1: 7, 2: 21, 3: 7}[number]
    assert sum(scene["arrangement"] in text for text in texts) == 7
    assert scene["arrangement"] in ([ROW, COLUMN] if number > 1 else PLACES)
    others = [[scene["objects"][i] for i in order] for order in itertools.permutations(range(number))][1:]
    assert all(not true_captions(objects) for objects in others) or number == 2


def test_captions_of_two_objects_are_these():
    star, circle = ("large", "red", "star", 0.2, 0.5), ("small", "blue", "circle", 0.8, 0.6)
    both = "a large red star and a small blue circle from left to right"
    texts = captions(scene_of(star, circle))
    assert set(texts[:5]) == {both, f"there is {both}", f"here is {both}", f"the picture shows {both}",
                              f"two shapes: {both}"}
    assert "here is a large red star to the left of a small blue circle" in texts
    assert "to the right of a large red star we see a small blue circle" in texts
    assert captions(scene_of(circle, star)) == [
        f"{opening}a small blue circle {words} a large red star"
        for opening in ("", "there is ", "here is ", "the picture shows ", "two shapes: ")
        for words in ("right of", "to the right of")] + [
        f"{words} a small blue circle {verb} a large red star"
        for words in ("left of", "to the left of") for verb in ("there is", "we see")]


@pytest.mark.parametrize("x, y, place", [(0.1, 0.1, "at the top left"), (0.5, 0.5, "in the middle"),
                                         (0.9, 0.4, "on the right"), (0.4, 0.9, "at the bottom")])
def test_captions_of_one_object_name_its_place(x, y, place):
    texts = captions(scene_of(("small", "red", "star", x, y)))
    assert texts[0] == f"a small red star {place}" and f"{place} we see a small red star" in texts


@settings(deadline=None, max_examples=50)
@given(scenes, st.data())
def test_judge_rejects_any_one_word_changed_missing_or_extra(scene, data):
    words = data.draw(st.sampled_from(captions(scene))).split(" ")
    true = set(captions(scene))
    for i, word in enumerate(words):
        without = " ".join(words[:i] + words[i + 1 :])
        assert judge(without, scene) == (without in true), without
        assert not judge(" ".join(words[: i + 1] + words[i:]), scene)
        bare = word.rstrip(",:")
        for group in GROUPS:
            for other in set(group) - {bare} if bare in group else ():
                changed = " ".join([*words[:i], other + word[len(bare) :], *words[i + 1 :]])
                assert judge(changed, scene) == (changed in true), changed        # above, over


@settings(deadline=None)
@given(scenes, st.data())
def test_judge_accepts_only_the_grammar(scene, data):
    """Inserting words of the grammar gives a wrong caption or one of the scene's other wordings."""
    words = data.draw(st.sampled_from(captions(scene))).split(" ")
    for _ in range(data.draw(st.integers(1, 2))):
        words.insert(data.draw(st.integers(0, len(words))), data.draw(st.sampled_from(WORDS)))
    assert not judge(" ".join(words), scene) or " ".join(words) in captions(scene)


@given(scenes, scenes)
def test_judge_rejects_captions_of_other_scenes(scene, other):
    same = shapes.kinds_of(scene) == shapes.kinds_of(other) and scene["arrangement"] == other["arrangement"]
    assert judge(captions(other)[0], scene) == same


def test_judge_knows_relations_from_positions():
    scene = scene_of(("large", "red", "star", 0.2, 0.5), ("small", "blue", "circle", 0.8, 0.6))
    star, circle = "a large red star", "a small blue circle"
    for text in (f"{star} left of {circle}", f"{circle} right of {star}",
                 f"right of {star} there is {circle}", f"left of {circle} we see {star}",
                 f"two shapes: {star} and {circle} from left to right"):
        assert judge(text, scene), text
    for text in (f"{circle} left of {star}", f"{star} right of {circle}", f"{star} above {circle}",
                 f"{circle} below {star}", f"{circle} and {star} from left to right",
                 f"{star} and {circle} from top to bottom",
                 f"{star} and {circle}", f"{star}", f"{star} on the left",
                 f"three shapes: {star} left of {circle}", f"{star} left of {circle} ",
                 f"{star}  left of {circle}", f"# left of {circle}", "# left of #", ""):
        assert not judge(text, scene), text


def test_judge_takes_objects_that_look_the_same():
    scene = scene_of(*(("small", "red", "star", 0.5, y) for y in (0.8, 0.5, 0.2)))
    star = "a small red star"
    assert judge(f"{star}, {star} and {star} from top to bottom", scene)
    assert not judge(f"{star}, {star} and {star} from left to right", scene)
    assert not judge(f"{star} and {star} from top to bottom", scene)


SCALARS = st.none() | st.integers() | st.floats() | st.text(max_size=3)
OBJECT = st.dictionaries(st.sampled_from(["size", "colour", "shape", "x", "y"]), SCALARS)
LINE = st.fixed_dictionaries({"arrangement": st.sampled_from([ROW, "", 3]),
                              "objects": st.lists(OBJECT, max_size=4)})


@settings(deadline=None)
@given(LINE | SCALARS | st.lists(SCALARS))
def test_read_scenes_gives_scenes_that_can_be_judged_or_one_line(tmp_path_factory, line):
    file = tmp_path_factory.getbasetemp() / "scenes.jsonl"
    good = shapes.random_scene(random.Random(0))
    file.write_text(json.dumps(good) + "\n" + json.dumps(line))
    try:
        scenes = read_scenes(file.parent, 2)
    except UserError as error:
        assert "scenes.jsonl line 2" in str(error)
    else:
        assert scenes == [good, line] and not judge("a dog", scenes[1])


def test_read_scenes_counts_the_lines(tmp_path):
    (tmp_path / "scenes.jsonl").write_text(json.dumps(shapes.random_scene(random.Random(0))) + "\n")
    with pytest.raises(UserError, match="1 lines for 2 images"):
        read_scenes(tmp_path, 2)
