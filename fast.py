"""Fast paths: on the CPU linear layers through oneDNN and int8 weights, on a GPU decoding as CUDA graphs.

    fast.pack(model)                # float32 or bfloat16: the same sums in another order, 2 to 3 times faster
    fast.pack(model, int8=True)     # bfloat16, GPT-2's weights rounded to 8 bits: a little less exact
    fast.record(model)              # GPU: a token costs one launch instead of hundreds

A model left alone computes the same in plain PyTorch. Why packing pays: for float32 PyTorch's F.linear calls
MKL, which on AMD CPUs reaches less than half of what oneDNN does, and packed weights need not be laid out
anew for every token.
"""

import sys
import types
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from gpt2 import GPT2, KVCache
from lib.cli import UserError

# oneDNN's linear layer as an eager operator; private to PyTorch, so it may be absent
POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def available(dtype=torch.float32):
    """Whether oneDNN multiplies matrices of `dtype` here: bfloat16 needs a CPU that has it."""
    return torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(module, int8=False, copies=True):
    """Make the linear layers and head of a model on the CPU compute through oneDNN; returns the model.

    With `copies` frozen weights are packed at first use, which takes their memory again, else the head alone.
    To caption, call `fast.pack(model.requires_grad_(False))`. The parameters stay what they are;
    load_state_dict, `.to` and in-place changes are noticed, edits through `.data` are not, and a deep copy
    wants to be packed anew. An MLP's GELU is computed within its first layer.

    With `int8` the weights of GPT-2 and cross-attention are rounded to 8 bits, with a scale for each output
    row, while activations stay bfloat16, so that GPT-2's few very large channels cost nothing; raises
    UserError unless the model is in bfloat16 on the CPU.
    """
    first = next(module.parameters())
    if int8 and (first.device.type != "cpu" or first.dtype != torch.bfloat16):
        raise UserError("int8 weights need a model in bfloat16 on the CPU: use --dtype bfloat16 --device cpu")
    if first.device.type != "cpu":
        return module
    quick = available(first.dtype)
    if first.dtype == torch.bfloat16 and not quick:
        print("this CPU has no bfloat16 arithmetic: --dtype float32 will be faster", file=sys.stderr)
    for name, part in module.named_modules():
        rounded = int8 and name.startswith(("gpt2", "xattn"))
        if not (rounded or quick):
            continue
        if isinstance(part, nn.Linear):
            part.forward = types.MethodType(forward_int8 if rounded else forward, part)
            weight = part.weight
        elif isinstance(part, GPT2):
            part.linear = linear_int8 if rounded else linear
            weight = part.wte.weight
        elif isinstance(getattr(part, "activation", None), nn.GELU):
            vars(part).pop("forward", None)                                      # of an earlier packing
            if not rounded:
                first, last = (layer for layer in part.children() if isinstance(layer, nn.Linear))
                part.forward = partial(mlp, first, part.activation.approximate, last)
            continue
        else:
            continue
        if not rounded and (copies or isinstance(part, GPT2)):
            weight.packed = {}
    return module


def forward(module, x):
    return linear(x, module.weight, module.bias)


def forward_int8(module, x):
    return linear_int8(x, module.weight, module.bias)


def mlp(first, gelu, last, x):
    """The MLP of a transformer block: layers `first` and `last`, GELU between them."""
    return last(linear(x, first.weight, first.bias, gelu))


