"""Measure this machine: captioning, training and start-up, next to the best it could do.

    python bench.py                            # everything: minutes
    python bench.py --quick                    # the machine, captions and training, fewer cases
    python bench.py --only caption --json caption.json

Full size, random weights, captions of 20 tokens; times are medians, contenders run in turn. The floor is
the least time possible: the counted arithmetic at the speed of the fastest matrix product found here or, in
decoding, the time to read the weights if that is longer. HF is Hugging Face's captioner of the same sizes,
but with 12 cross-attentions to 197 tokens; ours has 3, to 64. The original (lib/baselines.py) is timed at its
first and last word only.
"""

if __name__ in ("__main__", "__mp_main__"):                # its child processes decide for themselves
    import lib.startup  # noqa: F401  before torch

import copy
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fast
from data import CaptionSet
from decoding import DecodingConfig
from lib import cli
from lib.baselines import hugging_face, hugging_face_captions, original_training, original_word
from lib.runs import peak_memory
from model import VisionGPT, VisionGPTConfig
from train import TrainConfig, configure_optimizer, place_model, set_dropout, train_step, training_batches

ROOT, CPU = Path(__file__).parent, torch.device("cpu")
WORDS = 20                             # tokens of every caption
DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16, int8=torch.bfloat16)


def time_interleaved(contenders: dict, repeats: int, device: torch.device, label: str) -> dict[str, float]:
    """{name: function} -> {name: median seconds}; they run in turn, so that a slow moment hits all of them.

    The first round, which packs weights and claims memory, does not count.
    """
    seconds = {name: [] for name in contenders}
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    for name in cli.progress(list(contenders) * (repeats + 1), f"{label}: run"):
        wait()
        start = time.perf_counter()
        contenders[name]()
        wait()
        seconds[name].append(time.perf_counter() - start)
    return {name: np.median(values[1:]) for name, values in seconds.items()}


def count_flops(run) -> int:
    """Floating-point operations of the matrix products in `run()`, attention's included."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@lru_cache
def ceilings(device: torch.device) -> dict[str, float]:
    """{name of a matrix product: FLOP/s}, and {"read": bytes/s from memory}."""
    n, size = (2048, 2**27) if device.type == "cpu" else (8192, 2**30)
    ways = {"read": torch.ones(size, device=device).sum}
    for kind in ("fp32", "bf16") if device.type == "cpu" else ("fp32", "fp16", "bf16"):
        x, w = torch.randn(2, n, n, device=device).to(DTYPES[kind])
        ways[f"{kind} F.linear"] = partial(F.linear, x, w)
        if device.type == "cpu" and fast.available(DTYPES[kind]):
            ways[f"{kind} oneDNN"] = partial(fast.onednn, x, w)
    seconds = time_interleaved(ways, 5, device, "ceilings")
    return {name: (4 * size if name == "read" else 2 * n**3) / s for name, s in seconds.items()}


def peak_throughput(kind: str, device: torch.device) -> float:
    """FLOP/s of the fastest matrix product of `kind`, one of DTYPES; int8 weights are multiplied in bf16."""
    return max(s for name, s in ceilings(device).items() if name.startswith(kind.replace("int8", "bf16")))


def random_model(config: VisionGPTConfig | None = None) -> VisionGPT:
    """Random weights, also in cross-attention's last projection, which a new model has at zero."""
    torch.manual_seed(0)
    model = VisionGPT(config).eval()
    for layer in model.xattn.values():
        torch.nn.init.normal_(layer.out.weight, std=len(layer.out.weight) ** -0.5)
    return model


def variant(model: VisionGPT, kind: str, device: torch.device) -> VisionGPT:
    """A copy of the model that computes as `kind`, one of DTYPES; int8: GPT-2's weights, all else is bf16."""
    model = copy.deepcopy(model).requires_grad_(False).to(device, DTYPES[kind])
    return fast.pack(model, int8=kind == "int8")


def machine(device, quick):
    return {"Ceilings: billions of operations, or of bytes read, per second": [
        {"what": name, "G/s": speed / 1e9} for name, speed in ceilings(device).items()]}


def our_captions(model: VisionGPT, images: torch.Tensor, beams: int) -> list[list[int]]:
    """WORDS tokens for each image."""
    config = DecodingConfig(num_beams=beams, min_length=WORDS, max_length=WORDS)
    return model.generate_tokens(config, images=images)[0]


def caption_floor(model, kind, encoding, decoding, device):
    """The fewest seconds: arithmetic to encode, then arithmetic or reading the weights to decode."""
    used = re.compile(r"gpt2\.(wte|h)\.|xattn\.\d+\.(q|out)\.")
    weights = sum(p.numel() for name, p in model.named_parameters() if used.match(name))
    read = WORDS * weights * (1 if kind == "int8" else DTYPES[kind].itemsize) / ceilings(device)["read"]
    return encoding / peak_throughput(kind, device) + max(decoding / peak_throughput(kind, device), read)


