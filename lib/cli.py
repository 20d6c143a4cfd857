"""What the scripts share: flags from a dataclass, user errors, progress, output files, device and dtype."""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import errno
import gc
import math
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO


class UserError(ValueError):
    """Something the caller can fix: one readable sentence that says what is wrong and what to do."""


FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO     # errors of a disk, which name no file


def printable(text: str) -> str:
    """Text from outside on one line: line breaks, control characters and bytes that are not UTF-8 escaped."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]",
                  lambda sign: sign[0].encode("unicode_escape").decode(), text)


def flag(default, help: str, **settings):
    """A dataclass field that is also a command-line flag; a callable default is called for each instance.

    settings: `choices`, `metavar`, `positional`, `const` (what the flag means without a value), and `min` and
    `max`, which `check_ranges` looks at.
    """
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata={"help": help, **settings})


def check_ranges(config, limits: Callable = lambda f: (f.metadata.get("min"), f.metadata.get("max"))) -> None:
    """Raise UserError for a field of a dataclass that is outside its limits, by default of its metadata."""
    for field in dataclasses.fields(config):
        value, (low, high) = getattr(config, field.name), limits(field)
        if value is None or low is None and high is None:
            continue
        least, most = -math.inf if low is None else low, math.inf if high is None else high
        if not least <= value <= most:                               # NaN is refused too
            must = f"at least {low:.12g}" if high is None else f"from {low:.12g} to {high:.12g}"
            raise UserError(f"{field.name} is {value}, but must be {must}")


def check_sizes(config) -> None:
    """`check_ranges` for a model config: sizes to a million, layers to 1,000, shares to 1."""
    def limits(field):
        if type(field.default) is int:
            return min(1, field.default), 1000 if field.name == "n_layer" else 10**6
        return (0, 1) if type(field.default) is float else (None, None)

    check_ranges(config, limits)


class Parser(argparse.ArgumentParser):
    """argparse that takes --a_b for --a-b, never abbreviates, and names the nearest valid flag or value."""

    def parse_args(self, args=None):
        args = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), arg)
                for arg in (sys.argv[1:] if args is None else args)]
        known, unknown = self.parse_known_intermixed_args(args)      # positionals may stand between flags
        if unknown:
            name = unknown[0].split("=")[0]
            self.error(f"unknown argument {name}{nearest(name, self._option_string_actions)}; see --help")
        return known

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(action.choices) + nearest(value, action.choices)
            raise argparse.ArgumentError(action, f"{value!r} is not one of {choices}")

    def error(self, message):
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def nearest(word, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest known word, or nothing."""
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


def parse(config_class, description: str, args: list[str] | None = None) -> dict:
    """Read the command line into a dict of the fields of `config_class` that were given, and no others."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if "help" not in field.metadata:
            continue
        meta, kind, option = field.metadata, types[field.name], "--" + field.name.replace("_", "-")
        kind, is_list = (typing.get_args(kind) or [kind])[0], typing.get_origin(kind) is list
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        text = meta["help"] if default in (None, "", []) else f"{meta['help']} [{default}]"
        settings = dict(help=text.replace("%", "%%"), metavar=meta.get("metavar"))
        if meta.get("positional"):
            parser.add_argument(field.name, nargs="*", **settings)
        elif kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=settings["help"])
        elif "const" in meta:
            parser.add_argument(option, type=kind, nargs="?", const=meta["const"], **settings)
        else:
            more = dict(nargs="+", action="extend") if is_list else dict(choices=meta.get("choices"))
            parser.add_argument(option, type=kind, **more, **settings)
    return vars(parser.parse_args(args))


def run(main: Callable[[], int | None]) -> None:
    """Call `main()` and exit with its status; what the user can fix is one line on stderr and status 1."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:           # closed by the caller
            setattr(sys, name, open(os.devnull, mode))                                     # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")        # a character the console lacks is not fatal
    gc.freeze()                                              # what is imported stays; see lib/startup.py
    gc.enable()
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(130)                            # without waiting for threads that read
    except BrokenPipeError:                      # whoever read our stdout is gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        message = str(error)
    except OSError as error:                     # no such file, no permission, disk full; else a bug
        if error.filename is None and error.errno not in FULL:
            raise
        message = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(1)


