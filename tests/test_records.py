"""The typed reader of JSON: what it takes, what it refuses and in which words."""

import json
import os
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.cli import UserError
from lib.records import convert, parse_json, read_bytes, read_json
from model import VisionGPTConfig


@dataclass
class Inner:
    name: str
    odd: int = 1

    def __post_init__(self):
        if self.odd % 2 == 0:
            raise UserError(f"odd is {self.odd}")


@dataclass
class Outer:
    count: int = field(metadata=dict(min=1, max=10))
    rate: float = field(metadata=dict(min=0))
    on: bool
    pair: tuple[float, float]
    whole: tuple[int, int, int]
    texts: list[str]
    table: dict[str, list[int]]
    mode: Literal["a", "b"] | None
    inner: Inner
    later: int = field(default=7, metadata=dict(optional=True))


GOOD = dict(count=1, rate=2, on=True, pair=[0, 1.5], whole=[1, 2, 3], texts=["x", "\ud800"],
            table={"k": [1, 2]}, mode=None, inner=dict(name="n", odd=3))


def test_whole_object_is_read():
    read = parse_json(Outer, json.dumps(GOOD), "f")
    assert read == Outer(1, 2.0, True, (0.0, 1.5), (1, 2, 3), ["x", "\ud800"], {"k": [1, 2]}, None,
                         Inner("n", 3), 7)
    assert type(read.rate) is type(read.pair[0]) is float


@pytest.mark.parametrize("change, message", [
    (dict(count="x"), "f.json: count is 'x', but must be a whole number from 1 to 10"),
    (dict(count=0), "f.json: count is 0, but must be a whole number from 1 to 10"),
    (dict(count=True), "f.json: count is True, but must be a whole number from 1 to 10"),
    (dict(count=1.0), "f.json: count is 1.0, but must be a whole number from 1 to 10"),
    (dict(rate=-1), "f.json: rate is -1, but must be a finite number of at least 0"),
    (dict(rate=float("nan")), "f.json: rate is nan, but must be a finite number of at least 0"),
    (dict(rate=float("inf")), "f.json: rate is inf, but must be a finite number of at least 0"),
    (dict(rate=10**400), f"f.json: rate is 1{59 * '0'}, but must be a finite number of at least 0"),
    (dict(on=1), "f.json: on is 1, but must be true or false"),
    (dict(pair=[1]), "f.json: pair is a list of 1, but must be a list of 2"),
    (dict(whole=[3]), "f.json: whole is a list of 1, but must be a list of 3"),
    (dict(whole=[]), "f.json: whole is a list of 0, but must be a list of 3"),
    (dict(texts=["a", None]), "f.json: texts.1 is null, but must be text"),
    (dict(texts={}), "f.json: texts is an object, but must be a list"),
    (dict(table={"k": [2**63]}), "f.json: table.k is 9223372036854775808, but must be a whole number"),
    (dict(mode="c"), "f.json: mode is 'c', but must be one of 'a', 'b'"),
    (dict(inner=dict(name="n", odd=2)), "f.json: inner: odd is 2"),
    (dict(inner=dict(odd=3)), "f.json: inner lacks the field 'name'"),
    (dict(inner=dict(name="n")), "f.json: inner lacks the field 'odd'"),
    (dict(text="x"), "f.json has the unknown field 'text' (did you mean texts?)"),
])
def test_refusal_names_file_and_field(change, message):
    with pytest.raises(UserError) as error:
        convert(Outer, GOOD | change, "f.json")
    assert str(error.value) == message


def test_foreign_objects_may_say_more_and_less():
    assert convert(Inner, dict(name="n", more=1), "f", foreign=True) == Inner("n", 1)
    with pytest.raises(UserError, match="lacks the field 'name'"):
        convert(Inner, dict(odd=1), "f", foreign=True)


@pytest.mark.parametrize("text, reason", [
    ("[" * 100_000, "it is nested too deeply"), ('{"a":' * 100_000, "it is nested too deeply"),
    ('{"name": "a", "name": "b"}', "an object has a field twice"), ("", "Expecting value"),
    ("1" * 5000, "4300 digits"), (b"\xff", "'utf-8' codec"), ('{"name": "a"', "delimiter")])
def test_broken_json_is_one_line(text, reason):
    with pytest.raises(UserError) as error:
        parse_json(Inner, text, "f")
    assert str(error.value).startswith("f is damaged: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    (tmp_path / "big").write_bytes(b" " * 1000 + b"1")
    assert read_json(int, tmp_path / "big") == 1
    with pytest.raises(UserError, match="has 1,001 bytes; more than 1,000 are not read"):
        read_json(int, tmp_path / "big", largest=1000)
    os.mkfifo(tmp_path / "pipe")
    for file in tmp_path / "pipe", "/dev/zero", tmp_path, "\0", "\ud800":
        with pytest.raises(UserError):
            read_bytes(file)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(deadline=None)
@given(JSON, st.sampled_from([*GOOD, None]), st.booleans())
def test_json_of_any_shape_is_read_or_refused(value, at, foreign):
    for kind in Outer, VisionGPTConfig, dict[str, Inner], list[int | str]:
        try:
            read = convert(kind, value if at is None else GOOD | {at: value}, "f", foreign=foreign)
            assert isinstance(read, kind if isinstance(kind, type) else kind.__origin__)
        except UserError as error:
            assert str(error).startswith("f")
