"""Measure this machine: captioning, training, ViT features, start-up and scale, each beside its limit.

    python bench.py                            # everything: 8 minutes on 2 cores
    python bench.py --quick                    # less of it, repeated less: 90 seconds
    python bench.py --only caption --json caption.json

Weights and captions are random, the sizes those of ViT-B/16 and GPT-2, and 20 tokens are forced. Times are
medians, of long work on a CPU single runs, and what is compared runs in turn. A floor is the counted
arithmetic at the speed of the fastest matrix product found here; for decoding, if that takes longer, the
weights read at the measured bandwidth. HF is Hugging Face's VisionEncoderDecoderModel of the same sizes, with
cross-attention to all 197 tokens of the ViT in all 12 blocks, where ours has it to 64 in 3; "medium" is its
float32 matmul precision. The original's way is told in baselines.py; of a caption its first and last word are
timed, times 10.
"""

import contextlib
import copy
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import runs
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fast
from data import CaptionSet, batches, cached_features, collate, load_ahead, to_device, write_images, write_set
from decoding import DecodingConfig
from gpt2 import KVCache
from lib import caption_formats, cli, metrics
from lib.baselines import hugging_face, hugging_face_captions, original_steps, original_word
from lib.cli import UserError, flag
from lib.images import load_image, resize
from model import VisionGPT, VisionGPTConfig
from prepare_flickr8k import decode
from resampler import Groups
from tokenizer import Tokenizer
from train import TrainConfig, make_optimizer, set_dropout, trained_parameters
from vit import ViT, ViTConfig

ROOT, CPU = Path(__file__).parent, torch.device("cpu")
WORDS = 20                             # tokens of every caption
ORIGINAL = "original's way"
DTYPES = {"plain": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
          "int8": torch.bfloat16, "bf16 graphs": torch.bfloat16}
# plain: fp32 without fast.pack; int8: GPT-2's weights, all else is bf16; graphs: fast.record on a GPU

# --------------------------------------------------------------------------------------------------
# how to measure


def time_interleaved(contenders, repeats, device, label, warm=False):
    """{name: function} -> {name: median seconds}; a, b, c, a, b, c, so that a slow moment hits all alike.

    A first round, in which weights are packed and memory is claimed, does not count, unless all are `warm`.
    """
    seconds = {name: [] for name in contenders}
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    for name in cli.progress(list(contenders) * (repeats + (not warm)), f"{label}: run"):
        wait()
        start = time.perf_counter()
        contenders[name]()
        wait()
        seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[not warm :]) for name, values in seconds.items()}


def new_process():
    """A pool of one process, the memory of which is its own."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def peak_memory(device):
    """Gigabytes, at most so far: allocated on the GPU, else resident in this process."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return runs.peak_memory(device)
    # on Linux getrusage counts what the parent held when it started this process
    return next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) * 1024 / 1e9


def count_flops(run):
    """Floating-point operations of the matrix products in `run()`, which may be on the meta device."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------------
# the machine


def machine_name(device):
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(": ", 1)[1] if names else cpu
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return f"{gpu}{cpu}, {os.cpu_count()} cores; torch {torch.__version__}, {torch.get_num_threads()} threads"


@lru_cache
def ceilings(device):
    """{name of a matrix product: FLOP/s}, and {"read": bytes/s from memory}."""
    n, size = (2048, 2**27) if device.type == "cpu" else (8192, 2**30)
    ones = torch.ones(n, n, dtype=torch.int8, device=device)
    products = {"int8 _int_mm": partial(torch._int_mm, ones, ones.t())}     # the layout that cuBLAS knows
    for kind in ("fp32", "bf16") if device.type == "cpu" else ("fp32", "fp16", "bf16"):
        x, w = torch.randn(2, n, n, device=device).to(DTYPES[kind])
        products[f"{kind} F.linear"] = partial(F.linear, x, w)
        if device.type == "cpu" and fast.available(DTYPES[kind]):
            products[f"{kind} oneDNN"] = partial(fast.linear, x, w)
    seconds = time_interleaved(products, 5, device, "matrix products")
    read = time_interleaved({"": torch.ones(size, device=device).sum}, 5, device, "memory")[""]
    return {name: 2 * n**3 / s for name, s in seconds.items()} | {"read": 4 * size / read}


def fastest(kind, device):
    """FLOP/s of the fastest matrix product of `kind`, one of DTYPES; int8 weights are multiplied in bf16."""
    dtype = {"plain": "fp32", "int8": "bf16"}.get(kind, kind.split()[0])
    return max(speed for name, speed in ceilings(device).items() if name.startswith(dtype))


def machine(device, quick):
    rows = [{"what": name, "G/s": speed / 1e9} for name, speed in ceilings(device).items()]
    return {"Ceilings: billions of operations, or of bytes read, a second": rows}


# --------------------------------------------------------------------------------------------------
# captions


def build(config=None):
    """The model, its weights random; cross-attention's last projection too, which else would be zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionGPT(config).eval()
        for layer in model.xattn.values():
            torch.nn.init.normal_(layer.out.weight, std=len(layer.out.weight) ** -0.5)
    return model


