"""What may happen to a machine while train.py and prepare_flickr8k.py work: afterwards nothing is lost.

    python -m tests.faults [--kills N]          # N kills of each script by each signal [50]; prints a table

One process imports everything and forks for each run. A run that ended before its signal counts as not tried.
"""

import argparse
import collections
import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402
from PIL import Image  # noqa: E402

import prepare_flickr8k  # noqa: E402
import train  # noqa: E402
from data import CaptionSet  # noqa: E402
from lib import checkpoint, cli  # noqa: E402
from lib.records import parse_json  # noqa: E402

SCRIPTS = {"train.py": train.main, "prepare_flickr8k.py": prepare_flickr8k.main}
TRAIN = [
    "train.py",
    "--data",
    "data",
    "--weights",
    "weights",
    "--out",
    "run",
    "--device",
    "cpu",
    "--batch-size",
    "3",
    "--epochs",
    "99",
    "--max-steps",
    "24",
    "--warmup-steps",
    "2",
    "--eval-interval",
    "5",
    "--save-interval",
    "3",
    "--log-interval",
    "1",
    "--num-samples",
    "1",
    "--eval-images",
    "4",
    "--dropout",
    "0.1",
]
PREPARE = [
    "prepare_flickr8k.py",
    "--images",
    "photos",
    "--captions",
    "captions.csv",
    "--image-size",
    "64",
    "--out",
    "set",
]


