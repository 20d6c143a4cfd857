"""GPT-2 (Radford et al. 2019) with OpenAI's parameter names, and its key/value cache.

Letters: B rows of text, T text positions, C width, H heads, D head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.checkpoint import load_module
from lib.cli import UserError, check_sizes


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
        check_sizes(self)
        if self.n_embd % self.n_head:
            raise UserError(f"GPT-2 width {self.n_embd} cannot be split over {self.n_head} heads")
        if self.activation not in ("gelu", "gelu_tanh"):
            raise UserError(f"unknown GPT-2 activation {self.activation!r}; known: gelu, gelu_tanh")


class KVCache:
    """Keys and values of the text so far: one preallocated tensor (2, n_layer, B, H, max_length, D)."""

    def __init__(self, config: GPT2Config, rows: int, max_length: int, device=None, dtype=None):
        shape = 2, config.n_layer, rows, config.n_head, max_length, config.n_embd // config.n_head
        self.kv, self.length = torch.empty(shape, device=device, dtype=dtype), 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Store a layer's new k and v (B, H, T, D) after the first `length` positions; return them all."""
        end = self.length + k.shape[2]
        self.kv[0, layer, :, :, self.length : end] = k
        self.kv[1, layer, :, :, self.length : end] = v
        return self.kv[:, layer, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """New row i continues old row rows[i]: reorders the beams, or repeats a row for several."""
        if len(rows) != self.kv.shape[2]:
            self.kv = self.kv[:, :, rows]
        elif rows.device.type != "cpu" or rows.tolist() != list(range(len(rows))):   # else no copy
            held = self.kv[..., : self.length, :]
            held.copy_(held[:, :, rows])


def packed_mask(positions: Tensor) -> Tensor:
    """Positions (B, T) that restart at 0 with each text -> mask (B, 1, T, T): causal, blind across texts."""
    text = (positions == 0).cumsum(1)                                                  # number of the text
    return (text[:, :, None] == text[:, None, :]).tril()[:, None]


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)   # 3 x (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        past = k.shape[2] - T
        if mask is None and T > 1 and past:          # is_causal would align the triangle at the top left
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.c_proj(x.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.activation = nn.GELU({"gelu_tanh": "tanh", "gelu": "none"}[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), mask, cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class TokenEmbedding(nn.Embedding):
    """Tokens to vectors and, as the head, vectors to logits."""

    def unembed(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class GPT2(nn.Module):
    """Tokens (B, T) to next-token logits (B, T, vocabulary); the head is the token embedding."""

    def __init__(self, config: GPT2Config | None = None):
        super().__init__()
        self.config = config = config or GPT2Config()
        self.wte = TokenEmbedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.eps)

    def embed(self, tokens: Tensor, positions: Tensor | None = None, past: int = 0) -> Tensor:
        """Tokens (B, T) at `positions` (B, T), by default past, past + 1 ... -> (B, T, C)."""
        if positions is not None:
            return self.wte(tokens) + self.wpe(positions)
        if (end := past + tokens.shape[1]) > self.config.n_positions:
            raise UserError(f"{end} tokens are more than GPT-2's {self.config.n_positions} positions")
        return self.wte(tokens) + self.wpe.weight[past:end]

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) after the last block -> logits (..., vocabulary)."""
        return self.wte.unembed(self.ln_f(x))

    def exact_logits(self, x: Tensor) -> Tensor:
        """`logits` to choose a word by, in float32; the best are computed again where 16 bits make ties."""
        x = self.ln_f(x)
        logits = self.wte.unembed(x)
        if logits.dtype == torch.float32:
            return logits
        best = logits.topk(min(8, logits.shape[-1])).indices                             # (..., 8)
        exact = (self.wte.weight[best].float() * x.float()[..., None, :]).sum(-1)
        return logits.float().scatter_(-1, best, exact)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embed(tokens, past=cache.length if cache else 0)
        for block in self.h:
            x = block(x, cache=cache)
        if cache:
            cache.length += tokens.shape[1]
        return self.logits(x)

    @classmethod
    def from_pretrained(cls, file) -> "GPT2":
        """The GPT-2 in a file of convert_weights.py. Raises UserError if missing, damaged or not a GPT-2."""
        return load_module(cls, GPT2Config, file)