def variant(model, kind, device):
    """A copy of the model that computes as `kind`, one of DTYPES."""
    model = copy.deepcopy(model).requires_grad_(False).to(device, DTYPES[kind])
    if kind == "bf16 graphs":
        return fast.record(model)
    return model if kind == "plain" else fast.pack(model, int8=kind == "int8")


def ours(model, images, beams):
    """WORDS tokens for each image, as lists."""
    config = DecodingConfig(num_beams=beams, min_length=WORDS, max_length=WORDS)
    return model.generate_tokens(config, images=images)[0]


def caption_flops(config, batch, beams):
    """Operations of (encoding, decoding) a batch; the first word is chosen before there are beams."""
    with torch.device("meta"):
        model, S = VisionGPT(config).requires_grad_(False), config.vit.image_size
        cache, groups = KVCache(config.gpt2, batch, WORDS), Groups(batch)
        cross_kv = model.cross_kv(torch.empty(batch, config.resampler.n_latent, config.gpt2.n_embd))

        def step(rows):
            tokens = torch.empty(rows, 1, dtype=torch.long)
            model.gpt2.logits(model.hidden(tokens, cross_kv, groups, cache)[:, -1])

        encoding = count_flops(lambda: model.cross_kv(model.encode(torch.empty(batch, 3, S, S))))
        first = count_flops(lambda: step(batch))
        cache.select(torch.arange(batch).repeat_interleave(beams))
        second = count_flops(lambda: step(batch * beams))
        cache.length = WORDS - 1
        last = count_flops(lambda: step(batch * beams))                # between them it grows evenly
        return encoding, first + (WORDS - 1) * (second + last) // 2


def caption_floor(model, kind, flops, device):
    """The fewest seconds: the encoder's arithmetic, then decoding's or the reading of its weights."""
    cross = [part for layer in model.xattn.values() for part in (layer.q, layer.out)]
    weights = sum(p.numel() for part in (model.gpt2.wte, model.gpt2.h, *cross) for p in part.parameters())
    read = WORDS * weights * (1 if kind == "int8" else DTYPES[kind].itemsize) / ceilings(device)["read"]
    encoding, decoding = (count / fastest(kind, device) for count in flops)
    return encoding + max(decoding, read)


def original_ends(model, images):
    """The first and the last word of a caption in the original's way; between them the cost grows evenly."""
    for length in (1, WORDS):
        original_word(model, images, torch.full((len(images), length), model.eos_id, device=images.device))


# batch, beams, repeats, contenders; on a GPU every one at every size
ALL = ["plain", "fp32", "bf16", "int8", "HF fp32", "HF fp32 medium", "HF bf16"]
ON_GPU = ["plain", "bf16", "bf16 graphs", "fp16", "HF fp32", "HF fp32 medium", "HF bf16", "HF fp16"]
QUICK = [(1, 1, 1, ["plain", "fp32", "bf16", "HF fp32", "HF bf16", ORIGINAL]),
         (1, 5, 1, ["fp32", "bf16", "HF fp32", "HF bf16"])]
PLAN = [(1, 1, 3, [*ALL, ORIGINAL]), (1, 5, 3, ALL),
        (8, 1, 2, ["fp32", "bf16", "HF fp32", "HF bf16"]),
        (8, 5, 1, ["fp32", "bf16", "HF fp32", "HF bf16"]),
        (32, 1, 1, ["fp32", "bf16", "HF fp32"]), (32, 5, 1, ["fp32", "bf16"])]
