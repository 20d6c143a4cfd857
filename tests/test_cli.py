"""Flags from a dataclass, one-line errors, progress, files that are written whole or not at all."""

import ntpath
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from lib import cli
from lib.cli import UserError, flag


@dataclass
class Settings:
    pictures: list[str] = flag(list, "pictures", positional=True, metavar="IMAGE")
    batch_size: int = flag(32, "images per step")
    learning_rate: float = flag(1e-3, "peak, of 100 %")
    top_p: float | None = flag(None, "sample")
    compile: bool = flag(False, "compile the model")
    augment: bool = flag(True, "augment pictures")
    train: str = flag("fusion", "what is trained", choices=["fusion", "all"])
    captions: list[str] = flag(list, "caption files")
    out: str = flag("", "folder")
    prompt: str = flag("", "start of the text")
    seed: int = flag(0, "of everything")
    json: str | None = flag(None, "where results go", const="-")
    internal: int = 7


def parse(*args):
    return cli.parse(Settings, "A script.\n\n  python script.py --out FOLDER", list(args))


@pytest.mark.parametrize("args, given", [
    (["--batch-size", "3"], dict(batch_size=3)), (["--batch-size=3"], dict(batch_size=3)),
    (["--batch_size", "3"], dict(batch_size=3)), (["--batch_size=3"], dict(batch_size=3)), ([], {}),
    (["--compile"], dict(compile=True)), (["--no-compile"], dict(compile=False)),
    (["--no_augment"], dict(augment=False)),
    (["--top-p", "0.9"], dict(top_p=0.9)), (["--learning-rate", "3e-4"], dict(learning_rate=3e-4)),
    (["--learning-rate", "-1.5"], dict(learning_rate=-1.5)), (["--seed", "-3"], dict(seed=-3)),
    (["--captions", "a", "b"], dict(captions=["a", "b"])),
    (["--captions", "a", "--captions", "b"], dict(captions=["a", "b"])),
    (["a.jpg", "b_c.jpg"], dict(pictures=["a.jpg", "b_c.jpg"])), (["-"], dict(pictures=["-"])),
    (["a", "--seed", "1", "b"], dict(pictures=["a", "b"], seed=1)),
    (["--seed=1", "a"], dict(pictures=["a"], seed=1)), (["--train", "all"], dict(train="all")),
    (["--json"], dict(json="-")), (["--json", "x.json"], dict(json="x.json")),
    (["--out", "my_dir/a_b"], dict(out="my_dir/a_b")), (["--out=my_dir"], dict(out="my_dir")),
    (["--prompt=--a_b"], dict(prompt="--a_b")), (["--prompt=a=b_c"], dict(prompt="a=b_c")),
    (["--prompt", ""], dict(prompt="")),
    (["--prompt=-x"], dict(prompt="-x")), (["--prompt", "- a_b"], dict(prompt="- a_b"))])
def test_flags_are_read(args, given):
    """Only what was given, so that presets can tell; values are never altered, names never abbreviated."""
    assert parse(*args) == given