@contextlib.contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Turn running out of memory, a GPU's or the machine's, into a UserError that gives `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        signs = "out of memory|can't allocate memory|ALLOC_FAILED"
        if isinstance(error, MemoryError) or re.search(signs, str(error)):
            raise UserError(f"out of memory: {advice}") from None
        raise


def progress(items: Iterable, label: str, total: int | None = None, unit: str = "") -> Iterator:
    """Yield from `items`; once two seconds have passed, show count and time left on stderr."""
    total = len(items) if total is None else total
    start = last = time.monotonic()
    shown, live = False, sys.stderr.isatty()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - start > 2 and now - last > (0.2 if live else 10):
            left = (total - done) * (now - start) / done
            before, after = ("\r", " ") if live else ("", "\n")
            print(f"{before}{label} {done}/{total}{unit}, {clock(left)} left", end=after,
                  file=sys.stderr, flush=True)
            last, shown = now, True
        yield item
    if shown and live:
        print(f"\r{label} {total}/{total}{unit}, took {clock(time.monotonic() - start)}   ", file=sys.stderr)


def load_ahead(make: Callable, items: Iterable, threads: int = 1, ahead: int = 1) -> Iterator:
    """Yield make(item) for each item in turn, made by threads at most `ahead` of the caller."""
    pool, waiting = concurrent.futures.ThreadPoolExecutor(threads), collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def clock(seconds: float) -> str:
    """Seconds as a person reads them: 42 s, 3:07 min, 1:02 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes = seconds // 60
    return f"{minutes}:{seconds % 60:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


def relative(path: str | Path, start: str | Path = os.curdir) -> str:
    """`path` as seen from `start`, with forward slashes; absolute where Windows has it on another drive."""
    try:
        path = os.path.relpath(path, start)
    except ValueError:
        path = os.path.abspath(path)
    return Path(path).as_posix()


@contextlib.contextmanager
def naming(path) -> Iterator[None]:
    """Raise the error of a full disk with the name of the file that is written within it."""
    try:
        yield
    except (OSError, RuntimeError) as error:     # torch.save raises a RuntimeError after the disk's own error
        for cause in (error, error.__context__):
            if isinstance(cause, OSError) and cause.errno in FULL:
                cause.filename = str(path)
                raise cause from None
        raise


@contextlib.contextmanager
def atomic(path) -> Iterator[str]:
    """Yield a temporary path beside `path`; rename it there if the block ends well, else remove it."""
    path = os.path.realpath(path)                # a link stays one
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is a folder or a device and would be replaced: name another file")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def write_text(path: str | Path, text: str, end: str = "\n") -> None:
    """Write a file whole or not at all; "-" is stdout."""
    if path == "-":
        print(text)
        return
    with atomic(path) as temporary:
        Path(temporary).write_text(text + end, encoding="utf-8", errors="backslashreplace")


def check_outputs(config, *texts: str, pictures: Iterable[str] = (), inputs: Iterable = ()) -> None:
    """Check before any work the files that these fields of `config` name for texts and for pictures.

    Raises UserError if one cannot be written, is named twice or an input, or a text would replace a picture.
    """
    inputs, taken = list(inputs), {}
    for name in [*texts, *pictures]:
        file, option = getattr(config, name), "--" + name.replace("_", "-")
        if file in (None, "-"):
            continue
        is_file = os.path.isfile(file) if os.path.exists(file) else os.path.basename(file) != ""
        if not is_file or not os.access(os.path.dirname(file) or ".", os.W_OK):
            raise UserError(f"{option} {file} cannot be written: name a file in an existing folder")
        if (other := taken.setdefault(os.path.realpath(file), option)) != option:
            raise UserError(f"{other} and {option} both write {file}: name two files")
        if not os.path.exists(file):
            continue
        if clash := next((i for i in inputs if os.path.exists(i) and os.path.samefile(i, file)), None):
            raise UserError(f"{option} {file} would overwrite {clash}, which is read: name another file")
        with open(file, "rb") as held:
            if name in texts and b"\0" in held.read(4096):
                raise UserError(f"{option} {file} would overwrite a picture or another binary file: "
                                f"name another file, and the pictures before {option}")


@contextlib.contextmanager
def claim_folder(out: str, names: Iterable[str], mark: str, of: str, ours: bool) -> Iterator[list[str]]:
    """Make `out` a folder that this process alone writes `names` into; gives those of them that are there.

    Raises UserError when another process holds it, or when there are such files that are not `ours`: a file
    `mark` says so too, of an earlier run. `of` tells in the error what they should belong to.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is not a folder: name another with --out")
    os.makedirs(out, exist_ok=True)
    held, mark = [n for n in names if os.path.lexists(os.path.join(out, n))], os.path.join(out, mark)
    if held and not (ours or os.path.exists(mark)):
        raise UserError(f"{out} holds a file {held[0]} that would be replaced but does not belong to "
                        f"{of}: move it away, or name another folder with --out")
    with open(mark, "w") as file:
        lock(file, f"another run is writing {out}: wait for it, or name another folder with --out")
        for rest in (rest for name in names for rest in Path(out).glob(f"{name}.[0-9]*.tmp")):
            rest.unlink()                        # of a run that was killed while it was writing
        yield held


def lock(file: IO, refusal: str) -> None:
    """Hold an open file for this process alone until closed. Raises UserError(refusal) if another does."""
    try:
        import fcntl
    except ImportError:                          # Windows has no flock
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(refusal) from None


DTYPES = ["auto", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]
DEVICES = ["auto", "cpu", "cuda", "mps"]


def pick_device(name="auto"):
    """The torch device of a name; 'auto' is the GPU if there is one. Raises UserError if it is not there."""
    import torch
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if has[d])
    if not has.get(str(name).split(":")[0]):
        raise UserError(f"device {name!r} is not available here; use --device cpu or auto")
    return torch.device(name)


def pick_dtype(name: str, device=None, int8: bool = False):
    """The torch dtype of a name, long or short (bf16); int8 weights go with bfloat16.

    'auto' is float32, but on a CUDA GPU bfloat16, or float16 where that is not built in.
    """
    import torch
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "auto": torch.float32}
    if device is not None and device.type == "cuda":
        built_in = torch.cuda.is_bf16_supported(including_emulation=False)
        names["auto"] = torch.bfloat16 if built_in else torch.float16
    dtype = names[name] if name in names else getattr(torch, name)
    if int8 and name not in ("auto", "bf16", "bfloat16"):
        raise UserError(f"--int8 computes in bfloat16: leave out --dtype {name}")
    return torch.bfloat16 if int8 else dtype