def start(args, log):
    """Fork a run in the current folder; its id. Python's own handlers of signals, as a shell gives them."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr, sys.argv = os.fdopen(1, "w"), os.fdopen(2, "w", 1), args
        cli.run(SCRIPTS[args[0]])
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 99
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def run(args, log="log"):
    return os.waitstatus_to_exitcode(os.waitpid(start(args, log), 0)[1])


def state(folder="run"):
    """All that a run is: last parameters, moments, step, best loss; the model in the checkpoint folder."""
    saved = torch.load(Path(folder, "training_state.pt"), weights_only=True)
    tensors = checkpoint.read_tensors(Path(folder, "fusion.safetensors"))
    flat = {**saved["model"], **{f"best {name}": t for name, t in tensors.items()}}
    flat |= {f"{i} {name}": t for i, held in saved["optimizer"]["state"].items() for name, t in held.items()}
    return flat, (saved["step"], saved["best"])


def same(one, other):
    return (
        one[1] == other[1]
        and one[0].keys() == other[0].keys()
        and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    )


def half_written(folder):
    """What under a final name cannot be read."""
    bad = []
    for file in Path(folder).iterdir():
        try:
            if file.name == "training_state.pt":
                torch.load(file, weights_only=True)
            elif file.suffix == ".safetensors":
                checkpoint.read_tensors(file)
            elif file.suffix == ".json":
                parse_json(object, file.read_bytes(), file)
            elif file.suffix == ".png":
                Image.open(file).load()
        except Exception as error:
            bad.append(f"{file.name}: {error}")
    return bad


def content(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def fresh(base):
    """A folder with what both scripts read, into which one goes."""
    folder = Path(tempfile.mkdtemp(dir=base))
    for name in ("data", "weights", "photos"):
        shutil.copytree(base / "world" / name, folder / name)
    shutil.copy(base / "world/captions.csv", folder)
    os.chdir(folder)
    return folder


def kill(args, number, seconds):
    """Kill a run at a random moment -> its status, and what is wrong already or that it was not tried."""
    pid = start(args, "log")
    time.sleep(random.uniform(0, seconds))
    os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0 or not Path("log").exists():  # it was over, or had not begun
        return status, "not tried"
    text = Path("log").read_text()
    return status, f"traceback: {text[-300:]}" if "Traceback" in text else None


def kill_train(base, number, seconds, wanted):
    """Kill a run at a random moment, then resume it -> not tried, resumed, or what is wrong."""
    fresh(base)
    status, ended = kill(TRAIN, number, seconds)
    if ended:
        return ended
    left = Path("run").exists() and list(Path("run").glob("*.tmp"))
    if number != signal.SIGKILL and left and status != -number:
        return "a temporary file was left"
    if Path("run").exists() and (bad := half_written("run")):
        return f"half written: {bad}"
    if run([*TRAIN, "--resume"]):
        return f"not resumed: {Path('log').read_text()[-300:]}"
    if left := [*Path("run").glob("*.tmp"), *Path("data").glob("*.partial")]:
        return f"left: {left}"
    return "resumed bitwise" if same(state(), wanted) else "resumed with other parameters"


def kill_prepare(base, number, seconds, wanted):
    fresh(base)
    _, ended = kill(PREPARE, number, seconds)
    if ended:
        return ended
    if Path("set/meta.json").exists():
        CaptionSet("set")  # a set that is there is whole
    if run(PREPARE):
        return f"not prepared again: {Path('log').read_text()[-300:]}"
    return "resumed bitwise" if content("set") == wanted else f"another set: {sorted(content('set'))}"


def full_disk(base, wanted):
    """On file systems of several sizes, then on one that is large enough, then on one that is read-only."""
    for size in (20, 60, 120, 200, 300, 450, 700, 1000):
        folder = fresh(base)
        Path("run").mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder / "run")], capture_output=True
        )
        if mounted.returncode:
            yield "disk full", "not tried"
            return
        try:
            status, text = run(TRAIN), Path("log").read_text()
            if status == 0:
                yield "disk full", "not tried"
                continue
            errors = [line for line in text.splitlines() if line.startswith("error: ")]
            if status != 1 or len(errors) != 1 or "Traceback" in text:
                yield "disk full", f"no clean error: {status} {text[-300:]}"
            elif bad := half_written("run"):
                yield "disk full", f"half written: {bad}"
            subprocess.run(["mount", "-o", "remount,ro", str(folder / "run")], check=True)
            before = content("run")
            status, text = run([*TRAIN, "--resume"], "log2"), Path("log2").read_text()
            clean = status == 1 and "Traceback" not in text and content("run") == before
            yield "read-only folder", "clean error" if clean else f"{status} {text[-300:]}"
            subprocess.run(["mount", "-o", "remount,rw,size=50m", str(folder / "run")], check=True)
            resumed = run([*TRAIN, "--resume"]) == 0 and same(state(), wanted)
            yield (
                "disk full",
                "resumed bitwise" if resumed else f"not resumed: {Path('log').read_text()[-300:]}",
            )
        finally:
            subprocess.run(["umount", str(folder / "run")], check=True)


def clock_back(base, wanted):
    """Everything on disk is of tomorrow when the run is resumed."""
    fresh(base)
    pid = start(TRAIN, "log")
    while not Path("run/training_state.pt").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for file in Path(".").rglob("*"):
        os.utime(file, (time.time() + 86400,) * 2)
    resumed = run([*TRAIN, "--resume"]) == 0 and same(state(), wanted)
    return "resumed bitwise" if resumed else Path("log").read_text()[-300:]


def two_runs(base, args, final, wanted):
    """The second run in a folder is refused while the first works, and does it no harm."""
    fresh(base)
    pid = start(args, "log")
    refused = 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if Path(final).exists() and list(Path(final).iterdir()):
            status = run([*args, "--resume"] if "train.py" in args else args, "log2")
            text = Path("log2").read_text()
            if "another run" in text and status == 1 and "Traceback" not in text:
                refused += 1
            else:
                os.waitpid(pid, 0)
                break
        time.sleep(0.01)
    right = same(state(), wanted) if final == "run" else content("set") == wanted
    return (
        "refused"
        if right and refused
        else f"{refused} refused, {'right' if right else 'wrong'}: {text[-300:]}"
    )


def build(base):
    from test_checkpoint import save_backbones
    from test_data import make_set
    from test_model import captioner

    world = base / "world"
    make_set(world / "data", images=14, size=24, longest=7)
    model = captioner(n_positions=40)
    save_backbones(model, world / "weights")
    model.tokenizer.save(world / "weights")
    tables = world / "weights/tokenizer.json"
    tables.write_text(tables.read_text().replace('"name": "bpe"', '"name": "gpt2"'))
    (world / "photos").mkdir()
    for i in range(120):
        Image.effect_noise((300, 200), 50 + i).convert("RGB").save(world / f"photos/{i}.jpg")
    rows = [f"{i}.jpg,a dog {i} runs,{'train' if i % 5 else 'val'}\n" for i in range(120)]
    (world / "captions.csv").write_text("image,caption,split\n" + "".join(rows))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp(prefix="faults_"))
    table = collections.defaultdict(collections.Counter)

    def note(row, ended):
        known = ended in ("not tried", "resumed bitwise", "clean error", "refused")
        table[row][ended if known else "anything else"] += 1
        if not known:
            print(f"{row}: {ended}", flush=True)

    try:
        build(base)
        fresh(base)
        for script in (TRAIN, PREPARE):  # what is used first is slow, but here
            sys.argv = script
            with open("warm", "w") as out, contextlib.redirect_stdout(out):
                SCRIPTS[script[0]]()
        gc.freeze()
        fresh(base)
        seconds, wanted = {}, {}
        for script, final in ((TRAIN, "run"), (PREPARE, "set")):
            began = time.monotonic()
            assert run(script) == 0, Path("log").read_text()
            seconds[final] = time.monotonic() - began
        wanted = {"run": state(), "set": content("set")}
        for row, ended in full_disk(base, wanted["run"]):
            note(row, ended)
        note("clock set back", clock_back(base, wanted["run"]))
        note("two runs of train.py", two_runs(base, TRAIN, "run", wanted["run"]))
        note("two runs of prepare_flickr8k.py", two_runs(base, PREPARE, "set", wanted["set"]))
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            for script, kill_run, final in (
                ("train.py", kill_train, "run"),
                ("prepare_flickr8k.py", kill_prepare, "set"),
            ):
                for _ in range(args.kills):
                    note(f"{script} {number.name}", kill_run(base, number, seconds[final], wanted[final]))
                    shutil.rmtree(os.getcwd())
    except KeyboardInterrupt:
        print("interrupted: what was tried so far")
    finally:
        os.chdir("/")
        shutil.rmtree(base)
    columns = "not tried", "resumed bitwise", "clean error", "refused", "anything else"
    print(f"{'':32}{'tried':>8}" + "".join(f"{name:>17}" for name in columns))
    for row, counts in table.items():
        tried = sum(counts.values()) - counts["not tried"]
        print(f"{row:32}{tried:8}" + "".join(f"{counts[name]:17}" for name in columns))
    return int(any(counts["anything else"] for counts in table.values()))


if __name__ == "__main__":
    sys.exit(main())