# batch, beams, ours, what it is set beside, and how many times faster it shall be
WANTED = [(1, 1, "fp32", "HF fp32", 2.7), (1, 1, "fp32", "HF fp32 medium", 1.7),
          (1, 5, "fp32", "HF fp32", 3.8), (1, 5, "fp32", "HF fp32 medium", 2.5),
          (1, 1, "bf16", "HF fp32", 3.8), (1, 1, "bf16", "HF bf16", 2.0),
          (1, 5, "bf16", "HF fp32", 5.5), (1, 5, "bf16", "HF bf16", 2.7), (1, 1, "int8", "HF fp32", 5.0),
          (8, 1, "fp32", "HF fp32", 2.6), (8, 1, "bf16", "HF fp32", 4.2)]


def caption(device, quick):
    plan = QUICK if quick else PLAN
    if device.type == "cuda":
        plan = [(batch, beams, 5, ON_GPU + [ORIGINAL] * (batch == beams))
                for batch in (1, 8, 32, 256) for beams in (1, 5) if batch < 256 or beams == 1]
    model, others, rows, measured = build(), {}, [], {}
    models = {kind: variant(model, kind, device) for kind in plan[0][3] if kind in DTYPES}
    try:
        other = hugging_face()
        copies = {kind: copy.deepcopy(other).to(device, DTYPES[kind]) for kind in DTYPES
                  if f"HF {kind}" in plan[0][3]}
        others = {name: copies[name.split()[1]] for name in plan[0][3] if name.startswith("HF")}
    except ImportError as error:
        print(f"without Hugging Face's model, which needs pip install transformers: {error}", file=sys.stderr)
    S = model.config.vit.image_size
    pictures = torch.randn(plan[-1][0], 3, S, S, generator=torch.Generator().manual_seed(0)).to(device)
    for batch, beams, repeats, names in plan:
        images, flops = pictures[:batch], caption_flops(model.config, batch, beams)
        ways = {kind: partial(ours, own, images, beams) for kind, own in models.items()}
        ways |= {name: partial(hugging_face_captions, other, images, WORDS, beams,
                               "medium" if "medium" in name else None) for name, other in others.items()}
        ways[ORIGINAL] = partial(original_ends, models["plain"], images)
        warm = device.type == "cpu" and len(measured) > 0            # on a GPU each size records its graphs
        seconds = time_interleaved({name: ways[name] for name in names if name in ways}, repeats, device,
                          f"captions, batch {batch}, {beams} beams", warm)
        for name, s in seconds.items():
            s *= WORDS / 2 if name == ORIGINAL else 1
            floor = caption_floor(model, name, flops, device) if name in models else None
            measured[batch, beams, name] = s
            rows.append({"batch": batch, "beams": beams, "what": name, "seconds": s, "images/s": batch / s,
                         "floor": floor, "floor/seconds": floor and floor / s})
    ratios = [{"batch": batch, "beams": beams, "what": f"{name} against {other}", "wanted": least,
               "times faster": measured[batch, beams, other] / measured[batch, beams, name]}
              for batch, beams, name, other, least in WANTED
              if {(batch, beams, name), (batch, beams, other)} <= measured.keys()]
    return {f"Captions of {WORDS} tokens": rows, "Captions, times faster": ratios,
            "Captions, against the plain path": exactness(models, pictures[: 1 if quick else 4])}


@torch.inference_mode()
def exactness(models, images):
    """What each kind of arithmetic changes: logits and likeliest token after the same text, and captions."""
    plain, beams, rows = models["plain"], {"same greedy tokens": 1, "same with 5 beams": 5}, []
    expected = {name: ours(plain, images, count) for name, count in beams.items()}
    text = torch.tensor(expected["same greedy tokens"], device=images.device)
    right, _ = plain(text, plain.encode(images))
    for kind, model in models.items():
        if kind == "plain":
            continue
        logits, _ = model(text, model.encode(images))
        row = {"what": kind, "error of logits": ((logits.float() - right).norm() / right.norm()).item(),
               "same next token": (logits.argmax(-1) == right.argmax(-1)).float().mean().item()}
        for name, count in beams.items():
            row[name] = "yes" if ours(model, images, count) == expected[name] else "no"
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# training


