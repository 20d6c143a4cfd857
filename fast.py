"""Faster arithmetic on the CPU: linear layers through oneDNN, weights laid out once, int8.

    fast.pack(model)                # float32 or bfloat16: the same sums in another order, 2 to 3 times faster
    fast.pack(model, int8=True)     # bfloat16, GPT-2's weights rounded to 8 bits: a little less exact

A model left alone computes the same in plain PyTorch. Packing pays because for float32 PyTorch's F.linear
calls MKL, which reaches less than half of oneDNN's speed on AMD CPUs, and because packed weights need not be
laid out again for every token.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2 import TokenEmbedding
from lib.cli import UserError

# oneDNN's linear layer as an eager operator; private to PyTorch, and without it nothing is packed
POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN multiplies matrices of `dtype` here: bfloat16 needs a CPU that has it."""
    return POINTWISE is not None and torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(model: nn.Module, int8: bool = False, copies: bool = True) -> nn.Module:
    """Swap the linear layers and the head of a model on the CPU for ones that use oneDNN; returns the model.

    The parameters and their names stay. With `copies` frozen weights are packed at first use, which takes
    their memory again, else the head alone. With `int8` the weights of GPT-2 and cross-attention are rounded
    to 8 bits, with a scale per output row; activations stay bfloat16, so that GPT-2's few very large channels
    cost nothing. Raises UserError for `int8` unless the model is in bfloat16 on the CPU.
    """
    first = next(model.parameters())
    if int8 and (first.device.type != "cpu" or first.dtype != torch.bfloat16):
        raise UserError("int8 weights need a model in bfloat16 on the CPU: use --dtype bfloat16 --device cpu")
    quick = first.device.type == "cpu" and available(first.dtype)
    if first.device.type == "cpu" and first.dtype == torch.bfloat16 and not quick:
        print("this CPU has no bfloat16 arithmetic: --dtype float32 will be faster", file=sys.stderr)
    for path, parent in list(model.named_modules()):
        rounded = int8 and path.startswith(("gpt2", "xattn"))
        if not (quick or rounded):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child, rounded, copies))
            elif isinstance(child, TokenEmbedding):
                setattr(parent, name, PackedEmbedding(child, rounded))
        if isinstance(getattr(parent, "activation", None), nn.GELU):         # of an MLP: into its first layer
            layer = next(child for child in parent.children() if isinstance(child, nn.Linear))
            layer.gelu, parent.activation = parent.activation.approximate, nn.Identity()
    return model


class PackedLinear(nn.Linear):
    """A linear layer's own parameters, multiplied by oneDNN; then GELU, where `gelu` says which."""

    def __init__(self, layer: nn.Linear, int8: bool, copies: bool):
        nn.Module.__init__(self)
        self.weight, self.bias, self.training = layer.weight, layer.bias, layer.training
        self.gelu, self.packed = getattr(layer, "gelu", None), PackedWeight(int8, copies)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packed, self.gelu)


class PackedEmbedding(TokenEmbedding):
    """A token embedding's own weight, multiplied by oneDNN where it is the head."""

    def __init__(self, embedding: TokenEmbedding, int8: bool):
        super().__init__(*embedding.weight.shape, _weight=embedding.weight)
        self.weight, self.packed = embedding.weight, PackedWeight(int8, copies=True)

    def unembed(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, None, self.packed)


class PackedWeight:
    """A weight and its transpose, packed for a kernel until the weight changes (but not by `.data`)."""

    def __init__(self, int8: bool, copies: bool):
        self.int8, self.copies, self.held = int8, copies, {}

    def __deepcopy__(self, memo):
        return PackedWeight(self.int8, self.copies)

    def __call__(self, weight: Tensor, transposed: bool = False):
        """`weight`, or its transpose; as it is if it is trained or no copy shall be kept."""
        plain = weight.detach().t() if transposed else weight.detach()
        if not self.int8 and (weight.requires_grad or not self.copies):
            return plain
        state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if self.held.get(transposed, (None,))[0] != state:
            self.held[transposed] = state, self.make(plain)
        return self.held[transposed][1]

    def make(self, plain: Tensor):
        if not self.int8:
            return torch.ops.mkldnn._reorder_linear_weight(plain)
        scale = plain.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return (plain.float() / scale).round().to(torch.int8), scale.flatten().to(plain.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight,
           gelu: str | None = None) -> Tensor:
    """F.linear: x (..., K), weight (N, K), bias (N,) -> (..., N); then F.gelu(approximate=gelu), if named."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if x.device.type != "cpu" or weight.dtype != dtype or dtype not in (torch.float32, torch.bfloat16):
        out = F.linear(x, weight, bias)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        out = Linear.apply(x.to(dtype), weight, bias, packed)
    elif packed.int8:
        out = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), *packed(weight)).view(*x.shape[:-1], -1)
        out = out if bias is None else out.add_(bias)
    else:
        return onednn(x.to(dtype), packed(weight), bias, gelu)
    return out if gelu is None else F.gelu(out, approximate=gelu)


class Linear(torch.autograd.Function):
    """F.linear and its gradients through oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias, packed):
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.packed = packed
        return onednn(x, packed(weight), bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, into_x, into_weight, into_bias = grad.reshape(-1, grad.shape[-1]), None, None, None
        if ctx.needs_input_grad[0]:
            into_x = onednn(grad.contiguous(), ctx.packed(weight, transposed=True))
        if ctx.needs_input_grad[1]:
            into_weight = onednn(rows.t().contiguous(), x.reshape(-1, x.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            into_bias = rows.sum(0)
        return into_x, into_weight, into_bias, None


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> Tensor:
    """x @ weight.T + bias, the weight plain or packed; then F.gelu(approximate=gelu), if named."""
    rest = ("none", [], "") if gelu is None else ("gelu", [], gelu)
    if x.numel() == x.shape[-1]:                    # oneDNN reads weights faster for four rows than for one
        return POINTWISE(x.reshape(1, -1).expand(4, -1), weight, bias, *rest)[0].view(*x.shape[:-1], -1)
    return POINTWISE(x, weight, bias, *rest)
