"""The drawings: everything fits, nothing is lost, colours are where they should be."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib import figures
from lib.cli import UserError
from lib.figures import attention_sheet, contact_sheet, font, loss_curve, round_ticks, wrap

RED, GREEN = (255, 0, 0), (0, 255, 0)


def count(image, colour):
    """Pixels of (about) this colour."""
    return int((np.abs(np.asarray(image).astype(int) - colour).max(-1) < 12).sum())


@given(st.text(alphabet="abcm .W-", max_size=60), st.integers(30, 200))
def test_wrap_fits_and_keeps_every_sign(text, width):
    lines = wrap(text, font(15), width)
    assert all(font(15).getlength(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_wrap_keeps_line_breaks_and_words_whole():
    assert wrap("a dog\ntwo dogs", font(15), 500) == ["a dog", "two dogs"]
    assert wrap("aaaa bbbb", font(15), font(15).getlength("aaaa b")) == ["aaaa", "bbbb"]


def test_contact_sheet_places_pictures_and_makes_room_for_text():
    pictures = [Image.new("RGB", (100, 50), RED), Image.new("L", (40, 80)), Image.new("RGB", (7, 7), GREEN)]
    short = contact_sheet(pictures, ["a", "b", "c"], columns=2, tile=60)
    long = contact_sheet(pictures, ["a", "b " * 60, "c"], columns=2, tile=60)
    assert count(short, RED) == 60 * 30 and count(short, GREEN) == 60 * 60
    assert long.width == short.width and long.height > short.height
    assert contact_sheet(pictures[:1], ["a"]).width < contact_sheet(pictures, ["a"] * 3).width


@pytest.mark.parametrize("text", ["", "über die Straße – “ok”", "犬が走る 🐕 \ufffd\x1a"])
def test_contact_sheet_draws_any_text(text):
    contact_sheet([Image.new("RGB", (10, 10))], [text])


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(5, 10))
def test_round_ticks_hold_the_range_and_are_few_and_even(low, width, most):
    ticks = round_ticks(low, low + width, most)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + step * 1e-6 and ticks[-1] >= low + width - step * 1e-6
    assert 2 <= len(ticks) <= most + 1
    assert np.allclose(np.diff(ticks), step)
    leading = step / 10 ** math.floor(math.log10(step) + 1e-3)
    assert min(abs(leading - n) for n in (1, 2, 5)) < 1e-2


def test_loss_curve_draws_each_curve_where_its_numbers_are():
    plot = loss_curve({"high": [(0, 9), (100, 9)], "low": [(0, 3), (100, 3)], "all": [(50, 0), (50, 12)]})
    upper, lower = plot.crop((90, 70, 900, 270)), plot.crop((90, 270, 900, 470))      # 6 is in the middle
    assert [count(part, figures.LINES[0]) > 400 for part in (upper, lower)] == [True, False]
    assert [count(part, figures.LINES[1]) > 400 for part in (upper, lower)] == [False, True]


def test_loss_curve_draws_none_one_and_gaps():
    empty, one = loss_curve({}), loss_curve({"train": [(10, 5.2)], "val": []})
    gap = loss_curve({"train": [(0, 3.0), (10, 2.2), (20, math.nan), (30, 2.2), (40, 2.0)]})
    whole = loss_curve({"train": [(0, 3.0), (10, 2.2), (20, 2.2), (30, 2.2), (40, 2.0)]})
    assert empty.size == one.size
    inside = (60, 50, 940, 490)                      # without the legend
    assert [count(i.crop(inside), figures.LINES[0]) > 0 for i in (empty, one)] == [False, True]
    assert 0 < count(gap.crop(inside), figures.LINES[0]) < count(whole.crop(inside), figures.LINES[0])


def test_attention_sheet_is_brightest_where_the_map_is_largest():
    weights = np.zeros((2, 4, 4))
    weights[0, 0, 3], weights[1] = 1, 1 / 16
    sheet = attention_sheet(Image.new("RGB", (80, 40), (90, 90, 90)), ["dog", "runs"], weights, tile=80)
    tile = np.asarray(sheet).astype(int).sum(-1)[14 : 14 + 40, 14 + 94 : 14 + 94 + 80]
    assert tile[:10, 70:].min() > tile[20:, :40].max()
    even = np.asarray(sheet).astype(int)[14 : 14 + 40, 14 + 188 : 14 + 188 + 80]
    assert even.std((0, 1)).max() == 0               # the same weight everywhere, the same colour


def test_stack_keeps_every_sheet():
    both = figures.stack([Image.new("RGB", (10, 5), RED), Image.new("RGB", (20, 7), GREEN)])
    assert both.size == (20, 12) and count(both, RED) == 50 and count(both, GREEN) == 140


def test_save_writes_the_format_of_the_name_and_refuses_others(tmp_path):
    figures.save(Image.new("RGB", (4, 4), RED), tmp_path / "a.JPG")
    assert Image.open(tmp_path / "a.JPG").format == "JPEG"
    with pytest.raises(UserError, match="a.png"):
        figures.save(Image.new("RGB", (4, 4)), tmp_path / "a.docx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.JPG"]
