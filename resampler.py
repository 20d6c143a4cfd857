"""What is trained: a Perceiver Resampler and cross-attention (Flamingo, https://arxiv.org/abs/2204.14198).

Letters: B batch, N patches, L latents, C width, H heads, D head width; R caption rows, T text positions,
G rows an image.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lib.cli import UserError

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
        for name in ("n_latent", "n_layer", "n_head", "head_width", "n_mlp"):
            if getattr(self, name) < 1:
                raise UserError(f"resampler: {name} is {getattr(self, name)}, but must be at least 1")


class ResamplerLayer(nn.Module):
    def __init__(self, config, width):
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

    def attention_inputs(self, latents, patches):
        """Queries (B, H, L, D) of the latents, keys and values (B, H, N, D) of the patches."""
        (B, L, _), N = latents.shape, patches.shape[1]
        q = self.q(self.norm_latents(latents)).view(B, L, self.n_head, -1).transpose(1, 2)   # (B, H, L, D)
        k, v = self.kv(self.norm_patches(patches)).view(B, N, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, latents, patches):
        q, k, v = self.attention_inputs(latents, patches)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)            # (B, L, H * D)
        latents = latents + self.dropout(self.proj(seen))
        return latents + self.dropout(self.fc2(F.gelu(self.fc1(self.norm_mlp(latents)))))


class PerceiverResampler(nn.Module):
    """Patch tokens (B, N, C_vit) to visual tokens (B, L, C): learned latents look at the patches, twice."""

    def __init__(self, config, width_in, width):
        super().__init__()
        self.project = nn.Linear(width_in, width) if width_in != width else nn.Identity()
        self.latents = nn.Parameter(torch.randn(config.n_latent, width) * 0.02)
        self.layers = nn.ModuleList(ResamplerLayer(config, width) for _ in range(config.n_layer))

    def forward(self, patches):
        patches = self.project(patches)
        latents = self.latents.expand(len(patches), -1, -1)                                  # (B, L, C)
        for layer in self.layers:
            latents = layer(latents, patches)
        return latents


class CrossAttention(nn.Module):
    """Text looks at the visual tokens: x + out(attention(LN(x), visual)); `out` is zero at the start."""

    def __init__(self, width, n_head, dropout):
        super().__init__()
        self.n_head = n_head
        self.ln = nn.LayerNorm(width, eps=EPS)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def cross_kv(self, visual):
        """Visual tokens (B, L, C) -> k, v (B, H, L, D): once an image, for all its captions and words."""
        B, L, _ = visual.shape
        return self.kv(visual).view(B, L, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)

    def queries(self, x):
        """Text (R, T, C) -> q (R, T, C)."""
        return self.q(self.ln(x))

    def forward(self, x, cross_kv, groups, ragged=None):
        """Text (R, T, C), or (M, C) if ragged, and one block's `cross_kv` -> the same shape."""
        k, v = cross_kv
        q = self.queries(x)
        q = q if ragged is None else ragged.pad(q)
        R, T, C = q.shape
        q = groups.gather(q)                                                         # (B, G * T, C)
        q = q.view(len(k), -1, self.n_head, C // self.n_head).transpose(1, 2)        # (B, H, G * T, D)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)    # (B, G * T, C)
        seen = groups.scatter(seen, T)
        return x + self.dropout(self.out(seen if ragged is None else ragged.unpad(seen)))


class Groups:
    """Which caption rows look at which image: an image's rows become queries of one attention, not copies.

    `image` (R,) names each row's image, 0 to n_image - 1. Where the rows lie image after image and equally
    many to each, as in decoding (`image` None), gather and scatter are free reshapes.
    """

    def __init__(self, n_image, image=None):
        self.n_image, self.regular = n_image, True
        if image is None:
            return
        image = torch.as_tensor(image, device="cpu")
        if len(image) == 0 or image.min() < 0 or image.max() >= n_image:
            raise UserError(f"image must name one of the {n_image} images for each caption row")
        count = torch.bincount(image, minlength=n_image)
        self.regular = bool((count == count[0]).all() and (image.diff() >= 0).all())
        if self.regular:
            return
        G = int(count.max())
        order = torch.argsort(image, stable=True)
        slot = torch.empty_like(image)                            # the row's place among its image's rows
        slot[order] = torch.arange(len(image)) - (count.cumsum(0) - count)[image[order]]
        self.row_of = torch.zeros(n_image * G, dtype=torch.long)  # empty places compute row 0, never read
        self.place_of = image * G + slot
        self.row_of[self.place_of] = torch.arange(len(image))

    def gather(self, q):
        """(R, T, C) -> (B, G * T, C), an image's rows one after the other."""
        if not self.regular:
            q = q[self.row_of.to(q.device)]
        return q.reshape(self.n_image, -1, q.shape[-1])

    def scatter(self, seen, T):
        """(B, G * T, C) -> (R, T, C), the inverse."""
        seen = seen.reshape(-1, T, seen.shape[-1])
        return seen if self.regular else seen[self.place_of.to(seen.device)]