class RandomCaptions(CaptionSet):
    """A set without a folder: each image has 5 captions of random tokens, 13 a caption with the end token."""

    def __init__(self, n_image, vocab_size):
        lengths = np.tile([7, 10, 12, 14, 17], n_image)                              # as Flickr8k's spread
        self.offset = np.concatenate([[0], lengths.cumsum()])
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(vocab_size - 1, size=self.offset[-1]).astype(np.uint16)
        self.captions_of = np.arange(5 * n_image).reshape(n_image, 5)
        self.tokenizer = types.SimpleNamespace(eos_id=vocab_size - 1)


def fusion_steps(model, kind, device, batch_size, resident=0):
    """A function that takes n optimizer steps as train.py does, from cached features.

    The features of `resident` images lie on the GPU; with 0, those of 64 lie in main memory.
    """
    cfg, amp = TrainConfig(), None if kind == "fp32" else DTYPES[kind]
    set_dropout(model, cfg.dropout, everywhere=False)
    model.vit.to(amp)
    model.gpt2.to(amp)
    model.to(device).train()
    if device.type == "cpu":
        fast.pack(model, copies=False)
    model.vit.to("meta")
    optimizer = make_optimizer(trained_parameters(model), cfg)
    trained = [p for p in model.parameters() if p.requires_grad]
    data = RandomCaptions(32 * batch_size, model.eos_id + 1)
    order = itertools.cycle(batches(data, np.arange(32 * batch_size), batch_size, 0, 0))
    features = torch.randn(resident or 64, model.config.vit.n_patch, model.config.vit.n_embd,
                           device=device if resident else CPU, dtype=torch.float16)

    def eyes(images, rng):
        return {"features": features[torch.from_numpy(images % len(features)).to(features.device)]}

    def take(n):
        for batch in load_ahead(lambda _: collate(data, next(order), eyes), range(n)):
            batch = to_device(batch, device)
            plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None), plain:
                loss = model.loss(batch["tokens"], model.encode(**batch["seen"]), batch["targets"],
                                  batch["image"], reduction="sum") / batch["count"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return take


def training_flops(config, batch, length):
    """Operations of a step of 5 captions of `length` targets for each of `batch` images, nothing padded."""
    with torch.device("meta"):
        model = VisionGPT(config)
        features = torch.empty(batch, config.vit.n_patch, config.vit.n_embd)
        tokens = torch.empty(5 * batch, length, dtype=torch.long)
    image = torch.arange(batch).repeat_interleave(5)
    return count_flops(lambda: model(tokens, model.encode(features=features), tokens, image)[1].backward())


@lru_cache
def contender(name, device, size, resident):
    """A function that takes n steps; its model lives as long as this process."""
    if name == ORIGINAL:
        return original_steps(build(), device, size)
    return fusion_steps(build(), name.split()[0], device, size, resident)


def take_steps(n, name, device, size, resident):
    """n training steps of a contender -> peak gigabytes of this process so far."""
    contender(name, device, size, resident)(n)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return peak_memory(device)


def train(device, quick):
    """Contenders run in turn, each in a process of its own, so that its peak memory is known."""
    # images a step (original: captions), how many have their features on the GPU, steps timed, GB at most
    # as many steps are taken before: the first ones still claim memory
    cases = {ORIGINAL: (16, 0, 1, None), "fp32": (16, 0, 4, 2.5), "bf16": (16, 0, 4, 2.0)}
    if quick:
        cases = {ORIGINAL: (2, 0, 1, None), "bf16": (16, 0, 2, 2.0)}
    if device.type == "cuda":
        cases = {ORIGINAL: (16, 0, 5, None), "bf16": (64, 8091, 20, 4.5), "bf16 streamed": (64, 0, 20, 2.2)}
    config, peak, rows = VisionGPTConfig(), {}, []
    flops = training_flops(config, 16, 13) / 80
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(new_process()) for name in cases}

        def run(name, size, resident, steps, _):
            peak[name] = processes[name].submit(take_steps, steps, name, device, size, resident).result()

        ways = {name: partial(run, name, *case) for name, case in cases.items()}
        seconds = time_interleaved(ways, 1 if device.type == "cpu" else 3, device, "training")
    for name, (size, _, steps, most) in cases.items():
        captions, s = size if name == ORIGINAL else 5 * size, seconds[name] / steps
        floor = None if name == ORIGINAL else captions * flops / fastest(name, device)
        rows.append({"what": name, "captions a step": captions, "seconds a step": s,
                     "captions/s": captions / s,
                     "times the original's": captions / s / rows[0]["captions/s"] if rows else 1,
                     "wanted": {"fp32": 60, "bf16": 110}.get(name), "floor/seconds": floor and floor / s,
                     "2 epochs of 30,000, s": 60_000 * s / captions, "peak GB": peak[name], "at most": most})
    return {f"Training, {flops / 1e9:.2f} GFLOP a caption of 13 tokens": rows}


