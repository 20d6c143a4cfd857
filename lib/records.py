"""JSON from anywhere -> values of the types a dataclass states, or one sentence that names file and field."""

import contextlib
import dataclasses
import functools
import json
import os
import stat
import sys
import types
import typing

from lib.cli import UserError, nearest

LARGEST = 256 * 2**20              # bytes of a JSON file, unless its reader knows better
WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false",
         type(None): "null", list: "a list", tuple: "a list", dict: "an object"}
type_hints = functools.cache(typing.get_type_hints)


def read_bytes(file, largest=LARGEST):
    """The content of a regular file, not of a pipe or device. Raises UserError, or FileNotFoundError."""
    try:
        with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as opened:
            facts = os.fstat(opened.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise UserError(f"{file} is a folder, a pipe or a device, not a file")
            if facts.st_size > largest:
                raise UserError(f"{file} has {facts.st_size:,} bytes; more than {largest:,} are not read")
            return opened.read(largest)
    except (FileNotFoundError, UserError):
        raise
    except (OSError, ValueError) as error:                           # ValueError: it is no name of a file
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', error)}") from None


def read_json(kind, file, largest=LARGEST, foreign=False):
    """A JSON file as a value of `kind`. Raises what `read_bytes` and `convert` do."""
    return parse_json(kind, read_bytes(file, largest), file, foreign)


def parse_json(kind, text, source, foreign=False):
    """JSON, text or UTF-8 bytes, as a value of `kind`; `source` names it in errors."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise UserError(f"{source} is damaged: it is nested too deeply") from None
    except ValueError as error:                                      # the rest of it is advice to programmers
        raise UserError(f"{source} is damaged: {str(error).partition(';')[0]}") from None
    return convert(kind, value, source, foreign=foreign)


def _unique(pairs):
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError("an object has a field twice")
    return content


def convert(kind, value, source, path=(), limits=types.MappingProxyType({}), foreign=False):
    """`value`, as json.loads or torch.load gives it, as a value of `kind`: a dataclass, scalar or container.

    A field's metadata may hold `min` and `max` of the numbers in it, `choices`, and `optional`: it may be
    missing. Of a `foreign` object, which another program wrote, unknown fields are ignored and defaults
    replace missing ones. Raises UserError that names source and path of the first thing that does not fit.
    """
    def inner(kind, value, *step):
        return convert(kind, value, source, path + step, limits, foreign)

    origin, members = typing.get_origin(kind) or kind, typing.get_args(kind)
    wanted = WORDS.get(origin, "an object")
    if origin in (typing.Union, types.UnionType):
        members = [m for m in members if (m is type(None)) == (value is None)] or members
        for member in members[:-1]:                                  # of the last one the error is shown
            with contextlib.suppress(UserError):
                return inner(member, value)
        return inner(members[-1], value)
    if origin is typing.Literal:
        if value in [member for member in members if type(member) is type(value)]:
            return value
        wanted = f"one of {', '.join(map(repr, members))}"
    elif dataclasses.is_dataclass(kind):
        if type(value) is dict:
            return build(kind, value, source, path, foreign)
    elif members and origin is dict:
        if type(value) is dict:
            return {inner(members[0], key, key): inner(members[1], held, key) for key, held in value.items()}
    elif members and type(value) in (list, tuple):
        kinds = members if origin is tuple and members[-1] is not ... else members[:1] * len(value)
        if len(kinds) == len(value):
            if value and {*kinds, *map(type, value)} in ({str}, {int}):       # of a million, these two
                for end in (min(value), max(value)):
                    inner(kinds[0], end)
                return origin(value)
            return origin(inner(k, v, i) for i, (k, v) in enumerate(zip(kinds, value)))
        wanted = f"a list of {len(kinds)}"
    elif kind in (int, float):
        low, high = limits.get("min"), limits.get("max")
        largest = 2**63 - 1 if kind is int else sys.float_info.max
        least, most = -largest if low is None else low, largest if high is None else high
        if type(value) in (int, kind) and least <= value <= most:
            return kind(value)
        if low is not None:
            wanted += f" of at least {low}" if high is None else f" from {low} to {high}"
    elif isinstance(value, origin):
        if not limits.get("choices") or value in limits["choices"]:
            return value
        wanted = f"one of {', '.join(map(repr, limits['choices']))}"
    shown = repr(value) if isinstance(value, (str, int, float)) else WORDS.get(type(value), "an object")
    shown += f" of {len(value)}" if isinstance(value, list) else ""
    raise UserError(f"{place(source, path)} is {shown[:60]}, but must be {wanted}")


def build(kind, content, source, path, foreign):
    """An object's fields as the dataclass `kind`, whose own checks are made too."""
    fields, hints = {field.name: field for field in dataclasses.fields(kind)}, type_hints(kind)
    unknown = next((key for key in content if key not in fields), None)
    if unknown is not None and not foreign:
        unknown = str(unknown)[:60]
        raise UserError(f"{place(source, path)} has the unknown field {unknown!r}{nearest(unknown, fields)}")
    for field in fields.values():
        has_default = field.default is not field.default_factory     # both are MISSING without one
        if field.name not in content and not (has_default and (foreign or field.metadata.get("optional"))):
            raise UserError(f"{place(source, path)} lacks the field {field.name!r}")
    values = {key: convert(hints[key], content[key], source, (*path, key), field.metadata, foreign)
              for key, field in fields.items() if key in content}
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{place(source, path)}: {error}") from None


def place(source, path):
    return f"{source}: {'.'.join(map(str, path))[-200:]}" if path else str(source)
