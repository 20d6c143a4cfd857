"""What a training run does besides computing: its folder, its log, stopping on a signal, threads, memory."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import threading
from pathlib import Path

import torch

from lib import cli, records
from lib.cli import UserError

# files that a new run must not overwrite silently, and what else it writes
RUN_FILES = ("training_state.pt", "config.json", "fusion.safetensors", "model.safetensors")
ALL_FILES = (*RUN_FILES, "tokenizer.json", "log.jsonl", "loss.png", "samples.png")


@contextlib.contextmanager
def run_folder(cfg):
    """The checkpoint folder, for this run alone. Raises what `cli.claim_folder` does, and UserError for a run
    that is neither resumed nor overwritten."""
    resumed = cfg.resume and os.path.lexists(os.path.join(cfg.out, "training_state.pt"))
    with cli.claim_folder(cfg.out, ALL_FILES, ".lock", "a training run", resumed) as held:
        if not (cfg.resume or cfg.overwrite) and set(held) & set(RUN_FILES):
            raise UserError(f"{cfg.out} holds a run: continue it with --resume, throw it away with "
                            "--overwrite, or name another --out")
        yield Path(cfg.out)


class Log:
    """log.jsonl, a JSON object a line, cut back to the step from which the run continues; and a tracker."""

    def __init__(self, file, step, cfg):
        self.rows, self.send = [], None
        for line in records.read_bytes(file).splitlines() if file.exists() else []:
            with contextlib.suppress(UserError):                      # the run was killed while it wrote
                self.rows.append(records.parse_json(dict[str, int | float], line, file))
        self.rows = [row for row in self.rows if type(row.get("step")) is int and 0 <= row["step"] <= step]
        cli.write_text(file, "".join(json.dumps(row) + "\n" for row in self.rows), end="")
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
    """Let Ctrl-C and SIGTERM fill the list it gives, so that the step is saved first; twice stops at once."""
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


def peak_memory(device: torch.device) -> float:
    """Gigabytes, at most so far: allocated on the GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if Path("/proc/self/status").exists():       # on Linux getrusage counts the parent's memory too
        return int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]) * 1024 / 1e9
    try:
        import resource
    except ImportError:                                               # Windows does not tell
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