# --------------------------------------------------------------------------------------------------
# features, start-up, scale


def features(device, quick):
    """Preparing pictures and caching ViT features, beside decoding JPEGs and the ViT's own arithmetic."""
    on_gpu, model, number = device.type == "cuda", build(), itertools.count()
    kinds, count = (["bf16"], 1024) if on_gpu else (["fp32", "bf16"], 16 if quick else 24)
    files, S = caption_formats.picture_files(ROOT / "assets/examples") * 32, model.config.vit.image_size
    with tempfile.TemporaryDirectory() as folder:
        seconds = time_interleaved({
            "decode and resize a JPEG": lambda: [resize(load_image(io.BytesIO(caption_formats.read(file))), S)
                                                 for file in files],
            "prepare, all cores": lambda: write_images(folder, decode(files, S), S)}, 2, CPU, "pictures")
        rows = [{"what": name, "ms an image": 1000 * s / len(files)} for name, s in seconds.items()]
        data = write_random_set(folder, itertools.islice(itertools.cycle(decode(files, S)), count), count, S)

        def cache(kind, vit):                       # a new name for the weights, or features would be found
            return cached_features(vit, data, f"{kind}{next(number)}", device, DTYPES[kind])

        seconds = time_interleaved({kind: partial(cache, kind, variant(model, kind, device).vit) for kind in kinds}, 2,
                          device, "features")
    with torch.device("meta"):
        vit = ViT(model.config.vit)
        flops = count_flops(lambda: vit(torch.empty(1, 3, S, S)))
    for kind, s in seconds.items():
        floor = 1000 * flops / fastest(kind, device)
        rows.append({"what": f"cache features, {kind}", "ms an image": 1000 * s / count, "floor, ms": floor,
                     "floor/ms": floor / (1000 * s / count)})
    return {"Pictures and features": rows}


def startup(device, quick):
    model = build()
    ranks = [bytes([b]) for b in range(256)] + [f" w{i}".encode() for i in range(256, model.eos_id)]
    model.tokenizer = Tokenizer("random", {token: rank for rank, token in enumerate(ranks)})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        length = ["--min-length", str(WORDS), "--max-length", str(WORDS), "--device", device.type]
        photo = "sample.py", "assets/examples/coffee.jpg", "--checkpoint", folder, *length
        commands = {"python -c 'import torch'": ["-c", "import torch"],
                    "python sample.py --help": ["sample.py", "--help"], "python sample.py photo.jpg": photo}
        seconds = time_interleaved({name: partial(subprocess.run, [sys.executable, *args], cwd=ROOT, check=True,
                                         stdout=subprocess.DEVNULL) for name, args in commands.items()},
                          2, CPU, "start-up")
    S = model.config.vit.image_size
    run = partial(ours, variant(model, "fp32", device), torch.randn(1, 3, S, S, device=device), 1)
    seconds["a caption once it runs"] = time_interleaved({"": run}, 3, device, "one caption")[""]
    return {"Start-up": [{"what": name, "seconds": s} for name, s in seconds.items()]}


