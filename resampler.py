"""What is trained: a Perceiver Resampler and cross-attention, after Flamingo (arXiv:2204.14198).

Unlike Flamingo's, the latents look at the patches alone, not at each other, and cross-attention has no gate.

Letters: B images, N patches, L latents, C width, H heads, D head width; T text positions, G rows per image.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cli import check_sizes

EPS = 1e-5


@dataclass
class ResamplerConfig:
    n_latent: int = 64
    n_layer: int = 2
    n_head: int = 8
    head_width: int = 64
    n_mlp: int = 256
    dropout: float = 0.1               # on attention and MLP outputs, cross-attention's too

    def __post_init__(self):
        check_sizes(self)


def attention(q: Tensor, k: Tensor, v: Tensor, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """q (B, H, T, D), k and v (B, H, N, D) -> (B, T, H * D), and the weights (B, H, T, N) or None."""
    if not return_weights:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), None
    weights = (q.float() @ k.float().mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2), weights


class ResamplerLayer(nn.Module):
    def __init__(self, config: ResamplerConfig, width: int):
        super().__init__()
        self.n_head = config.n_head
        inner = config.n_head * config.head_width
        self.norm_latents = nn.LayerNorm(width, eps=EPS)
        self.norm_patches = nn.LayerNorm(width, eps=EPS)
        self.q = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(width, 2 * inner, bias=False)
        self.proj = nn.Linear(inner, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, config.n_mlp)
        self.fc2 = nn.Linear(config.n_mlp, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, latents: Tensor, patches: Tensor, return_weights: bool = False):
        """Latents (B, L, C) look at patches (B, N, C) -> (B, L, C), and the weights (B, H, L, N) or None."""
        (B, L, _), N = latents.shape, patches.shape[1]
        q = self.q(self.norm_latents(latents)).view(B, L, self.n_head, -1).transpose(1, 2)   # (B, H, L, D)
        k, v = self.kv(self.norm_patches(patches)).view(B, N, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)
        seen, weights = attention(q, k, v, return_weights)
        latents = latents + self.dropout(self.proj(seen))
        return latents + self.dropout(self.fc2(F.gelu(self.fc1(self.norm_mlp(latents))))), weights


class PerceiverResampler(nn.Module):
    """Patch tokens (B, N, C_vit) to visual tokens (B, L, C): learned latents look at the patches."""

    def __init__(self, config: ResamplerConfig, width_in: int, width: int):
        super().__init__()
        self.project = nn.Linear(width_in, width) if width_in != width else nn.Identity()
        self.latents = nn.Parameter(torch.zeros(config.n_latent, width))
        self.layers = nn.ModuleList(ResamplerLayer(config, width) for _ in range(config.n_layer))

    def forward(self, patches: Tensor, return_weights: bool = False):
        """With `return_weights` also what the last layer's latents looked at, (B, H, L, N)."""
        patches = self.project(patches)
        latents = self.latents.expand(len(patches), -1, -1)                                  # (B, L, C)
        for layer in self.layers:
            latents, weights = layer(latents, patches, return_weights)
        return (latents, weights) if return_weights else latents


class CrossAttention(nn.Module):
    """Text looks at the visual tokens: x + out(attention(LN(x), visual)); `out` starts at zero."""

    def __init__(self, width: int, n_head: int, dropout: float):
        super().__init__()
        self.n_head = n_head
        self.ln = nn.LayerNorm(width, eps=EPS)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def cross_kv(self, visual: Tensor) -> Tensor:
        """Visual tokens (B, L, C) -> k and v (2, B, H, L, D): once for all captions and words."""
        B, L, _ = visual.shape
        return self.kv(visual).view(B, L, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, cross_kv: Tensor, return_weights: bool = False):
        """Text (B * G, T, C), G rows per image -> the same shape, and weights (B, H, G * T, L) or None."""
        k, v = cross_kv
        q = self.q(self.ln(x)).view(len(k), -1, self.n_head, k.shape[-1]).transpose(1, 2) # (B, H, G * T, D)
        seen, weights = attention(q, k, v, return_weights)                                     # (B, G * T, C)
        return x + self.dropout(self.out(seen.reshape(x.shape))), weights