@pytest.mark.parametrize("args, message", [
    (["--batch", "3"], "unknown argument --batch (did you mean --batch-size?); see --help"),
    (["--batch_sise=3"], "unknown argument --batch-sise (did you mean --batch-size?); see --help"),
    (["--internal", "3"], "unknown argument --internal"), (["-q"], "unknown argument -q"),
    (["--compile=False"], "--compile/--no-compile: ignored explicit argument 'False'"),
    (["--train", "al"], "--train: 'al' is not one of fusion, all (did you mean all?)"),
    (["--train", "x"], "--train: 'x' is not one of fusion, all\n"),
    (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
    (["--top-p", "x"], "--top-p: invalid float value: 'x'"),
    (["--out"], "--out: expected one argument"),
    (["--captions"], "--captions: expected at least one argument")])
def test_wrong_usage_is_one_line_and_status_2(args, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*args)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and message in err and err.count("\n") == 1 and out == ""


def test_help_explains_each_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    out, err = capsys.readouterr()
    assert caught.value.code == 0 and err == ""
    assert "  python script.py --out FOLDER\n" in out and "internal" not in out
    for text in ("images per step [32]", "peak, of 100 % [0.001]", "compile the model [False]",
                 "what is trained [fusion]",
                 "of everything [0]", "--train {fusion,all}", "--augment, --no-augment", "IMAGE"):
        assert text in out, text


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from lib import cli

def main():
    {body}

cli.run(main)
"""


@pytest.mark.parametrize("body, status, out, err", [
    ("print('fine')", 0, "fine\n", ""),
    ("raise cli.UserError('no such caption')", 1, "", "error: no such caption\n"),
    ("print('so far'); raise cli.UserError('that was it')", 1, "so far\n", "error: that was it\n"),
    ("open('nowhere/file')", 1, "", "error: nowhere/file: No such file or directory\n"),
    ("raise OSError(28, 'No space left on device')", 1, "", "error: No space left on device\n"),
    ("raise cli.UserError('a\\nb \\udcff')", 1, "", "error: a\\nb \\udcff\n"),
    ("print('\\udcff')", 0, "\\udcff\n", ""),
    ("raise KeyboardInterrupt", 130, "", "interrupted\n"), ("return 3", 3, "", "")])
def test_run_ends_without_a_traceback(body, status, out, err, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), body=body))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


@pytest.mark.parametrize("closing, out", [("<&-", "''"), (">&-", ""), ("2>&-", "''"), ("<&- >&- 2>&-", "")])
def test_run_lives_with_closed_streams(closing, out, tmp_path):
    """As a job started by cron or a daemon; sys.stdin, sys.stdout and sys.stderr are None then."""
    body = "print(repr(sys.stdin.read())); print('told', file=sys.stderr)"
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), body=body))
    done = subprocess.run(f"{sys.executable} script.py {closing}", shell=True, cwd=tmp_path,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, out)
    assert done.stderr == ("" if "2>" in closing else "told\n")


def test_run_can_be_interrupted_while_a_thread_reads_stdin(tmp_path):
    """Python waits for such threads, so Ctrl-C did nothing until stdin was closed."""
    body = ("from concurrent.futures import ThreadPoolExecutor; ThreadPoolExecutor().submit(sys.stdin.read); "
            "raise KeyboardInterrupt")
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), body=body))
    with subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, stdin=subprocess.PIPE,
                          stderr=subprocess.PIPE) as started:
        assert started.wait(20) == 130 and started.stderr.read() == b"interrupted\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_run_is_silent_when_its_reader_leaves(lines, tmp_path):
    """As in `python script.py | head -0`: at a print, or when the last lines are flushed."""
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), body=f"print('line\\n' * {lines})"))
    command = f"( sleep 0.1; {sys.executable} script.py; echo $? > status ) | true"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=buffered)
    assert (tmp_path / "status").read_text() == "1\n" and done.stderr == ""


def test_an_error_in_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)
    with pytest.raises(OSError, match="Bad file"):
        cli.run(lambda: os.close(987))


def test_printable_is_one_line_and_leaves_names_of_the_world_alone():
    names = "写真　1.jpg", "می‌خواهم.png", "café é.gif", "👩‍🚀.webp"
    assert [cli.printable(name) for name in names] == list(names)
    assert cli.printable("a\nb\r\t\x1b[2J\u2028\udcff") == r"a\nb\r\t\x1b[2J\u2028\udcff"


@pytest.mark.parametrize("work, caught", [
    (lambda: torch.empty(1 << 60), UserError), (lambda: bytearray(1 << 62), UserError),
    (lambda: torch.empty(2) @ torch.empty(3), RuntimeError), (lambda: [][1], IndexError)])
def test_out_of_memory_is_told_and_other_errors_stay(work, caught):
    with pytest.raises(caught) as error, cli.out_of_memory("take less"):
        work()
    assert (error.type is UserError) == (str(error.value) == "out of memory: take less")


def test_nearest_names_what_was_meant():
    assert cli.nearest("flickr", ["flickr8k", "shapes"]) == " (did you mean flickr8k?)"
    assert cli.nearest("xyz", ["flickr8k", "shapes"]) == cli.nearest("a", []) == ""


def test_atomic_leaves_a_whole_file_or_nothing(tmp_path):
    file = tmp_path / "file"
    with cli.atomic(file) as temporary:
        Path(temporary).write_text("one")
        assert not file.exists()
    assert file.read_text() == "one"
    for written in (True, False):
        with pytest.raises(UserError), cli.atomic(file) as temporary:
            if written:
                Path(temporary).write_text("half of")
            raise UserError("stopped")
    assert file.read_text() == "one" and [f.name for f in tmp_path.iterdir()] == ["file"]


def test_relative_paths_have_forward_slashes_and_may_be_on_another_drive(monkeypatch):
    assert cli.relative("a/b/c", "a/d") == "../b/c"
    monkeypatch.setattr(cli.os.path, "relpath", lambda path, start: ntpath.relpath("D:\\x", "C:\\y"))
    assert cli.relative("/a/b") == Path("/a/b").absolute().as_posix()


def test_atomic_writes_through_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    cli.write_text(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far/file").read_text() == "one\n"


def test_atomic_does_not_replace_a_device(tmp_path):
    """A checkpoint whose model.safetensors was a link to /dev/zero made that a file, when root trained on."""
    os.mkfifo(tmp_path / "device")
    (tmp_path / "link").symlink_to("device")
    with pytest.raises(UserError, match="would be replaced"):
        cli.write_text(tmp_path / "link", "one")
    assert (tmp_path / "device").is_fifo() and len(list(tmp_path.iterdir())) == 2


@dataclass
class Outputs:
    json: str | None = None
    other: str | None = None
    save: str | None = None


@pytest.mark.parametrize("files, message", [
    (dict(json="-", other="new", save="new.png"), None), (dict(json="text", save="old.png"), None),
    (dict(json="new", other="./new"), "--json and --other both write ./new"),
    (dict(json="new", save="link"), "--json and --save both write"),
    (dict(json="input"), "overwrite"), (dict(save="sub/../input"), "would overwrite input, which is read"),
    (dict(save="link to input"), "would overwrite input"), (dict(save="hard link to input"), "overwrite"),
    (dict(json="old.png"), "--json old.png would overwrite a picture"), (dict(json="sub"), "be written"),
    (dict(json="none/new"), "cannot be written"), (dict(json="/dev/null"), "cannot be written"),
    (dict(other="pipe"), "cannot be written"), (dict(save=""), "cannot be written")])
def test_outputs_that_would_lose_something_are_refused(files, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("sub")
    os.mkfifo("pipe")
    for name, content in (("text", b"[1]"), ("input", b"[2]"), ("old.png", b"\x89PNG\0")):
        Path(name).write_bytes(content)
    os.symlink("new", "link")
    os.symlink("input", "link to input")
    os.link("input", "hard link to input")
    check = lambda: cli.check_outputs(Outputs(**files), "json", "other", pictures=["save"],
                                      inputs=["input", "missing", "-"])
    if message is None:
        check()
    else:
        with pytest.raises(UserError, match=message):
            check()


def test_progress_passes_everything_on_and_shows_late(capsys, monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    assert list(cli.progress(range(9), "images")) == list(range(9))
    out, err = capsys.readouterr()
    assert (out, err) == ("", "images 3/9, 24 s left\nimages 7/9, 7 s left\n")
    monkeypatch.setattr(cli.time, "monotonic", lambda: 0)
    assert list(cli.progress(iter("ab"), "letters", total=2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (187, "3:07 min"), (3725, "1:02 h")])
def test_clock_reads_as_people_do(seconds, text):
    assert cli.clock(seconds) == text


def test_devices_and_dtypes_by_name():
    assert cli.pick_device("cpu") == cli.pick_device(torch.device("cpu")) == torch.device("cpu")
    assert cli.pick_device("auto").type in cli.DEVICES
    for wrong in ("tpu", "mps" if not torch.backends.mps.is_available() else "xpu"):
        with pytest.raises(UserError, match=f"device '{wrong}' is not available here"):
            cli.pick_device(wrong)
    found = [cli.pick_dtype(name, torch.device("cpu")) for name in cli.DTYPES]
    assert found == [torch.float32, *[torch.float32, torch.float16, torch.bfloat16] * 2]


@pytest.mark.gpu
def test_a_gpu_computes_in_16_bits():
    device = torch.device("cuda")
    assert cli.pick_dtype("auto", device) in (torch.bfloat16, torch.float16)
    assert cli.pick_dtype("float32", device) == torch.float32