def caption(device, quick):
    kinds = ["fp32", "bf16", "int8" if device.type == "cpu" else "fp16"]
    model, rows, batches = random_model().requires_grad_(False), [], [1] if quick else [1, 8, 32]
    ways = {kind: partial(our_captions, variant(model, kind, device)) for kind in kinds}
    try:
        other = hugging_face()
        ways |= {f"HF {k}": partial(hugging_face_captions, WORDS, copy.deepcopy(other).to(device, DTYPES[k]))
                 for k in kinds if k != "int8"}
    except ImportError as error:
        print(f"without Hugging Face's model, which needs pip install transformers: {error}", file=sys.stderr)
    plain, text = copy.deepcopy(model).to(device), torch.zeros(1, WORDS, dtype=torch.long, device=device)
    ways["original"] = lambda images, beams: [original_word(plain, images, text[:, :n]) for n in (1, WORDS)]
    S = model.config.vit.image_size
    pictures, one = torch.randn(batches[-1], 3, S, S, device=device), torch.randn(1, 3, S, S)
    encoding = count_flops(lambda: model.cross_kv(model.encode(one)))
    for batch, beams in itertools.product(batches, (1, 5)):
        names = [n for n in ways if (n != "int8" or batch == 1) and (n != "original" or batch == beams)]
        decoding = count_flops(partial(our_captions, model, one, beams)) - encoding
        seconds = time_interleaved({name: partial(ways[name], pictures[:batch], beams) for name in names},
                                   1 if quick or batch > 1 else 3, device, f"batch {batch}, {beams} beams")
        seconds = {n: s * (WORDS / 2 if n == "original" else 1) for n, s in seconds.items()}
        for name, s in seconds.items():
            row = {"batch": batch, "beams": beams, "what": name, "seconds": s, "images/s": batch / s}
            if name in DTYPES:
                floor = caption_floor(model, name, batch * encoding, batch * decoding, device)
                row["share of floor"] = floor / s
                for other in (f"HF {name.replace('int8', 'bf16')}", "original"):
                    if other in seconds:
                        row[f"times {other.split()[0]}"] = seconds[other] / s
            rows.append(row)
    return {f"Captions of {WORDS} tokens; times HF: how much faster than HF in the same dtype": rows}


class RandomCaptions(CaptionSet):
    """A set without a folder: 5 captions of random tokens an image, of 13 on average, end token included."""

    def __init__(self, n_image, vocab_size):
        self.offset = np.cumsum([0, *[7, 10, 12, 14, 17] * n_image])                   # Flickr8k's spread
        self.tokens = np.random.default_rng(0).integers(vocab_size - 1, size=self.offset[-1], dtype=np.uint16)
        self.captions_of = np.arange(5 * n_image).reshape(n_image, 5)
        self.splits = {"train": range(n_image)}
        self.tokenizer = types.SimpleNamespace(eos_id=vocab_size - 1)


