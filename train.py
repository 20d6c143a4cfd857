"""Train Vision-GPT: the fusion between frozen pretrained backbones, or a small model from scratch.

    python train.py --preset shapes     # everything from scratch on drawn scenes: minutes, no download
    python train.py                     # the fusion on Flickr8k, after prepare_flickr8k and convert_weights
    python train.py --preset mini       # a small captioner behind the frozen ViT of assets/mini
    python train.py --resume            # continue a run that was stopped anywhere, with the same flags
    torchrun --nproc-per-node 2 train.py --batch-size 16 --grad-accumulation 2   # the same steps on two GPUs
"""

if __name__ == "__main__":
    import lib.startup  # noqa: F401  before torch

import contextlib
import functools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fast
import prepare_shapes
from data import CaptionSet, ImageInputs, collate, epoch_batches, pin, to_device
from decoding import DecodingConfig
from gpt2 import GPT2Config
from lib import checkpoint, cli, distributed, figures
from lib.cli import UserError, flag
from lib.drafts import count_drafts
from lib.metrics import Reward, score
from lib.prepared_set import clean_caption
from lib.runs import RUN_FILES, Log, TrainState, cpu_threads, peak_memory, read_state, run_folder, stop_signal
from lib.scenes import judge, read_scenes
from model import VisionGPT, VisionGPTConfig
from resampler import ResamplerConfig
from tokenizer import Tokenizer, pack_captions
from vit import ViT, ViTConfig


