"""Train Vision-GPT: the fusion round frozen pretrained backbones, or a small model from scratch.

    python train.py --preset shapes     # everything from scratch on drawn scenes: minutes, no download
    python train.py                     # the fusion on Flickr8k, after prepare_flickr8k and convert_weights
    python train.py --resume            # go on with a run that was stopped anywhere, with the same flags
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

import fast
from data import CaptionSet, ImageInputs, batches, clean_caption, collate, load_ahead, to_device
from gpt2 import GPT2Config
from lib import checkpoint, cli, figures
from lib.cli import UserError, flag
from lib.scenes import judge
from model import VisionGPT, VisionGPTConfig
from resampler import ResamplerConfig
from runs import MADE, Log, peak_memory, run_folder, stop_signal
from tokenizer import Tokenizer
from vit import ViTConfig


@dataclass
class TrainConfig:
    preset: str = flag("flickr8k", "defaults to start from", choices=["flickr8k", "mini", "shapes"])
    data: str = flag("data/flickr8k", "prepared set")
    out: str = flag("", "checkpoint folder; out/PRESET when empty")
    weights: str = flag("weights", "folder of vit.safetensors and gpt2.safetensors, from convert_weights.py")
    vit: str = flag("", "ViT file, if it is not the one in --weights")
    gpt2: str = flag("", "GPT-2 file, if it is not the one in --weights")
    init_from: str = flag("", "fine-tune the model in this checkpoint folder")
    train: str = flag("fusion", "what is trained: the resampler and cross-attention, or all",
                      choices=["fusion", "all"])
    epochs: int = flag(8, "passes over the training images")
    max_steps: int = flag(0, "stop after so many optimizer steps; 0: when the epochs are done")
    batch_size: int = flag(32, "images per forward pass")
    captions_per_image: int = flag(0, "captions of an image that come along in a step, drawn anew; 0: all")
    grad_accumulation: int = flag(1, "forward passes per optimizer step")
    learning_rate: float = flag(5e-4, "peak learning rate")
    min_lr: float = flag(5e-5, "learning rate at the end of the cosine")
    warmup_steps: int = flag(100, "optimizer steps of linear warm-up")
    weight_decay: float = flag(0.01, "AdamW's, on matrices only")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 is off")
    dropout: float = flag(0.1, "on attention and MLP outputs of what is trained")
    patch_dropout: float = flag(0.0, "share of the patches left out of a step, where the ViT is trained")
    word_dropout: float = flag(0.0, "share of the words that GPT-2 has to say without seeing them")
    label_smoothing: float = flag(0.0, "share of each target spread over the vocabulary, in training only")
    words_loss: float = flag(0.0, "weight of a second loss that teaches a ViT from scratch to see: its mean "
                                  "patch token alone has to tell the words of the captions")
    augment: bool = flag(False, "random crops and flips; the ViT's features are then not cached")
    blind: bool = flag(False, "replace every picture by the same grey one: the caption-only baseline")
    eval_interval: int = flag(200, "optimizer steps between evaluations")
    eval_images: int = flag(500, "validation images per evaluation, with all their captions")
    save_interval: int = flag(200, "optimizer steps between saves of the training state")
    log_interval: int = flag(20, "optimizer steps between log lines")
    num_samples: int = flag(4, "validation captions shown at each evaluation")
    seed: int = flag(1, "of initial weights, order, augmentation and dropout")
    device: str = flag("auto", "where to compute", choices=cli.DEVICES)
    dtype: str = flag("auto", "of forward and backward; auto: float32, on a GPU bfloat16 or float16",
                      choices=cli.DTYPES)
    threads: int = flag(0, "CPU threads of the arithmetic; 0: PyTorch's choice")
    compile: bool = flag(False, "torch.compile the model: slower to start")
    tracker: str = flag("none", "also log to wandb or tensorboard", choices=["none", "wandb", "tensorboard"])
    resume: bool = flag(False, "go on with the run in --out; all but lengths and intervals is as saved")
    overwrite: bool = flag(False, "start anew in a folder that holds a run")

    def __post_init__(self):
        self.out = self.out or f"out/{self.preset}"
        at_least = dict(epochs=1, max_steps=0, batch_size=1, captions_per_image=0, grad_accumulation=1,
                        learning_rate=0, min_lr=0, warmup_steps=0, weight_decay=0, grad_clip=0, dropout=0,
                        patch_dropout=0, word_dropout=0, label_smoothing=0, words_loss=0, seed=0,
                        eval_interval=1, eval_images=1, save_interval=1, log_interval=1, num_samples=0,
                        threads=0)
        for name, low in at_least.items():
            value = getattr(self, name)
            below_one = name.endswith("dropout") or name == "label_smoothing"
            if not low <= value < (1 if below_one else math.inf):                # nan is refused too
                limits = "from 0 to below 1" if below_one else f"at least {low}"
                raise UserError(f"--{name.replace('_', '-')} is {value}, but must be {limits}")
        if (self.vit or self.gpt2) and (self.init_from or self.preset != "flickr8k"):
            raise UserError("--vit and --gpt2 start a model of preset flickr8k: leave them out with "
                            "--init-from or another preset")
        if (self.words_loss or self.patch_dropout) and self.train != "all":
            raise UserError("--words-loss and --patch-dropout are for a ViT that is trained: add --train all")
        if self.resume and self.overwrite:
            raise UserError("--resume goes on with the run, --overwrite throws it away: give one of them")
        if os.environ.get("WORLD_SIZE", "") not in ("", "0", "1"):
            raise UserError("training runs on one GPU: start it with python train.py, "
                            "without torchrun or WORLD_SIZE")


MINI_VOCABULARY = 3072                 # tokens of the BPE that the mini preset trains on its captions

PRESETS = {
    "flickr8k": {},
    "mini": dict(train="all", batch_size=64, captions_per_image=2, epochs=60, learning_rate=1e-3, min_lr=1e-5,
                 warmup_steps=200, weight_decay=0.05, dropout=0.1, patch_dropout=0.5, word_dropout=0.2,
                 label_smoothing=0.1, words_loss=1.0, augment=True, eval_interval=500, eval_images=1000,
                 save_interval=500, log_interval=50),
    "shapes": dict(data="data/shapes", train="all", batch_size=8, epochs=3, learning_rate=1e-3, min_lr=1e-5,
                   dropout=0.0, eval_interval=1000, eval_images=200, save_interval=500, log_interval=100,
                   threads=1),         # layers so small that a second thread costs more than it does
}
# what training_state.pt holds
STATE = {"model", "optimizer", "scaler", "step", "best", "losses", "backbones", "config"}
# may differ between a run and its --resume; the first two move the end of the learning rate's cosine
RESUMABLE = ("epochs", "max_steps", "eval_interval", "save_interval", "log_interval", "device", "compile",
             "tracker", "num_samples", "resume")


def scratch_config(preset, vocab_size, n_positions):
    """The small models that are trained from scratch, by preset."""
    if preset == "shapes":
        # a patch holds a cell of the drawing; mean and std make the pale ground nearly zero
        vit = ViTConfig(image_size=96, patch_size=32, n_layer=2, n_head=4, n_embd=128, n_mlp=256,
                        mean=(0.92,) * 3, std=(0.3,) * 3)
        gpt2 = GPT2Config(n_layer=3, n_head=4, n_embd=128)
        resampler = ResamplerConfig(n_latent=16, n_layer=1, n_head=4, head_width=32, n_mlp=256)
    else:
        vit = ViTConfig(image_size=128, patch_size=16, n_layer=6, n_head=4, n_embd=256, n_mlp=512)
        gpt2 = GPT2Config(n_layer=3, n_head=4, n_embd=256)
        resampler = ResamplerConfig(n_latent=32, n_layer=1, n_head=4, head_width=64, n_mlp=256)
    gpt2.vocab_size, gpt2.n_positions = vocab_size, n_positions
    return VisionGPTConfig(vit, gpt2, resampler)


# --------------------------------------------------------------------------------------------------
# pieces of the loop


def learning_rate(step, total, cfg):
    """Linear warm-up to the peak, then a cosine that comes down to min_lr when `total` steps are done."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, total - cfg.warmup_steps)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2


