"""GPT-2 (Radford et al. 2019) with OpenAI's parameter names; its key/value cache. Knows nothing of images.

Letters: R rows of text, T text positions, C width, H heads, D head width. Where `ragged` is given, the M real
tokens of all rows lie one after another: (M, C) in place of (R, T, C).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lib import checkpoint
from lib.cli import UserError


@dataclass
class GPT2Config:
    """GPT-2 small, 124M parameters."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    eps: float = 1e-5
    activation: str = "gelu_tanh"      # OpenAI's weights; models trained in nanoGPT expect the exact "gelu"
    dropout: float = 0.0               # on attention and MLP outputs, when trained from scratch

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"GPT-2 width {self.n_embd} cannot be split over {self.n_head} heads")
        if self.activation not in ("gelu", "gelu_tanh"):
            raise UserError(f"unknown GPT-2 activation {self.activation!r}; known: gelu, gelu_tanh")


class KVCache:
    """Keys and values of the text so far: two preallocated tensors (n_layer, R, H, max_length, D)."""

    def __init__(self, config, rows, max_length, device=None, dtype=None):
        shape = config.n_layer, rows, config.n_head, max_length, config.n_embd // config.n_head
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer, k, v):
        """Store a layer's new k and v (R, H, T, D) after the `length` ones held; return all of them."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows):
        """Row i goes on from what was row rows[i]: follows the beams, or widens one row to several."""
        if len(rows) != self.k.shape[1]:
            self.k, self.v = self.k[:, rows], self.v[:, rows]
        elif rows.device.type != "cpu" or rows.tolist() != list(range(len(rows))):   # beams seldom move
            for held in (self.k[..., : self.length, :], self.v[..., : self.length, :]):
                held.copy_(held[:, rows])


class Ragged:
    """Rows of unequal length without their padding: all real tokens, one after another, as (M, C).

    `real` (R, T) marks the positions that matter; of each row, what lies after the last of them is left out.
    Some padding stays at the end, so that M is a multiple of STEP, unless R * T is less: oneDNN prepares itself
    for every new size.
    """

    STEP = 64

    def __init__(self, real):
        self.shape, kept = real.shape, real.flip(1).cumsum(1).flip(1) > 0
        M = -(-int(kept.sum()) // self.STEP) * self.STEP
        self.index = kept.flatten().byte().argsort(descending=True, stable=True)[:M]  # padding last

    def unpad(self, x):
        """(R, T, C) -> (M, C)."""
        return x.flatten(0, 1).index_select(0, self.index)

    def pad(self, x):
        """(M, C) -> (R, T, C), with zeros where nothing was kept."""
        R, T = self.shape
        return x.new_zeros(R * T, x.shape[1]).index_copy(0, self.index, x).view(R, T, -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, layer=None, ragged=None):
        qkv = self.c_attn(x)
        qkv = qkv if ragged is None else ragged.pad(qkv)
        R, T, _ = qkv.shape
        q, k, v = qkv.view(R, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)              # 3 x (R, H, T, D)
        if cache is not None:
            assert T == 1 or cache.length == 0, "one token, or the first: SDPA's causal mask is top-left"
            k, v = cache.append(layer, k, v)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1).transpose(1, 2).reshape(R, T, -1)
        return self.c_proj(x if ragged is None else ragged.unpad(x))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.activation = nn.GELU({"gelu_tanh": "tanh", "gelu": "none"}[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, layer=None, ragged=None):
        x = x + self.dropout(self.attn(self.ln_1(x), cache, layer, ragged))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """Tokens (R, T) to next-token logits (R, T, vocabulary); the head is the token embedding."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or GPT2Config()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.linear = F.linear                 # computes the head; fast.py puts another in its place
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):   # GPT-2's rule: residual branches start smaller if deeper
                nn.init.normal_(p, std=(2 * config.n_layer * config.n_embd) ** -0.5)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            # not GPT-2's 0.02, which leaves models narrower than 768 next to silent for a long time
            nn.init.normal_(module.weight, std=self.config.n_embd**-0.5)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, tokens, start=0):
        """Tokens (R, T) at positions start, start + 1 ... -> (R, T, C). Raises UserError past the last."""
        end, last = start + tokens.shape[1], self.config.n_positions
        if end > last:
            raise UserError(f"{end} tokens are more than GPT-2's {last} positions")
        return self.wte(tokens) + self.wpe.weight[start:end]

    def logits(self, x):
        """Hidden states (..., C) after the last block -> logits (..., vocabulary)."""
        return self.linear(self.ln_f(x), self.wte.weight)

    def forward(self, tokens, cache=None):
        x = self.embed(tokens, cache.length if cache else 0)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache:
            cache.length += tokens.shape[1]
        return self.logits(x)

    @classmethod
    def from_pretrained(cls, file):
        """The GPT-2 in a file of convert_weights.py. Raises UserError if missing, damaged or no GPT-2."""
        return checkpoint.load_module(cls, GPT2Config, file)