def write_random_set(folder, pictures, count, size):
    """A prepared set of `count` pictures, each with 5 captions of 11 words, in tokens that are bytes."""
    words = np.array("a the dog man woman child runs jumps sits over red blue green ball in with".split())
    texts = [" ".join(row) for row in np.random.default_rng(0).choice(words, (5000, 11))]
    captions = [(i // 5, texts[i % len(texts)]) for i in range(5 * count)]
    write_images(folder, pictures, size)
    splits = {"train": range(count), "val": [], "test": []}
    write_set(folder, [f"{i}.jpg" for i in range(count)], captions, splits, Tokenizer.train([], 257),
              {"image_size": size})
    return CaptionSet(folder)


def scale_of(count, folder):
    """Milliseconds and bytes an image of a set of `count` small pictures, in a process of its own."""
    config = ViTConfig(image_size=16, patch_size=8, n_layer=1, n_head=1, n_embd=16, n_mlp=16)
    row, before = {"images": count}, peak_memory(CPU)

    def stage(name, n, run):
        start = time.perf_counter()
        made = run()
        row[f"{name}, ms"] = 1000 * (time.perf_counter() - start) / n
        return made

    pictures = (np.full((16, 16, 3), i % 256, np.uint8) for i in range(count))
    data = stage("prepare", count, lambda: write_random_set(folder, pictures, count, 16))
    cached = torch.from_numpy(stage("cache", count, lambda: cached_features(
        ViT(config).eval(), data, "", CPU, torch.float32)))
    order = stage("order", count, lambda: batches(data, np.arange(count), 32, 0, 0))
    stage("batch", 32 * len(order[:100]), lambda: [
        collate(data, images, lambda images, rng: {"features": cached[torch.from_numpy(images)]})
        for images in order[:100]])
    test = [data.references(i) for i in range(count // 16)]
    stage("evaluate", len(test), lambda: metrics.score([own[0] for own in test], [own[1:] for own in test]))
    row["disk, bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir()) / count
    return row | {"memory, bytes": (peak_memory(CPU) - before) * 1e9 / count}


def scale(device, quick):
    """Cost an image at the sizes of Flickr8k and COCO. Pictures and ViT are small: what is round them shows.

    At 10 million images memory ends first, in CaptionSet, which holds texts, names and caption indices as
    Python objects; they would move into memory-mapped arrays, like the tokens. Then the disk, with 1.5 TB of
    pixels and 3 TB of features at full size: those would be written in shards, by several machines.
    """
    rows = []
    for count in cli.progress([1000, 4000] if quick else [8000, 120_000], "scale: set"):
        with tempfile.TemporaryDirectory() as folder:
            with new_process() as process:
                rows.append(process.submit(scale_of, count, folder).result())
    return {"Scale: cost an image": rows}


# --------------------------------------------------------------------------------------------------
# the report


def markdown(title, rows):
    """A table of dicts, floats with three digits; a key that a row lacks is an empty cell."""
    def cell(value):
        value = float(f"{value:.3g}") if isinstance(value, float) else value
        return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join([f"\n{title}\n", *(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)])


SECTIONS = {section.__name__: section for section in (machine, caption, train, features, startup, scale)}


@dataclass
class BenchConfig:
    quick: bool = flag(False, "the machine, captions and training alone, with fewer cases, repeated less")
    only: str | None = flag(None, "one section", choices=list(SECTIONS))
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    json: str | None = flag(None, "write all numbers; to stdout, instead of the tables, without FILE",
                            metavar="FILE", const="-")

    def __post_init__(self):
        if self.json not in (None, "-") and (os.path.isdir(self.json) or not Path(self.json).parent.is_dir()):
            raise UserError(f"--json {self.json} is a folder, or in one that does not exist: name a file")


def main(args=None):
    cfg = BenchConfig(**cli.parse(BenchConfig, __doc__, args))
    device, started = cli.pick_device(cfg.device), time.monotonic()
    device = device if device.type == "cuda" else CPU
    results = {"machine": machine_name(device)}
    say = partial(print, file=sys.stderr if cfg.json == "-" else sys.stdout, flush=True)
    say(results["machine"])
    chosen = [cfg.only] if cfg.only else list(SECTIONS)[: 3 if cfg.quick else None]
    for name in chosen:
        for title, rows in SECTIONS[name](device, cfg.quick).items():
            results[title] = rows
            if rows:
                say(markdown(title, rows))
    say(f"\nall in {cli.clock(time.monotonic() - started)}")
    if cfg.json == "-":
        print(json.dumps(results, indent=1))
    elif cfg.json:
        with cli.atomic(cfg.json) as temporary:
            Path(temporary).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
