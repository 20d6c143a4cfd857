"""things.py adds stamps that have a short caption, and crops of pictures without people, to training."""

import importlib.util

import numpy as np
import pytest
from PIL import Image
from test_data import make_set

from data import CaptionSet
from lib.checkpoint import ROOT
from lib.cli import UserError

spec = importlib.util.spec_from_file_location("things", ROOT / "assets/mini/things.py")
things = importlib.util.module_from_spec(spec)
spec.loader.exec_module(things)


@pytest.fixture
def folder(tmp_path):
    """Two stamps, red in a transparent margin, and three texts that belong to none."""
    texts = {"food/cup": "A cup of tea.\nde.utf8=Eine Tasse Tee.", "space/moon": "The Moon! Ours.",
             "symbols/a": "A letter.", "food/cheese": "Say cheese!", "food/gone": "An apple."}
    for name, text in texts.items():
        file = tmp_path / "stamps" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        if name != "food/gone":
            picture = Image.new("RGBA", (40, 40))
            picture.paste((255, 0, 0, 255), (10, 10, 30, 25))
            picture.save(file.with_suffix(".png"))
    return tmp_path / "stamps"


def test_stamps_with_short_captions_are_read_without_their_margins(folder):
    found = things.read_stamps(str(folder))
    assert {name: text for name, (_, text) in found.items()} == {"food-cup": "A cup of tea.",
                                                                 "space-moon": "The Moon."}
    assert all(picture.size == (20, 15) for picture, _ in found.values())
    with pytest.raises(UserError, match="holds no stamps"):
        things.read_stamps(str(folder / "food/symbols"))


@pytest.mark.parametrize("text, empty", [
    ("A boat on the water .", True), ("The other car is in a river .", True), ("A man sits .", False),
    ("Mountains", True), ("Behind him .", False), ("Two surfers", False), ("Her hat", False),
    ("A terrier is wet .", False), ("The women", False)])
def test_people_and_dogs_are_told_from_things(text, empty):
    assert empty == (things.PEOPLE_OR_DOGS.search(text) is None)


def test_the_new_set_is_the_old_one_with_things_in_training(folder, tmp_path):
    make_set(tmp_path / "old", size=64, longest=3)
    old = CaptionSet(tmp_path / "old")
    others = {i: [text for text in old.references(i) if "dog" not in text and "man" not in text.split()]
              for i in old.split("train")}
    others = {i: texts for i, texts in others.items() if len(texts) >= 3}
    cfg = things.ThingsConfig(old.folder, str(folder), str(tmp_path / "new"), copies=3, crops=2)
    assert things.add_things(cfg) == (2, len(others)) and others
    new, N = CaptionSet(cfg.out), len(old.names)
    assert (new.images[:N] == old.images).all() and new.captions[: len(old.captions)] == old.captions
    said = [new.references(i) for i in range(N, len(new.names))]
    assert said == [["A cup of tea."]] * 30 + [["The Moon."]] * 30 + [*others.values()] * 2
    assert new.splits["train"].tolist() == [*old.splits["train"], *range(N, N + len(said))]
    assert all((new.splits[name] == old.splits[name]).all() for name in ("val", "test"))
    pasted = new.images[N : N + 36]
    red = ((pasted[..., 0] > 120) & (pasted[..., 1:] == 0).all(-1)).mean((1, 2))
    assert (red > 0.05).all() and len(np.unique(red)) > 3
