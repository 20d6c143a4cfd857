"""Resampler and cross-attention against their formulas, and rows that share an image against copies of it."""

import math

import pytest
import torch

from lib.cli import UserError
from resampler import CrossAttention, PerceiverResampler, ResamplerConfig

TINY = ResamplerConfig(n_latent=5, n_layer=2, n_head=3, head_width=4, n_mlp=7, dropout=0.5)


def random_weights(module):
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module.eval()


def norm(x, ln):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ln.weight + ln.bias


def attention(q, k, v, heads):
    """q (T, heads * D), k, v (L, heads * D), head by head."""
    seen = []
    for query, key, value in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
        seen.append((query @ key.T / math.sqrt(query.shape[-1])).softmax(-1) @ value)
    return torch.cat(seen, dim=-1)


def test_fusion_parameter_counts():
    """Four bytes each: fusion.safetensors is 44 MB, in half precision 22."""
    with torch.device("meta"):
        resampler = PerceiverResampler(ResamplerConfig(), 768, 768)
        cross = [CrossAttention(768, 12, 0.1) for _ in range(3)]
    counts = [sum(p.numel() for m in modules for p in m.parameters()) for modules in ([resampler], cross)]
    assert counts == [3_992_576, 7_091_712] and sum(counts) == 11_084_288
    assert round(sum(counts) * 4 / 1e6) == 44 and round(sum(counts) * 2 / 1e6) == 22


@torch.no_grad()
@pytest.mark.parametrize("width_in", [16, 10])
def test_resampler_equals_its_formula(width_in):
    resampler = random_weights(PerceiverResampler(TINY, width_in, 16))
    patches = torch.randn(2, 9, width_in)
    for row, x in enumerate(patches):
        x = x @ resampler.project.weight.T + resampler.project.bias if width_in != 16 else x
        latents = resampler.latents
        for layer in resampler.layers:
            assert [getattr(layer, name).bias for name in ("q", "kv", "proj")] == [None] * 3
            k, v = (norm(x, layer.norm_patches) @ layer.kv.weight.T).chunk(2, dim=-1)      # k first
            seen = attention(layer.q(norm(latents, layer.norm_latents)), k, v, 3)
            latents = latents + seen @ layer.proj.weight.T
            h = layer.fc1(norm(latents, layer.norm_mlp))
            latents = latents + layer.fc2(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
        assert torch.allclose(resampler(patches)[row], latents, atol=1e-4)


@torch.no_grad()
def test_cross_attention_equals_its_formula():
    cross = random_weights(CrossAttention(12, 3, 0.5))
    x, visual = torch.randn(2, 4, 12), torch.randn(2, 5, 12)
    out, _ = cross(x, cross.cross_kv(visual))
    for row in range(2):
        k, v = cross.kv(visual[row]).chunk(2, dim=-1)
        seen = attention(cross.q(norm(x[row], cross.ln)), k, v, 3)
        assert torch.allclose(out[row], x[row] + cross.out(seen), atol=1e-5)


def test_rows_that_share_an_image_equal_copies_of_it():
    """Several rows an image, as beams are; the gradient to the images too."""
    cross = random_weights(CrossAttention(12, 3, 0.5))
    visual, x = torch.randn(3, 5, 12, requires_grad=True), torch.randn(6, 4, 12)
    shared, _ = cross(x, cross.cross_kv(visual))
    copied, _ = cross(x, cross.cross_kv(visual.repeat_interleave(2, 0)))
    assert torch.allclose(shared, copied, atol=1e-5)
    weight = torch.randn_like(shared)
    for_shared, = torch.autograd.grad((shared * weight).sum(), visual)
    for_copied, = torch.autograd.grad((copied * weight).sum(), visual)
    assert torch.allclose(for_shared, for_copied, atol=1e-4)


@torch.no_grad()
def test_weights_come_from_the_forward_pass_that_trains():
    """Asking for them changes nothing, and they give the same values again."""
    cross, x = random_weights(CrossAttention(12, 3, 0.5)), torch.randn(4, 4, 12)
    k, v = kv = cross.cross_kv(torch.randn(2, 5, 12))
    out, weights = cross(x, kv, return_weights=True)
    assert torch.allclose(out, cross(x, kv)[0], atol=1e-5) and weights.shape == (2, 3, 8, 5)
    assert torch.allclose(out, x + cross.out((weights @ v).transpose(1, 2).reshape(4, 4, 12)), atol=1e-5)
    resampler, patches = random_weights(PerceiverResampler(TINY, 16, 16)), torch.randn(2, 9, 16)
    latents, weights = resampler(patches, return_weights=True)
    assert torch.allclose(latents, resampler(patches), atol=1e-5)
    assert weights.shape == (2, 3, 5, 9) and torch.allclose(weights.sum(-1), torch.ones(2, 3, 5))


def test_fusion_drops_out_in_training_only():
    resampler, patches = random_weights(PerceiverResampler(TINY, 16, 16)), torch.randn(1, 9, 16)
    cross, x = random_weights(CrossAttention(16, 4, 0.5)), torch.randn(1, 4, 16)
    for module, out in ((resampler, lambda: resampler(patches)),
                        (cross, lambda: cross(x, cross.cross_kv(patches))[0] - x)):
        assert torch.equal(out(), out())
        module.train()
        assert not torch.equal(out(), out())
        dropped = [(out() == 0).float().mean() for _ in range(50)]
        assert module is resampler or 0.4 < sum(dropped) / 50 < 0.6


@pytest.mark.parametrize("name", ["n_latent", "n_layer", "n_head", "head_width", "n_mlp"])
def test_resampler_config_refuses_none_of_something(name):
    with pytest.raises(UserError, match=f"{name} is 0, but must be from 1"):
        ResamplerConfig(**{name: 0})