def linear(x, weight, bias=None, gelu=None):
    """F.linear through oneDNN: x (..., K), weight (N, K), bias (N,) -> (..., N); then F.gelu, if named."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if x.device.type != "cpu" or weight.dtype != dtype or dtype not in (torch.float32, torch.bfloat16):
        out = F.linear(x, weight, bias)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        out = Linear.apply(x.to(dtype), weight, bias)
    else:
        return onednn(x.to(dtype) if autocast else x, packed(weight), bias, gelu)
    return out if gelu is None else F.gelu(out, approximate=gelu)


class Linear(torch.autograd.Function):
    """F.linear and its gradients through oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return onednn(x, packed(weight), bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, into_x, into_weight, into_bias = grad.reshape(-1, grad.shape[-1]), None, None, None
        if ctx.needs_input_grad[0]:
            into_x = onednn(grad.contiguous(), packed(weight, transposed=True))
        if ctx.needs_input_grad[1]:
            into_weight = onednn(rows.t().contiguous(), x.reshape(-1, x.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            into_bias = rows.sum(0)
        return into_x, into_weight, into_bias


def onednn(x, weight, bias=None, gelu=None):
    """x @ weight.T + bias, the weight plain or from `packed`; then F.gelu(approximate=gelu), if named."""
    if POINTWISE is None:
        weight = weight if weight.is_mkldnn else weight.to_mkldnn()
        out = F.linear(x.contiguous().to_mkldnn(), weight, bias).to_dense()
        return out if gelu is None else F.gelu(out, approximate=gelu)
    rest = ("none", [], "") if gelu is None else ("gelu", [], gelu)
    if x.numel() == x.shape[-1]:                    # oneDNN reads weights faster for four rows than for one
        return POINTWISE(x.reshape(1, -1).expand(4, -1), weight, bias, *rest)[0].view(*x.shape[:-1], -1)
    return POINTWISE(x, weight, bias, *rest)


# --------------------------------------------------------------------------------------------------
# packed weights are kept on the parameter, under the state they were made from


def state_of(weight):
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def packed(weight, transposed=False):
    """`weight`, or its transpose, as oneDNN wants it; as it is if it is trained or no copy shall be kept."""
    plain = weight.detach()
    if weight.requires_grad or not hasattr(weight, "packed"):
        return plain.t() if transposed else plain
    state, made = weight.packed.get(transposed, (None, None))
    if state != state_of(weight):
        plain = plain.t() if transposed else plain
        made = plain.to_mkldnn() if POINTWISE is None else torch.ops.mkldnn._reorder_linear_weight(plain)
        weight.packed[transposed] = state_of(weight), made
    return made


def linear_int8(x, weight, bias=None):
    """F.linear with the weight rounded to 8 bits, symmetrically, one scale for each output row."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return F.linear(x, weight, bias)
    state, made = getattr(weight, "packed_int8", (None, None))
    if state != state_of(weight):
        plain = weight.detach().float()
        scale = plain.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        made = (plain / scale).round().to(torch.int8), scale.flatten().to(x.dtype)
        weight.packed_int8 = state_of(weight), made
    out = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), *made).view(*x.shape[:-1], -1)
    return out if bias is None else out.add_(bias)


# --------------------------------------------------------------------------------------------------
# CUDA graphs


def record(model):
    """Let `generate` replay recorded token steps on a CUDA device; returns the model.

    A graph is recorded for each text length at first use, for each number of images, beams and tokens.
    Weights may change in place, but must stay where they are. Raises UserError on another device.
    """
    if model.device.type != "cuda":
        raise UserError("decoding is recorded as CUDA graphs: --compile needs --device cuda")
    model.recorded = {}
    return model


def replay(model, eager, cache, cross_kv, groups, rows, length):
    """`step` and `select` for decoding.py: `eager` for the prompt, into `cache`, and from there on graphs."""
    key = len(cross_kv), groups.n_image, rows, length                         # no image: plain GPT-2
    if key not in model.recorded:
        model.recorded[key] = Recorded(model, cross_kv, groups, rows, length)
    recorded, begun = model.recorded[key], False

    def select(parents):
        nonlocal begun
        if begun:
            recorded.cache.select(parents)
        else:
            recorded.start(cross_kv, cache, parents)
            begun = True

    def step(tokens):
        if cache.length == 0:
            return eager(tokens)
        if not begun:
            select(torch.arange(rows, device=tokens.device))
        return recorded.step(tokens)

    return step, select


class Recorded:
    """Token steps of `rows` texts over fixed buffers: cache, newest tokens, keys and values, logits."""

    def __init__(self, model, cross_kv, groups, rows, length):
        self.model, self.groups, self.graphs = model, groups, {}
        weight = model.gpt2.wte.weight
        self.cache = KVCache(model.gpt2.config, rows, length, weight.device, weight.dtype)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=weight.device)
        self.logits = weight.new_empty(rows, len(weight))
        self.cross_kv = {name: torch.empty_like(kv) for name, kv in cross_kv.items()}
        self.pool, self.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(weight.device)

    def start(self, cross_kv, cache, parents):
        """Begin with row parents[i] of `cache`, which holds the prompt, as row i."""
        for name, kv in cross_kv.items():
            self.cross_kv[name].copy_(kv)
        n = self.cache.length = cache.length
        self.cache.k[..., :n, :] = cache.k[:, parents, :, :n]
        self.cache.v[..., :n, :] = cache.v[:, parents, :, :n]

    def step(self, tokens):
        """The newest tokens (R, 1) -> logits (R, V)."""
        self.tokens.copy_(tokens)
        n = self.cache.length
        if n not in self.graphs:
            self.graphs[n] = self.capture(n)
        self.graphs[n].replay()
        self.cache.length = n + 1
        return self.logits.clone()                                  # decoding.py changes them in place

    def capture(self, n):
        """The step after n tokens as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.tokens.device):
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):                      # libraries set themselves up, unrecorded
                self.forward(n)
            torch.cuda.current_stream().wait_stream(self.side)
            with torch.cuda.graph(graph, pool=self.pool):
                self.forward(n)
        return graph

    def forward(self, n):
        self.cache.length = n
        x = self.model.hidden(self.tokens, self.cross_kv, self.groups, self.cache)
        self.logits.copy_(self.model.gpt2.logits(x[:, -1]))