@dataclass
class TrainConfig:
    preset: str = flag("flickr8k", "defaults to start from", choices=["flickr8k", "mini", "shapes"])
    data: str = flag("data/flickr8k", "folder of a prepared dataset")
    out: str = flag("", "checkpoint folder; out/PRESET when empty")
    weights: str = flag("weights", "folder of vit.safetensors and gpt2.safetensors, from convert_weights.py")
    vit: str = flag("", "ViT file to use instead of that in --weights or --init-from; with preset mini, a "
                        "checkpoint will do")
    gpt2: str = flag("", "GPT-2 file to use instead of that in --weights")
    init_from: str = flag("", "fine-tune the model in this checkpoint folder")
    train: str = flag("fusion", "what to train: resampler and cross-attention, also GPT-2, or everything",
                      choices=["fusion", "text", "all"])
    epochs: int = flag(8, "passes over the training images", min=1)
    max_steps: int = flag(0, "stop after this many optimizer steps; 0: when the epochs are done", min=0)
    batch_size: int = flag(32, "images per forward pass", min=1, max=65536)
    captions_per_image: int = flag(0, "captions per image in a step, drawn at random; 0: all of them", min=0)
    grad_accumulation: int = flag(1, "forward passes per optimizer step", min=1, max=65536)
    learning_rate: float = flag(5e-4, "peak learning rate", min=0, max=1000)
    min_lr: float = flag(5e-5, "learning rate at the end of the cosine, if below the peak", min=0, max=1000)
    warmup_steps: int = flag(100, "optimizer steps of linear warm-up, at most a tenth of the run", min=0)
    weight_decay: float = flag(0.01, "AdamW weight decay, on matrices only", min=0, max=1000)
    grad_clip: float = flag(1.0, "largest gradient norm; 0 turns clipping off", min=0, max=1e9)
    dropout: float = flag(0.1, "dropout on attention and MLP outputs of the trained parts", min=0, max=0.99)
    word_dropout: float = flag(0.0, "share of the input tokens replaced by the end token; targets stay",
                               min=0, max=0.99)
    label_smoothing: float = flag(0.0, "share of each target spread over the vocabulary, in training only",
                                  min=0, max=0.99)
    augment: bool = flag(False, "random crops and flips; the ViT's features are then not cached")
    self_critical: int = flag(0, "captions sampled per image in a step, rewarded by CIDEr-D (self-"
                                 "critical training); 0: learn from the reference captions", min=0, max=1024)
    blind: bool = flag(False, "replace every picture by the same grey one: the caption-only baseline")
    eval_interval: int = flag(200, "optimizer steps between evaluations", min=1)
    eval_images: int = flag(500, "validation images per evaluation, with all their captions", min=1)
    eval_captions: int = flag(0, "how many of the --eval-images to caption and score; 0: none", min=0)
    select: str = flag("loss", "validation score that picks the checkpoint", choices=["loss", "CIDEr"])
    save_interval: int = flag(200, "optimizer steps between saves of the training state", min=1)
    log_interval: int = flag(20, "optimizer steps between log lines", min=1)
    num_samples: int = flag(4, "validation captions shown at each evaluation", min=0)
    seed: int = flag(1, "seed of initial weights, order, augmentation and dropout", min=0)
    device: str = flag("auto", "where to compute", choices=cli.DEVICES)
    dtype: str = flag("auto", "autocast dtype; auto: bfloat16 or float16 on a CUDA GPU, else float32",
                      choices=cli.DTYPES)
    threads: int = flag(0, "CPU threads; 0: PyTorch's choice", min=0, max=256)
    tracker: str = flag("none", "also log to wandb or tensorboard", choices=["none", "wandb", "tensorboard"])
    resume: bool = flag(False, "continue the run in --out with its saved settings; only --epochs, "
                         "--max-steps, the intervals, --num-samples, --tracker and --device may change")
    overwrite: bool = flag(False, "discard the run in --out and start again")

    def __post_init__(self):
        self.out = self.out or f"out/{self.preset}"
        cli.check_ranges(self)
        if self.gpt2 and (self.init_from or self.preset != "flickr8k"):
            raise UserError("--gpt2 is only for a new model of preset flickr8k: leave it out with "
                            "--init-from or another preset")
        if os.path.isdir(self.vit) and (self.init_from or self.preset == "flickr8k"):
            raise UserError(f"--vit {self.vit} is a folder: name a vit.safetensors, from convert_weights.py")
        if self.vit and self.preset == "shapes":
            raise UserError("--vit cannot go with preset shapes, which trains a ViT of its own: leave it out")
        if self.self_critical and (self.self_critical < 2 or not self.init_from):
            raise UserError("--self-critical samples at least 2 captions per image from a trained model: "
                            "name its folder with --init-from")
        if self.self_critical and (self.captions_per_image or self.word_dropout or self.label_smoothing):
            raise UserError("--captions-per-image, --word-dropout and --label-smoothing are for learning "
                            "from reference captions: leave them out with --self-critical")
        if self.select == "CIDEr" and self.eval_captions < 2:        # what all captions say counts nothing
            raise UserError("--select CIDEr needs captions to score: add --eval-captions 500")
        if self.resume and self.overwrite:
            raise UserError("--resume continues the run, --overwrite throws it away: give one of them")
        if self.init_from and os.path.realpath(self.init_from) == os.path.realpath(self.out):
            raise UserError(f"--init-from {self.init_from} would be overwritten: name another --out")


MINI_VOCABULARY = 3072                 # tokens of the BPE that the mini preset trains on its captions
MINI_VIT = checkpoint.ROOT / "assets/mini"        # the checkpoint whose ViT the mini preset reuses
FROZEN = {"fusion": ("vit", "gpt2"), "text": ("vit",), "all": ()}                  # by what is trained

PRESETS = {
    "flickr8k": {},
    "mini": dict(train="text", batch_size=64, captions_per_image=2, epochs=12, learning_rate=1e-3,
                 min_lr=1e-5, weight_decay=0.05, dropout=0.2, word_dropout=0.2, label_smoothing=0.1,
                 eval_interval=376, eval_images=1000, eval_captions=1000, log_interval=50),
    "shapes": dict(data="data/shapes", train="all", batch_size=8, epochs=3, learning_rate=1e-3, min_lr=1e-5,
                   dropout=0.0, eval_interval=1000, eval_images=200, save_interval=500, log_interval=100,
                   threads=1),         # layers so small that a second thread costs more than it gains
}
# in place of the preset's with --self-critical; without crops and dropout it learns the pictures by heart
SELF_CRITICAL = dict(epochs=6, learning_rate=2e-4, min_lr=1e-5, warmup_steps=5, augment=True, dropout=0.1,
                     captions_per_image=0, word_dropout=0.0, label_smoothing=0.0, eval_interval=94,
                     eval_images=1000, eval_captions=1000, select="CIDEr")
