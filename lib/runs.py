"""What a training run does besides computing: its folder, state and log, signals, threads, memory."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lib import cli, distributed, records
from lib.cli import UserError

# files that a new run must not overwrite silently, and what else it writes
RUN_FILES = ("training_state.pt", "config.json", "fusion.safetensors", "model.safetensors")
ALL_FILES = (*RUN_FILES, "tokenizer.json", "drafts.safetensors", "log.jsonl", "loss.png", "samples.png")


@contextlib.contextmanager
def run_folder(cfg):
    """The checkpoint folder, for this run alone; process 0 answers for all of it.

    Raises what `cli.claim_folder` does, and UserError for a run that is neither resumed nor overwritten.
    """
    if distributed.rank() > 0:
        yield Path(cfg.out)
        return
    resumed = cfg.resume and os.path.lexists(os.path.join(cfg.out, "training_state.pt"))
    with cli.claim_folder(cfg.out, ALL_FILES, ".lock", "a training run", resumed) as held:
        if not (cfg.resume or cfg.overwrite) and set(held) & set(RUN_FILES):
            raise UserError(f"{cfg.out} holds a run: continue it with --resume, throw it away with "
                            "--overwrite, or name another --out")
        yield Path(cfg.out)


@dataclass
class AdamState:
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass
class OptimizerState:
    state: dict[int, AdamState]
    param_groups: list[dict]


@dataclass
class SavedState:
    """What training_state.pt holds, of which every field is checked before it is used."""

    model: dict[str, Tensor]
    optimizer: OptimizerState
    scaler: dict[str, int | float]
    step: int = field(metadata=dict(min=0))
    best: float = field(metadata=dict(max=math.inf))
    losses: list[float]
    backbones: dict[str, str | None]
    config: dict


def read_state(file: Path, config_class) -> dict | None:
    """What `TrainState.save` wrote, or None where there is nothing. Raises UserError if it is damaged."""
    if not file.exists():
        print(f"{file} does not exist: starting at step 0", file=sys.stderr)
        return None
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None
    except Exception as error:                                        # a damaged file fails in many ways
        raise UserError(f"{file} is damaged or of another version ({type(error).__name__}); "
                        f"start again with --overwrite") from None
    records.convert(SavedState, saved, file)
    records.convert(config_class, saved["config"], file, ("config",))
    return saved


@dataclass
class TrainState:
    """All that changes while training, as in training_state.pt; `inputs`: hashes of weights and captions."""

    trained: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    inputs: dict[str, str]
    step: int = 0
    best: float = math.inf
    losses: list[Tensor] = field(default_factory=list)                # since the last log line

    def save(self, out: Path, cfg) -> None:
        content = {"model": {name: p.detach() for name, p in self.trained.items()},
                   "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                   "step": self.step, "best": self.best, "losses": [loss.item() for loss in self.losses],
                   "backbones": self.inputs, "config": dataclasses.asdict(cfg)}
        with cli.atomic(out / "training_state.pt") as path, open(path, "wb") as file:
            torch.save(content, file)

    def load(self, saved: dict, out: Path) -> None:
        """Continue from what `read_state` gave. Raises UserError if weights or captions are others now."""
        held = {name: tensor.shape for name, tensor in saved["model"].items()}
        if saved["backbones"] != self.inputs or held != {name: p.shape for name, p in self.trained.items()}:
            raise UserError(f"the weights or the data have changed since the run in {out} started: restore "
                            "them, or start again with --overwrite")
        own, moments = self.optimizer.state_dict(), saved["optimizer"]["state"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        tensors = [*saved["model"].values(), *(t for moment in moments.values() for t in moment.values())]
        fit = all(0 <= i < len(parameters) and moment["step"].shape == () and parameters[i].shape ==
                  moment["exp_avg"].shape == moment["exp_avg_sq"].shape for i, moment in moments.items())
        if not fit or not all(t.isfinite().all() for t in tensors):
            raise UserError(f"{out}/training_state.pt is damaged (NaN, or tensors that do not fit the "
                            "model); start again with --overwrite")
        for name, p in self.trained.items():
            p.data.copy_(saved["model"][name])
        self.optimizer.load_state_dict(own | {"state": moments})      # the rest is of this run's settings
        if saved["scaler"].keys() >= self.scaler.state_dict().keys() > set():    # not where it does not scale
            self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        self.losses = [torch.tensor(loss) for loss in saved["losses"]]
        self.best = saved["best"] if (out / "config.json").exists() else math.inf

    def check_losses(self) -> list[float]:
        """The losses since the last log line (synchronises a GPU). Raises UserError if one is NaN."""
        losses = [loss.item() for loss in self.losses]
        for step, loss in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss} at step {step}; the folder holds the last good "
                                "checkpoint: lower --learning-rate, or use --dtype float32")
        return losses


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
                run = wandb.init(project="vision-gpt", config=dataclasses.asdict(cfg))
                self.send = lambda step, values: run.log(values, step=step)
            elif cfg.tracker == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(cfg.out)
                self.send = lambda step, values: [writer.add_scalar(k, v, step) for k, v in values.items()]
        except ImportError:
            raise UserError(f"--tracker {cfg.tracker} needs: pip install {cfg.tracker}") from None

    def write(self, step, **values):
        self.rows.append({"step": step, **values})
        with cli.naming(self.file.name):
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

    A second one stops at once, except that torchrun passes on what the terminal has sent already.
    """
    asked = []

    def ask(number, frame):
        if asked and distributed.world_size() == 1:
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
