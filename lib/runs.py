"""What a training run does besides computing: its folder, its log, stopping on a signal, threads, memory."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import torch

from lib import cli, records
from lib.cli import UserError

# files that a new run must not overwrite silently, and what else it writes
RUN_FILES = ("training_state.pt", "config.json", "fusion.safetensors", "model.safetensors")
ALL_FILES = (*RUN_FILES, "tokenizer.json", "drafts.safetensors", "log.jsonl", "loss.png", "samples.png")


@contextlib.contextmanager
def run_folder(cfg):
    """The checkpoint folder, this run's alone within the context.

    Raises UserError when another run is in it, when it holds one that is neither resumed nor overwritten, or
    files of such names that are not of a run: every run leaves .lock behind.
    """
    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder: name another --out")
    out.mkdir(parents=True, exist_ok=True)
    held = [name for name in ALL_FILES if os.path.lexists(out / name)]
    if held and not ((out / ".lock").exists() or cfg.resume and "training_state.pt" in held):
        raise UserError(f"{out} holds {held[0]}, which is not of a training run: move it away, or name "
                        "another --out")
    with open(out / ".lock", "w") as file:
        cli.lock(file, f"another run is training in {out}; wait for it, or name another folder with --out")
        if any((out / name).exists() for name in RUN_FILES) and not (cfg.resume or cfg.overwrite):
            raise UserError(f"{out} holds a run: continue it with --resume, throw it away with --overwrite, "
                            f"or name another --out")
        for rest in (rest for name in ALL_FILES for rest in out.glob(f"{name}.[0-9]*.tmp")):
            rest.unlink()                                             # of a run killed while it was writing
        yield out


class Log:
    """log.jsonl, a JSON object a line, cut back to the step from which the run continues; and a tracker."""

    def __init__(self, file, step, cfg):
        self.rows, self.send = [], None
        for line in records.read_bytes(file).splitlines() if file.exists() else []:
            with contextlib.suppress(UserError):                      # the run was killed while it wrote
                self.rows.append(records.parse_json(dict[str, int | float], line, file))
        self.rows = [row for row in self.rows if type(row.get("step")) is int and 0 <= row["step"] <= step]
        with cli.atomic(file) as temporary:
            Path(temporary).write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = open(file, "a")  # noqa: SIM115
        try:
            if cfg.tracker == "wandb":
                import wandb
                run = wandb.init(project="vision-gpt", config=dataclasses.asdict(cfg), resume="allow")
                self.send = lambda step, values: run.log(values, step=step)
            elif cfg.tracker == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(cfg.out)
                self.send = lambda step, values: [writer.add_scalar(k, v, step) for k, v in values.items()]
        except ImportError:
            raise UserError(f"--tracker {cfg.tracker} needs: pip install {cfg.tracker}") from None

    def write(self, step, **values):
        self.rows.append({"step": step, **values})
        self.file.write(json.dumps(self.rows[-1]) + "\n")
        self.file.flush()
        if self.send:
            self.send(step, values)

    def write_step(self, step, total, since, seconds, captions, loss, lr, memory_gb):
        """A line of log.jsonl and one for people, of the steps `since` then, which took so many seconds."""
        speed, left = captions / seconds, (total - step) * seconds / (step - since)
        self.write(step, loss=loss, lr=lr, captions_per_s=round(speed, 1), memory_gb=memory_gb)
        print(f"step {step}/{total}  loss {loss:.4f}  lr {lr:.1e}  {speed:.0f} captions/s  "
              f"{memory_gb:.1f} GB  {cli.clock(left)} left", flush=True)

    def curve(self, name):
        return [(row["step"], row[name]) for row in self.rows if name in row]


@contextlib.contextmanager
def stop_signal():
    """Within it, Ctrl-C and SIGTERM only fill the list it gives: the step is finished and saved first.

    A second one stops at once.
    """
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    main = threading.current_thread() is threading.main_thread()      # elsewhere signals cannot be handled
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def cpu_threads(number: int):
    """Within it PyTorch computes on so many threads; 0 leaves that to PyTorch."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory(device):
    """Gigabytes: allocated on the GPU, else resident in this process, at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")                                # of Linux, where getrusage counts what
    if status.exists():                                               # the parent held when it started this
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:                                               # Windows does not tell
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