# may differ between a run and its --resume; the first two move the end of the learning rate's cosine
RESUMABLE = ("epochs", "max_steps", "eval_interval", "save_interval", "log_interval", "device", "tracker",
             "num_samples", "resume")


def scratch_config(preset: str, vocab_size: int, n_positions: int, vit: ViTConfig | None) -> VisionGPTConfig:
    """The small models that are trained from scratch, by preset; mini reuses a finished ViT."""
    if preset == "shapes":
        # a patch holds a cell of the drawing; mean and std make the pale ground nearly zero
        vit = ViTConfig(image_size=96, patch_size=32, n_layer=2, n_head=4, n_embd=128, n_mlp=256,
                        mean=(0.92,) * 3, std=(0.3,) * 3)
        gpt2 = GPT2Config(n_layer=3, n_head=4, n_embd=128)
        resampler = ResamplerConfig(n_latent=16, n_layer=1, n_head=4, head_width=32, n_mlp=256)
    else:
        gpt2 = GPT2Config(n_layer=3, n_head=4, n_embd=256)
        resampler = ResamplerConfig(n_latent=32, n_layer=1, n_head=4, head_width=64, n_mlp=256)
    gpt2.vocab_size, gpt2.n_positions = vocab_size, n_positions
    return VisionGPTConfig(vit, gpt2, resampler)


def resolve_config(given: dict) -> tuple[TrainConfig, dict | None]:
    """The flags of the command line -> the settings of the run, and the saved state to resume or None."""
    rewarded = SELF_CRITICAL if given.get("self_critical") else {}
    cfg = TrainConfig(**{**PRESETS[given.get("preset", "flickr8k")], **rewarded, **given})
    saved = read_state(Path(cfg.out) / "training_state.pt", TrainConfig) if cfg.resume else None
    if saved is None:
        return cfg, None
    for name, value in given.items():
        if name not in RESUMABLE and name != "out" and value != saved["config"][name]:
            raise UserError(f"the run in {cfg.out} was started with {name} {saved['config'][name]!r}, not "
                            f"{value!r}; leave the flag out to continue it, or start anew in another --out")
    changed = {name: value for name, value in given.items() if name in RESUMABLE}
    return TrainConfig(**{**saved["config"], **changed, "out": cfg.out, "overwrite": False}), saved


# --------------------------------------------------------------------------------------------------
# model and optimizer


def build_model(cfg: TrainConfig) -> tuple[VisionGPT, CaptionSet]:
    """The model to train, on the CPU in float32, and the data in its tokens."""
    if cfg.init_from:
        model = VisionGPT.from_pretrained(cfg.init_from, "cpu", torch.float32, cfg.weights)
        if cfg.vit:
            vit, width = read_vit(Path(cfg.vit)), model.config.vit.n_embd
            if vit.config.n_embd != width:
                raise UserError(f"the ViT in {cfg.vit} has width {vit.config.n_embd}, but the model's own "
                                f"has {width}: give one of the same width")
            model.vit, model.config.vit = vit, vit.config
            if model.backbones:
                model.backbones["vit"] = Path(cfg.vit)
        data = CaptionSet(cfg.data, model.require_tokenizer())
    elif cfg.preset == "flickr8k":
        files = {"vit": Path(cfg.vit or f"{cfg.weights}/vit.safetensors"),
                 "gpt2": Path(cfg.gpt2 or f"{cfg.weights}/gpt2.safetensors")}
        beside = files["gpt2"].parent
        data = CaptionSet(cfg.data, Tokenizer.load(beside) if (beside / "tokenizer.json").exists() else None)
        if missing := [str(file) for file in files.values() if not file.exists()]:
            raise UserError(f"{' and '.join(missing)} missing: run python convert_weights.py, or name their "
                            f"folder with --weights; --preset shapes needs no weights")
        model = VisionGPT.from_backbones(files, data.tokenizer)
        model.require_tokenizer()                                     # raises UserError if it is not GPT-2's
    else:
        data, vit = CaptionSet(cfg.data), None
        if cfg.preset == "mini":
            vit = read_vit(Path(cfg.vit or MINI_VIT))
            clean = clean_caption if data.preprocessing["clean_captions"] else str
            texts = [clean(text) for i in data.split("train") for text in data.references(i)]
            data = CaptionSet(cfg.data, Tokenizer.train(texts, MINI_VOCABULARY))
        positions = max(64, 1 + int(np.diff(data.offset).max()))
        config = scratch_config(cfg.preset, data.tokenizer.vocab_size, positions, vit and vit.config)
        model = VisionGPT(config, data.tokenizer, vit)
    model.freeze(*FROZEN[cfg.train])
    set_dropout(model, cfg.dropout)
    data.check_lengths(np.arange(len(data.names)), model.config.gpt2.n_positions - 1)
    return model, data


