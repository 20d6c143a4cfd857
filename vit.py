"""ViT: images to tokens (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929).

Letters: B batch, N patches, C width, H heads, D head width, S image side.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.checkpoint import load_module
from lib.cli import UserError, check_sizes
from lib.conv_stem import STRIDE, WIDTH, ConvStem

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, "tanh"),
    "quick_gelu": lambda: lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI CLIP
}


@dataclass
class ViTConfig:
    """ViT-B/16 as torchvision trained it, with all that belongs to the weights: eps, norms, mean, std."""

    image_size: int = 224
    patch_size: int = 16
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_mlp: int = 3072
    n_class: int = 0                   # 0: no classification head
    eps: float = 1e-6                  # 1e-6 for ImageNet ViTs, 1e-5 for CLIP
    activation: str = "gelu"
    pre_norm: bool = False             # CLIP: LayerNorm after the positions are added
    final_norm: bool = True            # CLIP: patch tokens are taken before its last LayerNorm
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # how the weights were evaluated, for convert_weights.py --check alone: captioning squashes the picture
    transform: dict[str, int | str] = field(
        default_factory=lambda: dict(resize=256, crop=224, filter="bilinear"))
    dropout: float = 0.0               # on attention and MLP outputs, when trained from scratch
    # the bundled model: patches of convolutional features, not of pixels
    conv_stem: bool = field(default=False, metadata=dict(optional=True))

    def __post_init__(self):
        check_sizes(self)
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if max(map(abs, self.mean)) > 1000 or not all(0.001 <= s <= 1000 for s in self.std):
            raise UserError(f"mean {self.mean} and std {self.std} do not fit pixels from 0 to 1")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.conv_stem and self.patch_size % STRIDE:
            raise UserError(f"patch_size {self.patch_size} is not a multiple of the conv_stem's {STRIDE}")
        if self.n_embd % self.n_head:
            raise UserError(f"ViT width {self.n_embd} cannot be split over {self.n_head} heads")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"unknown ViT activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")

    @property
    def n_patch(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Attention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)   # 3 x (B, H, N, D)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class MLP(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.n_mlp)
        self.activation = ACTIVATIONS[config.activation]()
        self.fc2 = nn.Linear(config.n_mlp, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Normalised images (B, 3, S, S) to tokens (B, 1 + N, C): class token, then the patches row by row."""

    def __init__(self, config: ViTConfig | None = None):
        super().__init__()
        self.config = config = config or ViTConfig()
        C, P = config.n_embd, config.patch_size
        self.stem = ConvStem() if config.conv_stem else nn.Identity()
        channels, P = (WIDTH, P // STRIDE) if config.conv_stem else (3, P)
        self.patch_embed = nn.Conv2d(channels, C, kernel_size=P, stride=P)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.n_patch, C))
        self.norm_pre = nn.LayerNorm(C, eps=config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(C, eps=config.eps) if config.final_norm else nn.Identity()
        self.head = nn.Linear(C, config.n_class) if config.n_class else None

    def forward(self, images: Tensor) -> Tensor:
        S = self.config.image_size
        if images.shape[1:] != (3, S, S):
            raise UserError(f"images are {tuple(images.shape)}, but this ViT takes (B, 3, {S}, {S})")
        return self.encode(self.stem(images))

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S), or their stem's features (B, 192, S / 32, S / 32) -> tokens (B, 1 + N, C)."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)            # (B, N, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, classes). Raises UserError when the weights came without a head."""
        if self.head is None:
            raise UserError("these ViT weights have no classification head")
        return self.head(self.forward(images)[:, 0])

    @classmethod
    def from_pretrained(cls, file) -> "ViT":
        """The ViT in a file of convert_weights.py. Raises UserError if missing, damaged or not a ViT."""
        return load_module(cls, ViTConfig, file)