def fusion_training(model: VisionGPT, device: torch.device, kind: str, batch_size: int):
    """A function that takes n optimizer steps of train.py on cached features, all of them the same."""
    cfg, amp = TrainConfig(batch_size=batch_size, augment=True), None if kind == "fp32" else DTYPES[kind]
    data, vit = RandomCaptions(32 * batch_size, model.eos_id + 1), model.config.vit
    set_dropout(model, cfg.dropout)
    model.backbones = {"vit": None, "gpt2": None}               # as if read from files: kept in amp's dtype
    inputs = place_model(model, data, cfg, device, amp)         # with `augment` it caches no features
    features = torch.randn(1, vit.n_patch, vit.n_embd, device=device, dtype=torch.float16)
    inputs.features = features.expand(32 * batch_size, -1, -1)
    model.vit.to("meta")
    optimizer = configure_optimizer(model.train(), cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    batches = training_batches(data, inputs, cfg, range(sys.maxsize))
    return lambda n: [train_step(model, optimizer, scaler, micro_batches, cfg, amp)
                      for micro_batches in itertools.islice(batches, n)]


def training_flops(config: VisionGPTConfig) -> float:
    """Operations per caption of 13 targets, when there are 5 an image and nothing is padded."""
    with torch.device("meta"):
        model, tokens = VisionGPT(config), torch.empty(5, 13, dtype=torch.long)
        features = torch.empty(1, config.vit.n_patch, config.vit.n_embd)
    return count_flops(lambda: model(tokens, model.encode(features=features), tokens)[1].backward()) / 5


def alone(function, *args):
    """What the function returns, called in a process that does nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *args).result()


def time_training(name, device, size, steps, repeats):
    """Seconds of a training step, and gigabytes at most."""
    start = original_training if name == "original" else partial(fusion_training, kind=name)
    take = start(random_model(), device, batch_size=size)
    seconds = time_interleaved({"": partial(take, steps)}, repeats, device, name)[""]
    return seconds / steps, peak_memory(device)


def train(device, quick):
    ours = (16, 4) if device.type == "cpu" else (64, 20)                      # images a step, steps timed
    cases = {"original": (2 if quick else 16, 1), "fp32": ours, "bf16": ours}
    rows, flops, repeats = [], training_flops(VisionGPTConfig()), 1 if quick else 3
    for name, (size, steps) in cases.items():
        s, memory = alone(time_training, name, device, size, steps, repeats)
        captions = size if name == "original" else 5 * size
        rows.append({"what": name, "captions": captions, "s": s, "captions/s": captions / s, "GB": memory})
        if name != "original":
            rows[-1] |= {"share of floor": captions * flops / peak_throughput(name, device) / s,
                         "times original": captions / s / rows[0]["captions/s"]}
    return {f"A training step, {flops / 1e9:.2f} GFLOP per caption of 13 tokens": rows}


def startup(device, quick):
    commands = {"import torch": ["-c", "import torch"],
                "sample.py, the bundled model": ["sample.py", "--checkpoint", "assets/mini"]}
    ways = {name: partial(subprocess.run, [sys.executable, *args], cwd=ROOT, check=True, capture_output=True)
            for name, args in commands.items()}
    seconds = time_interleaved(ways, 1 if quick else 3, CPU, "start-up")
    return {"Start-up": [{"what": name, "seconds": s} for name, s in seconds.items()]}


def time_caption(kind, device, repeats):
    """Seconds of a greedy caption, and gigabytes at most."""
    model, S = variant(random_model(), kind, device), VisionGPTConfig().vit.image_size
    ways = {"": partial(our_captions, model, torch.randn(1, 3, S, S), 1)}
    return time_interleaved(ways, repeats, device, kind)[""], peak_memory(device)


def busy(device, quick):
    """In bfloat16, alone and beside a process that takes one core, then also with threads that spin."""
    rows, repeats = [], 2 if quick else 5
    jobs = {"a caption": (time_caption, "bf16", device, repeats),
            "a training step, 16 images": (time_training, "bf16", device, 16, 1, repeats)}
    spin = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"      # outlives no bench.py
    for what, job in jobs.items():
        seconds = []
        for other, setting in ("pass", {}), (spin, {}), (spin, {"GOMP_SPINCOUNT": "300000"}):   # OpenMP's own
            process = subprocess.Popen([sys.executable, "-c", other])
            with patch.dict(os.environ, setting):
                seconds.append(alone(*job)[0])
            process.kill()
        s, beside, spinning = seconds
        rows.append({"what": what, "s": s, "s beside": beside, "s spinning": spinning,
                     "times": beside / s, "times spinning": spinning / s})
    return {"Beside a busy core": rows}


def machine_name(device: torch.device) -> str:
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    cpu = (re.findall("model name\\s*: (.*)", info) or [platform.processor()])[0]
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return f"{gpu}{cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores; torch {torch.__version__}"


def markdown(title: str, rows: list[dict]) -> str:
    """A table of dicts, floats with three digits; a key that a row lacks is an empty cell."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(key, "") for key in keys] for row in rows]
    cells = [[f"{float(f'{c:.3g}'):g}" if isinstance(c, float) else str(c) for c in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(keys, *cells)]
    lines = [keys, ["-" * width for width in widths], *cells]
    return "\n".join([f"\n{title}\n", *(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)])


SECTIONS = {section.__name__: section for section in (machine, caption, train, startup, busy)}


@dataclass
class BenchConfig:
    quick: bool = cli.flag(False, "the machine, captions and training alone, with fewer cases, repeated less")
    only: str | None = cli.flag(None, "run only this section", choices=list(SECTIONS))
    device: str = cli.flag("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    json: str | None = cli.flag(None, "write all numbers; without FILE to stdout", metavar="FILE", const="-")


def main(args=None):
    cfg = BenchConfig(**cli.parse(BenchConfig, __doc__, args))
    cli.check_outputs(cfg, "json")
    device = CPU if cfg.device == "auto" and not torch.cuda.is_available() else cli.pick_device(cfg.device)
    log = partial(print, file=sys.stderr if cfg.json == "-" else sys.stdout, flush=True)
    results = {"machine": machine_name(device)}
    log(results["machine"])
    for name in [cfg.only] if cfg.only else list(SECTIONS)[: 3 if cfg.quick else None]:
        for title, rows in SECTIONS[name](device, cfg.quick).items():
            results[title] = rows
            log(markdown(title, rows))
    if cfg.json:
        cli.write_text(cfg.json, json.dumps(results, indent=1))


if __name__ == "__main__":
    cli.run(main)
