"""oneDNN's packed layers compute what plain PyTorch does; int8 weights nearly so, outlier channels or not."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_model import batch, tiny_model

import fast
from decoding import DecodingConfig
from lib.cli import UserError
from tokenizer import pack_captions
from vit import ACTIVATIONS, ViT, ViTConfig

pytestmark = pytest.mark.skipif(not fast.available(), reason="PyTorch without oneDNN")


@pytest.mark.parametrize("beams", [1, 4])
def test_pack_leaves_the_captions_as_they_were(beams):
    model = tiny_model()
    packed = fast.pack(copy.deepcopy(model).requires_grad_(False))
    images, config = torch.randn(3, 3, 16, 16), DecodingConfig(num_beams=beams, max_length=12, min_length=12)
    plain, scores = model.generate_tokens(config, images=images)
    tokens, packed_scores = packed.generate_tokens(config, images=images)
    assert tokens == plain
    assert packed_scores == pytest.approx(scores, rel=1e-4)
    assert len(set(map(tuple, plain))) > 1                     # else the images would not matter


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (1,), ()])
def test_linear_and_its_gradients_are_pytorchs(dtype, tolerance, trained, shape):
    x = torch.randn(*shape, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(48, 64, dtype=dtype, requires_grad=trained)
    bias = torch.randn(48, dtype=dtype, requires_grad=trained)
    inputs, upstream = [t for t in (x, weight, bias) if t.requires_grad], torch.randn(*shape, 48, dtype=dtype)
    results = []
    packed = fast.PackedWeight(int8=False, copies=True)
    for function in (partial(fast.linear, packed=packed), F.linear):
        y = function(x, weight, bias)
        with torch.inference_mode():
            again = function(x, weight, bias)
        assert y.shape == again.shape == (*shape, 48)
        results.append([y, again, *torch.autograd.grad(y, inputs, upstream)])
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("grad", [False, True])
def test_packed_mlps_keep_their_activation(activation, grad):
    config = ViTConfig(image_size=16, patch_size=8, n_layer=2, n_head=2, n_embd=16, n_mlp=24,
                       activation=activation)
    plain = ViT(config).eval().requires_grad_(False)
    images = 3 * torch.randn(2, 3, 16, 16, requires_grad=grad)
    packed = fast.pack(copy.deepcopy(plain))
    copied = copy.deepcopy(packed)
    copied.blocks[0].mlp.fc1.weight.zero_()                    # of the copy alone
    assert torch.allclose(packed(images), plain(images), atol=1e-5)
    assert not torch.allclose(copied(images), plain(images), atol=1e-2)


def test_packed_weights_follow_the_parameter():
    model, images = fast.pack(tiny_model().requires_grad_(False)), torch.randn(2, 3, 16, 16)
    tokens, _ = batch((3, 5))

    def logits(model):
        with torch.inference_mode():
            return model(tokens, model.encode(images))[0]

    before = logits(model)
    with torch.no_grad():
        model.gpt2.h[1].mlp.c_fc.weight.mul_(2)
        model.gpt2.wte.weight.add_(0.1)
    changed = logits(model)
    assert not torch.allclose(before, changed)
    assert torch.allclose(changed, logits(copy.deepcopy(model)), atol=1e-5)
    plain = tiny_model()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(changed, logits(plain), atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_packed_training_step_has_the_gradients_of_the_plain_one(smoothing):
    plain = tiny_model()
    packed = fast.pack(copy.deepcopy(plain))
    tokens, targets, positions = pack_captions([[[4, 1, 7], [2]], [[], [3, 0, 5], [8]]], 39)
    features = torch.randn(2, 4, 12)
    gradients = []
    for model in (plain, packed):
        loss = model.loss(tokens, model.encode(features=features), targets, positions, smoothing)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        error = (gradient - gradients[1][name]).norm() / gradient.norm()
        assert error < 1e-5, name


def test_int8_weights_bear_outlier_channels():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 768), torch.randn(96, 768) / 28
    x[:, :3] *= 50                                             # as some of GPT-2's channels are
    exact, x, weight = F.linear(x, weight), x.bfloat16(), weight.bfloat16()
    rounded = partial(fast.linear, packed=fast.PackedWeight(int8=True, copies=True))
    error = (rounded(x, weight, None).float() - exact).norm() / exact.norm()
    assert error < 0.02
    bias = torch.randn(96).bfloat16()
    with_bias = rounded(x[:, None], weight, bias)
    assert torch.allclose(with_bias[:, 0].float(), (rounded(x, weight, None) + bias).float())


def test_a_bias_alone_can_be_trained():
    model = fast.pack(torch.nn.Sequential(torch.nn.Linear(8, 4)))
    linear = model[0]
    linear.weight.requires_grad_(False)
    linear(torch.randn(3, 8)).sum().backward()
    assert torch.equal(linear.bias.grad, torch.full((4,), 3.0))


@pytest.mark.parametrize("int8", [False, True])
def test_pack_leaves_bfloat16_alone_on_a_cpu_without_it(monkeypatch, capsys, int8):
    monkeypatch.setattr(fast, "available", lambda dtype: dtype == torch.float32)
    model, images = tiny_model().bfloat16().requires_grad_(False), torch.randn(2, 3, 16, 16)
    plain = DecodingConfig(max_length=5)
    expected = model.generate_tokens(plain, images=images)
    fast.pack(model, int8)
    assert "float32 will be faster" in capsys.readouterr().err
    assert type(model.vit.blocks[0].attn.qkv) is torch.nn.Linear
    assert isinstance(model.gpt2.wte, fast.PackedEmbedding) == int8
    assert int8 or model.generate_tokens(plain, images=images) == expected


def test_int8_captions_and_its_limits():
    model = tiny_model()
    with pytest.raises(UserError, match="bfloat16"):
        fast.pack(model, int8=True)
    model, images = model.bfloat16(), torch.randn(2, 3, 16, 16)
    tokens, _ = batch((6, 6))
    with torch.inference_mode():
        visual = model.encode(images)
        exact = model(tokens, visual)[0].float()
        rounded = fast.pack(copy.deepcopy(model), int8=True)(tokens, visual)[0]
        again = fast.pack(fast.pack(model), int8=True)(tokens, visual)[0]
    assert 0 < (rounded.float() - exact).norm() / exact.norm() < 0.1
    assert torch.equal(rounded, again)