def trained_parameters(model, words=None):
    """{name: parameter} of what is trained, the head of `words_loss` included."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return named | {f"words.{name}": p for name, p in (words.named_parameters() if words else ())}


def make_optimizer(named, cfg):
    """AdamW over {name: parameter}; weight decay on matrices only, not on norms, biases and latents."""
    matrix = {name: p for name, p in named.items()
              if p.ndim >= 2 and not name.endswith(("latents", "_token", "_embed"))}
    other = [p for name, p in named.items() if name not in matrix]
    groups = [{"params": list(matrix.values()), "weight_decay": cfg.weight_decay},
              {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.98 if cfg.train == "all" else 0.999),
                             fused=other[0].device.type in ("cpu", "cuda"))


@torch.no_grad()
def validate(model, data, eyes, images, batch_size, autocast):
    """Mean loss per target over all captions of `images`, looking at their own image and at a neighbour's."""
    model.eval()
    images = images[np.argsort(data.longest(images), kind="stable")]
    own = other = count = 0.0
    parts = np.array_split(images, max(1, len(images) // max(2, batch_size)))      # 1 has no neighbour
    for part in cli.progress(parts, "validation: batch"):
        batch = to_device(collate(data, part, eyes), model.device)
        with autocast():
            visual = model.encode(**batch["seen"])
            args = dict(visual=visual, targets=batch["targets"], reduction="sum")
            own += model.loss(batch["tokens"], image=batch["image"], **args).item()
            other += model.loss(batch["tokens"], image=(batch["image"] + 1) % len(part), **args).item()
        count += batch["count"]
    model.train()
    return own / count, other / count


def write_captions(model, data, eyes, images, autocast):
    """Greedy captions of `images`."""
    model.eval()
    texts, room = [], model.config.gpt2.n_positions - 1
    for i in cli.progress(range(0, len(images), 32), "captions: batch"):
        with autocast(), torch.inference_mode():
            seen = {name: t.to(model.device) for name, t in eyes(images[i : i + 32]).items()}
            visual = model.encode(**seen)
        with autocast():
            texts += model.generate(visual=visual, max_length=min(50, room))
    model.train()
    return texts


# --------------------------------------------------------------------------------------------------
# the run


def settings(given):
    """Flags given on the command line -> TrainConfig, and the state of the run to resume or None."""
    base = {**PRESETS[given.get("preset", "flickr8k")], **given}
    cfg = TrainConfig(**base)
    state_file = Path(cfg.out) / "training_state.pt"
    if not cfg.resume:
        return cfg, None
    if not state_file.exists():
        print(f"{state_file} does not exist: starting at step 0", file=sys.stderr)
        return cfg, None
    try:
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        saved = state["config"]
        if saved.keys() != dataclasses.asdict(cfg).keys() or not STATE <= state.keys():
            raise KeyError
    except Exception as error:                                    # a damaged file fails in many ways
        raise UserError(f"{state_file} is damaged or of another version ({type(error).__name__}); "
                        f"start again with --overwrite") from None
    for name, value in given.items():
        if name not in RESUMABLE and name != "out" and value != saved[name]:
            raise UserError(f"the run in {cfg.out} was started with {name} {saved[name]!r}, not {value!r}; "
                            f"leave the flag out to go on with it, or start a new run in another --out")
    changed = {name: value for name, value in given.items() if name in RESUMABLE}
    return TrainConfig(**{**saved, **changed, "out": cfg.out, "overwrite": False}), state


def build_model(cfg):
    """The model to train, on the CPU in float32, and the data in its tokens."""
    if cfg.init_from:
        model = VisionGPT.from_pretrained(cfg.init_from, "cpu", torch.float32, cfg.weights)
        data = CaptionSet(cfg.data, model.require_tokenizer())
    elif cfg.preset == "flickr8k":
        files = {"vit": Path(cfg.vit or f"{cfg.weights}/vit.safetensors"),
                 "gpt2": Path(cfg.gpt2 or f"{cfg.weights}/gpt2.safetensors")}
        beside = files["gpt2"].parent
        data = CaptionSet(cfg.data, Tokenizer.load(beside) if (beside / "tokenizer.json").exists() else None)
        if missing := [str(file) for file in files.values() if not file.exists()]:
            raise UserError(f"{' and '.join(missing)} missing: run python convert_weights.py, or name their "
                            f"folder with --weights; --preset shapes needs none")
        model = VisionGPT.from_backbones(files, data.tokenizer)
        model.require_tokenizer()                                        # raises UserError if it is not GPT-2's
    else:
        data = CaptionSet(cfg.data)
        if cfg.preset == "mini":
            clean = clean_caption if data.preprocessing["clean_captions"] else str
            texts = [clean(text) for i in data.split("train") for text in data.references(i)]
            data = CaptionSet(cfg.data, Tokenizer.train(texts, MINI_VOCABULARY))
        positions = max(64, 1 + int(np.diff(data.offset).max()))
        model = VisionGPT(scratch_config(cfg.preset, data.tokenizer.vocab_size, positions), data.tokenizer)
    set_dropout(model, cfg.dropout, cfg.train == "all", cfg.patch_dropout)
    return model.freeze(cfg.train == "fusion"), data


def set_dropout(model, p, everywhere, patches=0.0):
    """Give the fusion, or with `everywhere` the backbones too, the dropout of this run."""
    parts = [(model.config.resampler, model.resampler), (model.config.resampler, model.xattn)]
    parts += [(model.config.vit, model.vit), (model.config.gpt2, model.gpt2)] if everywhere else []
    for config, part in parts:
        config.dropout = p
        for module in part.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = p
    model.config.vit.patch_dropout = patches if everywhere else 0.0


def word_dropout(tokens, share, eos_id):
    """Word dropout (Bowman et al. 2016): that share of tokens (R, T) becomes the end token."""
    if not share:
        return tokens
    hidden = torch.rand(tokens.shape, device=tokens.device) < share
    return tokens.masked_fill(hidden, eos_id)


def words_head(model, data):
    """The linear layer of `words_loss`; it starts by telling how often each token occurs at all."""
    head = torch.nn.Linear(model.config.vit.n_embd, data.tokenizer.vocab_size)
    counts = sum(torch.from_numpy(data.words([i])) for i in data.split("train"))[0]
    head.weight.data.zero_()
    head.bias.data.copy_((counts + 0.1).log() - (counts + 0.1).sum().log())
    return head


def words_loss(logits, words):
    """Summed cross-entropy of an image's logits (B, V) against its captions' tokens, counts (B, V)."""
    return -(words * logits.float().log_softmax(-1)).sum()


def compute_dtype(name, device):
    """The dtype of forward and backward, None for float32; auto: a GPU's bfloat16 or float16."""
    dtype = cli.pick_dtype(name)
    if dtype is None and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return None if dtype == torch.float32 else dtype


def check_lengths(data, model):
    """Raise UserError when a caption is longer than GPT-2's positions."""
    longest, room = int(np.diff(data.offset).max()), model.config.gpt2.n_positions - 1
    if longest > room:
        text = data.captions[int(np.diff(data.offset).argmax())]
        raise UserError(f"a caption of {longest} tokens is too long for GPT-2, which has room for {room}: "
                        f"{text[:60]!r}...; shorten it and prepare the set again")


say = functools.partial(print, flush=True)


def finish(cfg, out, log, images, model, data, eyes, autocast):
    """What one looks at after a run: loss.png, samples.png; for drawn scenes the share of right captions."""
    curves = {name: log.curve(name) for name in ("loss", "val_loss", "val_loss_shuffled")}
    figures.save(figures.loss_curve(curves), out / "loss.png")
    shown = images["val"][:12]
    texts = write_captions(model, data, eyes, shown, autocast)
    sheet = figures.contact_sheet([Image.fromarray(data.images[i]) for i in shown], texts)
    figures.save(sheet, out / "samples.png")
    say(f"{out} holds the best model, log.jsonl, loss.png and samples.png")
    if Path(cfg.data, "scenes.jsonl").exists():
        scenes = [json.loads(line) for line in Path(cfg.data, "scenes.jsonl").read_text().splitlines()]
        test = data.split("test")
        texts = write_captions(model, data, eyes, test, autocast)
        right = sum(judge(text, scenes[i]) for text, i in zip(texts, test))
        say(f"{right} of {len(test)} greedy captions of unseen test scenes are right in every word "
            f"({100 * right / len(test):.1f} %)")


def train(cfg, state=None):
    """Train as `cfg` says, from `state` where a run goes on; returns the best validation loss.

    What is random in a step (order, crops, dropout) follows from (seed, step) alone, so a resumed run repeats
    exactly what an unbroken one would have done; dropout draws for the tokens in the order of gpt2.Ragged.
    Raises UserError for what the user can mend.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(cfg.threads or before)
        with run_folder(cfg) as out:
            return run(cfg, state, out)
    finally:
        torch.set_num_threads(before)


def run(cfg, state, out):
    device = cli.pick_device(cfg.device)
    amp = compute_dtype(cfg.dtype, device)
    if cfg.preset == "shapes" and not Path(cfg.data, "meta.json").exists():
        import prepare_shapes
        prepare_shapes.prepare(prepare_shapes.ShapesConfig(out=cfg.data))
    torch.manual_seed(cfg.seed % 2**63)
    model, data = build_model(cfg)
    images = {name: data.split(name) for name in ("train", "val")}
    check_lengths(data, model)
    words = words_head(model, data) if cfg.words_loss else None
    trained = trained_parameters(model, words)
    hashes = {name: checkpoint.read_metadata(file).get("sha256") for name, file in model.backbones.items()}
    if model.frozen and not hashes:                                   # of a complete checkpoint
        hashes = {name: checkpoint.sha256(getattr(model, name).state_dict()) for name in ("vit", "gpt2")}
    hashes["captions"] = data.fingerprint()
    if state and (state["backbones"] != hashes or
                  any(p.shape != state["model"][name].shape for name, p in trained.items())):
        raise UserError(f"the weights or the data are no longer those that the run in {out} was started with")

    kept = model.backbones if model.frozen else None                  # not saved again
    frozen_dtype = amp if kept and amp else torch.float32
    eyes = ImageInputs(model, data, cfg, device, frozen_dtype)
    if model.frozen:
        model.vit.to(frozen_dtype)
        model.gpt2.to(frozen_dtype)
    model.to(device)
    if device.type == "cpu" and not cfg.compile:
        fast.pack(model, copies=False)                                # long inputs gain nothing by them
    if eyes.features is not None:
        model.vit.to("meta" if kept else "cpu")                       # its work is done, its file remains
    if words:
        words.to(device)
    optimizer = make_optimizer(trained, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    step, best, losses = 0, math.inf, []                              # losses: since the last log line
    epoch_size = math.ceil(len(images["train"]) / cfg.batch_size)
    total = max(1, cfg.epochs * epoch_size // cfg.grad_accumulation)
    total = min(total, cfg.max_steps) if cfg.max_steps else total
    if state:
        for name, p in trained.items():
            p.data.copy_(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:                                           # none where the loss was not scaled
            scaler.load_state_dict(state["scaler"])
        step, losses = state["step"], [torch.tensor(v, device=device) for v in state.get("losses", [])]
        best = state["best"] if (out / "config.json").exists() else math.inf
    if cfg.overwrite:
        for name in MADE:
            (out / name).unlink(missing_ok=True)
    log = Log(out / "log.jsonl", step, cfg)
    count = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{size:,} of {count:,} parameters trained on "
        f"{len(images['train']):,} images of {cfg.data}; {total} steps on {device}, {amp or torch.float32}")

    @functools.lru_cache(2)
    def order(epoch):
        return batches(data, images["train"], cfg.batch_size, cfg.seed, epoch)

    def make_step(step):
        """The batches of an optimizer step."""
        numbers = range(step * cfg.grad_accumulation, (step + 1) * cfg.grad_accumulation)
        made = []
        for n in numbers:
            chosen = order(n // epoch_size)[n % epoch_size]
            made.append(collate(data, chosen, eyes, np.random.default_rng([cfg.seed, 1, n]),
                                cfg.captions_per_image))
            if words:
                made[-1]["words"] = torch.from_numpy(data.words(chosen))
        return made

    @contextlib.contextmanager
    def autocast():
        # with rows this short, the CPU's fused attention is slower than plain matmul and softmax
        plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None), plain:
            yield

    def save_state():
        with cli.atomic(out / "training_state.pt") as file:
            torch.save({"model": {name: p.detach() for name, p in trained.items()},
                        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                        "step": step, "best": best, "losses": [loss.item() for loss in losses],
                        "backbones": hashes, "config": dataclasses.asdict(cfg)}, file)

    def evaluate():
        nonlocal best
        chosen = images["val"][: cfg.eval_images]
        own, other = validate(model, data, eyes, chosen, cfg.batch_size, autocast)
        log.write(step, val_loss=own, val_loss_shuffled=other)
        say(f"step {step}: validation loss {own:.4f}, with another image {other:.4f}")
        shown = chosen[: cfg.num_samples]
        for image, text in zip(shown, write_captions(model, data, eyes, shown, autocast)):
            say(f"  {data.names[image]}: {text}   (reference: {data.references(image)[0]})")
        if own < best:
            best = own
            summary = dict(step=step, val_loss=own, val_loss_shuffled=other, preset=cfg.preset, data=cfg.data,
                           photographs=not (cfg.blind or Path(cfg.data, "scenes.jsonl").exists()),
                           blind=cfg.blind)
            model.save_pretrained(out, torch.float32, kept, summary)

    loss_of = torch.compile(model.loss) if cfg.compile else model.loss
    captions, since, started = 0, step, time.monotonic()
    model.train()
    with stop_signal() as asked:
        for parts in load_ahead(make_step, range(step, total)):
            torch.manual_seed((cfg.seed * 1_000_003 + step) % 2**63)
            lr = learning_rate(step, total, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            count, step_loss = sum(part["count"] for part in parts), 0.0
            n_words = max(1, sum(part["words"].sum().item() for part in parts)) if words else 1
            for part in parts:
                part = to_device(part, device)
                tokens = word_dropout(part["tokens"], cfg.word_dropout, model.eos_id)
                with autocast():
                    seen, second = part["seen"], None
                    if words:
                        seen = {"features": model.vit(seen["images"])[:, 1:]}
                        second = words_loss(words(seen["features"].mean(1)), part["words"]) / n_words
                    loss = loss_of(tokens, model.encode(**seen), part["targets"], part["image"],
                                   label_smoothing=cfg.label_smoothing, reduction="sum") / count
                    total_loss = loss if second is None else loss + cfg.words_loss * second
                scaler.scale(total_loss).backward()
                step_loss = step_loss + loss.detach()
                captions += len(tokens)
            scaler.unscale_(optimizer)
            if cfg.grad_clip:
                torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(step_loss)
            step += 1

            logs, evaluates, saves = (step == total or step % interval == 0 for interval in
                                      (cfg.log_interval, cfg.eval_interval, cfg.save_interval))
            saves = saves or bool(asked)
            if logs or evaluates or saves or device.type == "cpu":
                values = torch.stack(losses).tolist()                 # on a GPU, where the host waits for it
                for number, value in enumerate(values, step - len(values) + 1):
                    if not math.isfinite(value):
                        raise UserError(f"the loss became {value} at step {number}; {out} holds the last "
                                        "good checkpoint: lower --learning-rate, or use --dtype float32")
            if logs:
                loss, seconds = sum(values) / len(values), time.monotonic() - started
                speed, left = captions / seconds, (total - step) * seconds / (step - since)
                memory = peak_memory(device)
                log.write(step, loss=loss, lr=lr, captions_per_s=round(speed, 1), memory_gb=memory)
                say(f"step {step}/{total}  loss {loss:.4f}  lr {lr:.1e}  {speed:.0f} captions/s  "
                    f"{memory:.1f} GB  {cli.clock(left)} left")
                losses, captions, since, started = [], 0, step, time.monotonic()
            if evaluates:
                before = time.monotonic()
                evaluate()
                started += time.monotonic() - before
            if saves:
                save_state()
            if saves and asked:                                       # if asked just now: after another step
                say(f"stopped after step {step}; go on with the same command and --resume")
                raise KeyboardInterrupt
    file = out / ("fusion.safetensors" if kept else "model.safetensors")
    if file.exists():                                                 # show the best model, not the last
        model.load_state_dict(model.state_dict() | checkpoint.read_tensors(file))
    finish(cfg, out, log, images, model, data, eyes, autocast)
    return best


def main():
    cfg, state = settings(cli.parse(TrainConfig, __doc__))
    try:
        train(cfg, state)
    except (RuntimeError, MemoryError) as error:
        signs = "out of memory", "can't allocate memory", "ALLOC_FAILED"
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in signs):
            raise
        raise UserError(f"out of memory: lower --batch-size ({cfg.batch_size}) and raise --grad-accumulation "
                        f"({cfg.grad_accumulation}) as much; --dtype bfloat16 needs less too") from None


if __name__ == "__main__":
    cli.run(main)