def read_vit(place: Path) -> ViT:
    """The ViT in a file, or in the whole checkpoint in a folder, in float32."""
    if place.is_dir():
        return VisionGPT.from_pretrained(place, "cpu", torch.float32).vit
    return ViT.from_pretrained(place).float()


def set_dropout(model: VisionGPT, p: float) -> None:
    """Give what is trained the dropout of this run."""
    for name in {"vit", "gpt2", "resampler"} - {*model.frozen}:
        getattr(model.config, name).dropout = p
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):                      # which does nothing in a frozen part
            module.p = p


def trained_parameters(model: VisionGPT) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def configure_optimizer(model: VisionGPT, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; weight decay on matrices only, not on norms, biases or learned tokens."""
    named = trained_parameters(model)
    matrix = {name: p for name, p in named.items()
              if p.ndim >= 2 and not name.endswith(("latents", "_token", "_embed"))}
    other = [p for name, p in named.items() if name not in matrix]
    groups = [{"params": list(matrix.values()), "weight_decay": cfg.weight_decay},
              {"params": other, "weight_decay": 0.0}]
    betas = 0.9, 0.999 if cfg.train == "fusion" else 0.98
    return torch.optim.AdamW(groups, cfg.learning_rate, betas, fused=model.device.type in ("cpu", "cuda"))


def get_lr(step: int, total: int, cfg: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine that comes down to min_lr when `total` steps are done."""
    peak, warmup = cfg.learning_rate, min(cfg.warmup_steps, total // 10)
    low = min(cfg.min_lr, peak)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return low + (peak - low) * (1 + math.cos(math.pi * min(1, done))) / 2


@contextlib.contextmanager
def autocast(device: torch.device, amp: torch.dtype | None):
    """Mixed precision; on the CPU also plain attention, whose backward is faster there on short rows."""
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, dtype=amp, enabled=amp is not None), plain:
        yield


# --------------------------------------------------------------------------------------------------
# what the loop is made of


def steps_per_epoch(cfg: TrainConfig, n_train: int) -> int:
    """Optimizer steps of batch_size * grad_accumulation images; each forward pass has some of them."""
    return math.ceil((n_train - cfg.grad_accumulation + 1) / (cfg.batch_size * cfg.grad_accumulation))


def training_batches(data: CaptionSet, inputs: ImageInputs, cfg: TrainConfig,
                     steps: range) -> Iterator[list[dict]]:
    """This process' share of the micro-batches of each optimizer step.

    They follow from (seed, number of the forward pass) alone, the seed of what is random on the way included.
    The images of a step are the same for half the batch size with twice the accumulation.
    """
    images, passes = data.split("train"), cfg.grad_accumulation
    per_epoch = steps_per_epoch(cfg, len(images))
    order = functools.lru_cache(2)(functools.partial(epoch_batches, data, images, cfg.batch_size * passes,
                                                     cfg.seed, at_least=passes))

    def micro_batches(step: int) -> list:
        batches, parts = [], np.array_split(order(step // per_epoch)[step % per_epoch], passes)
        for i in range(distributed.rank(), passes, distributed.world_size()):
            rng = np.random.default_rng([cfg.seed, 1, step * passes + i])
            batch = collate(data, parts[i], inputs, rng, cfg.captions_per_image)
            batch["seed"] = int(rng.integers(2**63))
            batches.append(pin(batch) if inputs.device.type == "cuda" else batch)
        return batches

    return cli.load_ahead(micro_batches, steps)


def batch_loss(model: VisionGPT, batch: dict, amp: torch.dtype | None, label_smoothing: float = 0.0,
               shuffled: bool = False) -> Tensor:
    """Summed cross-entropy of a batch on the model's device; `shuffled`: each row looks at another image."""
    with autocast(model.device, amp):
        visual = model.encode(images=batch.get("images"), features=batch.get("features"))
        visual = visual.roll(1, 0) if shuffled else visual
        return model.loss(batch["tokens"], visual, batch["targets"], batch["positions"], label_smoothing,
                          reduction="sum")


def self_critical_loss(model: VisionGPT, batch: dict, reward: Reward, n: int,
                       amp: torch.dtype | None) -> Tensor:
    """Minus the mean reward of `n` captions sampled for each image, with REINFORCE's gradient.

    A caption is judged against the mean of the others of its image (Rennie et al. 2017, arXiv:1612.00563).
    """
    with autocast(model.device, amp):
        visual = model.encode(images=batch.get("images"), features=batch.get("features"))
        config = DecodingConfig(temperature=1.0, num_return_sequences=n, max_length=caption_room(model))
        rows, _ = model.generate_tokens(config, visual=visual.detach())
    ended = [len(row) < config.max_length for row in rows]
    texts, places = [model.tokenizer.decode(row) for row in rows], range(0, len(rows), n)
    rewards = torch.tensor([reward(image, texts[i : i + n], ended[i : i + n])
                            for image, i in zip(batch["numbers"].tolist(), places)])                # (B, n)
    advantage = (rewards - rewards.mean(1, keepdim=True)) * n / (n - 1)
    tokens, targets, positions = pack_captions([rows[i : i + n] for i in places], model.eos_id)
    targets[targets == model.eos_id] = torch.where(torch.tensor(ended), model.eos_id, -100)    # as sampled
    which = ((positions == 0).cumsum(1) - 1).clamp(max=n - 1)               # number of the caption, (B, T)
    weights, targets = advantage.gather(1, which).to(model.device), targets.to(model.device)
    with autocast(model.device, amp):
        logits, _ = model(tokens.to(model.device), visual, positions=positions.to(model.device))
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    loss = (weights * losses).sum() / len(rows)
    return loss - loss.detach() - rewards.mean()


def train_step(model: VisionGPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               micro_batches: list, cfg: TrainConfig, amp: torch.dtype | None,
               reward: Reward | None = None) -> Tensor:
    """An optimizer step over the micro-batches of all processes, each of which has some.

    Returns the mean loss over all their targets, or minus the reward.
    """
    sizes = [len(batch["numbers"]) if reward else batch["count"] for batch in micro_batches]
    count, total = distributed.total(sum(sizes)), 0.0                 # images to reward, or targets
    for batch in micro_batches:
        torch.manual_seed(batch["seed"])                              # of dropout and samples
        batch = to_device(batch, model.device, model.config.vit)
        if reward:
            loss = self_critical_loss(model, batch, reward, cfg.self_critical, amp) * len(batch["numbers"])
        else:
            if cfg.word_dropout:                                      # Bowman et al. 2016
                hidden = torch.rand(batch["tokens"].shape, device=model.device) < cfg.word_dropout
                batch["tokens"] = batch["tokens"].masked_fill(hidden, model.eos_id)
            loss = batch_loss(model, batch, amp, cfg.label_smoothing)
        loss = loss / count
        scaler.scale(loss).backward()
        total = total + loss.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    distributed.add_up([p.grad for p in parameters if p.grad is not None] + [total])
    scaler.unscale_(optimizer)
    if cfg.grad_clip:
        torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
    scaler.step(optimizer)                                            # skipped where float16 overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def estimate_loss(model: VisionGPT, data: CaptionSet, inputs: ImageInputs, images: np.ndarray,
                  batch_size: int, amp: torch.dtype | None) -> tuple[float, float]:
    """Mean loss per target over all captions of `images`, looking at their own image and at a neighbour's."""
    model.eval()
    images = images[np.argsort(data.row_lengths(images), kind="stable")]
    val_loss = shuffled_loss = count = 0.0
    parts = np.array_split(images, max(1, len(images) // max(2, batch_size)))      # 1 has no neighbour
    for part in cli.progress(parts, "validation: batch"):
        batch = to_device(collate(data, part, inputs), model.device, model.config.vit)
        val_loss += batch_loss(model, batch, amp).item()
        shuffled_loss += batch_loss(model, batch, amp, shuffled=True).item()
        count += batch["count"]
    model.train()
    return val_loss / count, shuffled_loss / count


@torch.inference_mode()
def sample_captions(model: VisionGPT, inputs: ImageInputs, images: np.ndarray,
                    amp: torch.dtype | None) -> tuple[list[str], float]:
    """Greedy captions of `images`, and the share of them that came to an end by themselves."""
    model.eval()
    texts, ended, config = [], 0, DecodingConfig(max_length=caption_room(model))
    for start in cli.progress(range(0, len(images), 32), "captions: batch"):
        seen = to_device(inputs(images[start : start + 32]), model.device, model.config.vit)
        with autocast(model.device, amp):
            rows, _ = model.generate_tokens(config, visual=model.encode(**seen))
        texts += [model.tokenizer.decode(row).strip() for row in rows]
        ended += sum(len(row) < config.max_length for row in rows)
    model.train()
    return texts, ended / len(texts)


def caption_room(model: VisionGPT) -> int:
    """The most tokens of a caption."""
    return min(50, model.config.gpt2.n_positions - 1)


# --------------------------------------------------------------------------------------------------
# before, during and after the run

log = functools.partial(print, flush=True)


def saved_elsewhere(model: VisionGPT) -> dict:
    """The files of the backbones when both are frozen, which are then not saved again."""
    return model.backbones if len(model.frozen) == 2 else {}


def place_model(model: VisionGPT, data: CaptionSet, cfg: TrainConfig, device: torch.device,
                amp: torch.dtype | None) -> ImageInputs:
    """Move the model to where it trains, cache the features of a frozen ViT; returns the model's inputs."""
    kept = saved_elsewhere(model)
    frozen_dtype = amp if kept and amp else torch.float32
    inputs = ImageInputs(model, data, cfg, device, frozen_dtype)
    for name in model.frozen:
        getattr(model, name).to(frozen_dtype)
    for part in (model.vit, *model.gpt2.h) if kept and amp else ():    # all in one dtype: nothing to cast
        part.forward = torch.autocast(device.type, enabled=False)(part.forward)
    model.to(device)
    if device.type == "cpu":
        fast.pack(model, copies=False)                                # long inputs gain nothing by them
    if inputs.features is not None:
        model.vit.to("meta" if kept else "cpu")                       # its work is done, its file remains
    return inputs


def input_hashes(model: VisionGPT, data: CaptionSet) -> dict[str, str]:
    """What a resumed run must find unchanged: the hashes of frozen weights and of the captions."""
    hashes = {name: checkpoint.read_metadata(file).get("sha256") for name, file in model.backbones.items()}
    if not hashes:                                                    # of a complete checkpoint
        hashes = {name: checkpoint.sha256(getattr(model, name).state_dict()) for name in model.frozen}
    return hashes | {"captions": data.fingerprint()}


def evaluate(model: VisionGPT, data: CaptionSet, inputs: ImageInputs, cfg: TrainConfig, state: TrainState,
             logger: Log, amp: torch.dtype | None) -> None:
    """Validation losses and a few captions; the best model so far is written to the checkpoint folder."""
    images = data.split("val")[: cfg.eval_images]
    val_loss, shuffled_loss = estimate_loss(model, data, inputs, images, cfg.batch_size, amp)
    log(f"step {state.step}: validation loss {val_loss:.4f}, with another image {shuffled_loss:.4f}")
    scores = dict(val_loss=val_loss, val_loss_shuffled=shuffled_loss)
    images = images[: max(cfg.eval_captions, cfg.num_samples)]
    if len(images):
        texts, ended = sample_captions(model, inputs, images, amp)
        for image, text in zip(images[: cfg.num_samples], texts):
            log(f"  {data.names[image]}: {text}   (reference: {data.references(image)[0]})")
    if cfg.eval_captions:
        texts, images = texts[: cfg.eval_captions], images[: cfg.eval_captions]
        references = [data.references(i) for i in images]
        cider, shuffled = (score(said, references)[0]["CIDEr"] for said in (texts, texts[1:] + texts[:1]))
        log(f"  CIDEr {cider:.4f}, with the next image's captions {shuffled:.4f}; {ended:.1%} came to an end")
        scores |= dict(val_cider=cider, val_cider_shuffled=shuffled, val_ended=ended)
    logger.write(state.step, **scores)
    error = val_loss if cfg.select == "loss" else -cider
    if error < state.best:
        state.best = error
        photographs = not (cfg.blind or Path(cfg.data, "scenes.jsonl").exists())
        summary = dict(step=state.step, **scores, preset=cfg.preset, data=cfg.data, photographs=photographs,
                       blind=cfg.blind)
        model.save_pretrained(cfg.out, torch.float32, saved_elsewhere(model), summary)


def finish(model: VisionGPT, data: CaptionSet, inputs: ImageInputs, cfg: TrainConfig, logger: Log,
           amp: torch.dtype | None) -> None:
    """What one looks at after a run: loss.png, samples.png; for drawn scenes the share of right captions."""
    out = Path(cfg.out)
    file = out / ("fusion.safetensors" if saved_elsewhere(model) else "model.safetensors")
    if file.exists():                                                 # show the best model, not the last
        model.load_state_dict(model.state_dict() | checkpoint.read_tensors(file))
    curves = {name: logger.curve(name) for name in ("loss", "val_loss", "val_loss_shuffled")}
    figures.save(figures.loss_curve(curves), out / "loss.png")
    images = data.split("val")[:12]
    texts, _ = sample_captions(model, inputs, images, amp)
    figures.save(figures.contact_sheet([Image.fromarray(data.images[i]) for i in images], texts),
                 out / "samples.png")
    log(f"{out} holds the best model, log.jsonl, loss.png and samples.png")
    if scenes := read_scenes(cfg.data, len(data.names)):
        test = data.split("test")
        texts, _ = sample_captions(model, inputs, test, amp)
        right = sum(judge(text, scenes[i]) for text, i in zip(texts, test))
        log(f"{right} of {len(test)} greedy captions of unseen test scenes are right in every word "
            f"({100 * right / len(test):.1f} %)")


def train(cfg: TrainConfig, saved: dict | None = None) -> float:
    """Train as `cfg` says, from `saved` where a run is resumed; returns the best validation loss or -CIDEr.

    What is random (order, crops, dropout) follows from the seed and the number of the forward pass alone, so
    a resumed run repeats exactly what an unbroken one would have done, and several processes, which share the
    forward passes of a step, what one would have. Raises UserError for what the user can fix.
    """
    passes, n_process, leads = cfg.grad_accumulation, distributed.world_size(), distributed.rank() == 0
    if passes < n_process:
        size = max(1, cfg.batch_size * passes // n_process)
        raise UserError(f"{n_process} processes share the forward passes of a step: run with --batch-size "
                        f"{size} --grad-accumulation {n_process}, or start at most {passes} processes")
    with (distributed.processes(cli.pick_device(cfg.device)) as device, cpu_threads(cfg.threads),
          run_folder(cfg) as out):
        # model, data, optimizer
        dtype = cli.pick_dtype(cfg.dtype, device)
        amp = None if dtype == torch.float32 else dtype
        torch.manual_seed(cfg.seed % 2**63)
        with distributed.first_in_line():                             # which draws scenes, caches features
            if cfg.preset == "shapes" and not Path(cfg.data, "meta.json").exists():
                prepare_shapes.prepare(prepare_shapes.ShapesConfig(out=cfg.data))
            model, data = build_model(cfg)
            model.drafts = count_drafts(data.caption_tokens(data.split("train")), model.eos_id)
            n_train, _ = len(data.split("train")), data.split("val")  # both must hold something
            if n_train < passes:
                raise UserError(f"{cfg.data} has {n_train} training images, too few for --grad-accumulation "
                                f"{passes}: lower it")
            hashes = input_hashes(model, data)
            inputs = place_model(model, data, cfg, device, amp)
        state = TrainState(trained_parameters(model), configure_optimizer(model, cfg),
                           torch.amp.GradScaler(device.type, enabled=amp == torch.float16), hashes)
        if saved:
            state.load(saved, out)
        if cfg.overwrite and leads:
            for name in RUN_FILES:
                (out / name).unlink(missing_ok=True)
        logger = Log(out / "log.jsonl", state.step, cfg) if leads else None
        total = cfg.epochs * steps_per_epoch(cfg, n_train)
        total = min(total, cfg.max_steps or total)
        trained, held = (sum(p.numel() for p in own) for own in (state.trained.values(), model.parameters()))
        log(f"{trained:,} of {held:,} parameters trained on {n_train:,} images of {cfg.data}; "
            f"{total} steps on {f'{n_process} x ' * (n_process > 1)}{device.type}, {dtype}")
        reward = Reward({i: data.references(i) for i in data.split("train")}) if cfg.self_critical else None

        # one optimizer step after another
        model.train()
        captions, since, started = 0, state.step, time.monotonic()
        with stop_signal() as asked:
            for micro_batches in training_batches(data, inputs, cfg, range(state.step, total)):
                for group in state.optimizer.param_groups:
                    group["lr"] = get_lr(state.step, total, cfg)
                state.losses.append(train_step(model, state.optimizer, state.scaler, micro_batches, cfg, amp,
                                               reward))
                captions += sum(batch["captions"] for batch in micro_batches)
                state.step += 1

                stops = distributed.total(len(asked)) > 0             # if any process was asked, all of them
                logs, evaluates, saves = (state.step == total or state.step % interval == 0 for interval in
                                          (cfg.log_interval, cfg.eval_interval, cfg.save_interval))
                saves = saves or stops
                if logs or evaluates or saves or device.type == "cpu":
                    losses = state.check_losses()
                if logs:
                    seconds, captions = time.monotonic() - started, distributed.total(captions)
                    if leads:
                        logger.write_step(state.step, total, since, seconds, captions,
                                          sum(losses) / len(losses), group["lr"], peak_memory(device))
                    state.losses, captions, since, started = [], 0, state.step, time.monotonic()
                if evaluates and leads:                               # the others wait at their next sum
                    before = time.monotonic()
                    evaluate(model, data, inputs, cfg, state, logger, amp)
                    started += time.monotonic() - before
                if saves and leads:
                    state.save(out, cfg)
                if stops:
                    distributed.total(0)                              # until it is saved
                    log(f"stopped after step {state.step}; continue with the same command and --resume")
                    raise KeyboardInterrupt
        if leads:
            finish(model, data, inputs, cfg, logger, amp)
        return state.best


def main():
    cfg, saved = resolve_config(cli.parse(TrainConfig, __doc__))
    with cli.out_of_memory(f"lower --batch-size ({cfg.batch_size}) and raise --grad-accumulation "
                           f"({cfg.grad_accumulation}) by the same factor; --dtype bfloat16 takes less"):
        train(cfg, saved)


if __name__ == "__main__":
    cli.run(main)
