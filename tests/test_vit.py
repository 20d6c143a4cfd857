"""The ViT against Hugging Face's ViT and CLIP on the same weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from lib.cli import UserError
from lib.conv_stem import conv
from vit import ViT, ViTConfig

TINY = dict(image_size=32, patch_size=8, n_layer=2, n_head=4, n_embd=32, n_mlp=48)
HF = dict(image_size=32, patch_size=8, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
          intermediate_size=48)


def random_vit(**config):
    """A ViT whose every parameter, norms and biases too, is random: a swapped or forgotten one shows."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**TINY | config)).eval()
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return vit


def renamed(vit, table, drop=()):
    """Our parameters under another library's names; {i}: a block, [qkv]: thirds of a tensor."""
    theirs = {}
    for name, tensor in vit.state_dict().items():
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        *stem, kind = name.replace(f"blocks.{block}.", "blocks.{i}.").rsplit(".", 1)
        new = table.get(".".join([*stem, kind])) or f"{table['.'.join(stem)]}.{kind}"
        targets = [new.replace("[qkv]", letter) for letter in "qkv"] if "[qkv]" in new else [new]
        for target, part in zip(targets, tensor.chunk(len(targets))):
            theirs[target.replace("{i}", block)] = part
    return {name: tensor for name, tensor in theirs.items() if name not in drop}


@pytest.mark.parametrize("with_head, parameters", [(False, 85_798_656), (True, 86_567_656)])
def test_vit_parameter_count(with_head, parameters):
    with torch.device("meta"):
        vit = ViT(ViTConfig(n_class=1000 if with_head else 0))
    assert sum(p.numel() for p in vit.parameters()) == parameters


@pytest.mark.parametrize("activation, theirs", [("gelu", "gelu"), ("gelu_tanh", "gelu_new")])
def test_vit_features_equal_hugging_face(activation, theirs):
    transformers = pytest.importorskip("transformers")
    ours = random_vit(activation=activation)
    config = transformers.ViTConfig(**HF, hidden_act=theirs, layer_norm_eps=1e-6)
    vit = transformers.ViTModel(config, add_pooling_layer=False)
    layer = "layers.{i}."
    vit.load_state_dict(renamed(ours, {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed": "embeddings.patch_embeddings.projection", "norm": "layernorm",
        "blocks.{i}.norm1": layer + "layernorm_before", "blocks.{i}.norm2": layer + "layernorm_after",
        "blocks.{i}.attn.qkv": layer + "attention.[qkv]_proj",
        "blocks.{i}.attn.proj": layer + "attention.o_proj",
        "blocks.{i}.mlp.fc1": layer + "mlp.fc1", "blocks.{i}.mlp.fc2": layer + "mlp.fc2"}))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        difference = ours(images) - vit.eval()(images).last_hidden_state
    assert difference.shape == (3, 17, 32) and difference.abs().max() <= 1e-4


def test_vit_features_equal_hugging_face_clip():
    """CLIP: a norm before the blocks and none after, quick GELU, eps 1e-5, no bias in its patch embedding."""
    transformers = pytest.importorskip("transformers")
    ours = random_vit(activation="quick_gelu", pre_norm=True, final_norm=False, eps=1e-5)
    torch.nn.init.zeros_(ours.patch_embed.bias)
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF, hidden_act="quick_gelu"))
    layer = "encoder.layers.{i}."
    weights = renamed(ours, {
        "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm",
        "blocks.{i}.norm1": layer + "layer_norm1", "blocks.{i}.norm2": layer + "layer_norm2",
        "blocks.{i}.attn.qkv": layer + "self_attn.[qkv]_proj",
        "blocks.{i}.attn.proj": layer + "self_attn.out_proj",
        "blocks.{i}.mlp.fc1": layer + "mlp.fc1", "blocks.{i}.mlp.fc2": layer + "mlp.fc2"},
        drop=["embeddings.patch_embedding.bias"])
    theirs = clip.state_dict()
    weights = {name: t.reshape(theirs[name].shape) for name, t in weights.items()}
    unused = clip.load_state_dict(weights, strict=False)
    assert set(unused.missing_keys) == {"post_layernorm.weight", "post_layernorm.bias"}
    assert not unused.unexpected_keys
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (ours(images) - clip.eval()(images).last_hidden_state).abs().max() <= 1e-4


def test_vit_classifies_from_the_class_token():
    vit = random_vit(n_class=5)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit.classify(images), vit.head(vit(images)[:, 0]))
    with pytest.raises(UserError, match="no classification head"):
        random_vit().classify(images)


def test_vit_refuses_pictures_of_another_size():
    with pytest.raises(UserError, match=r"\(1, 3, 16, 64\), but .* \(B, 3, 32, 32\)"):
        random_vit()(torch.zeros(1, 3, 16, 64))         # as many patches, but not their places


@pytest.mark.parametrize("wrong, message", [
    (dict(image_size=30), "30 is not a multiple of patch_size 8"),
    (dict(n_head=5), "32 cannot be split over 5 heads"),
    (dict(activation="relu"), "'relu'; known: gelu, ")])
def test_vit_config_names_what_does_not_fit(wrong, message):
    with pytest.raises(UserError, match=message):
        ViTConfig(**TINY | wrong)


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
def test_conv_stem_pads_as_tensorflow_does(kernel, stride):
    """TensorFlow's "same": ceil(S / stride) outputs, the larger half of an odd number of zeros last."""
    x, layer = torch.randn(1, 4, 12, 12), conv(4, 6, kernel, stride)
    weights = next(module for module in layer.modules() if isinstance(module, torch.nn.Conv2d))
    total = max((math.ceil(12 / stride) - 1) * stride + kernel - 12, 0)
    pads = (total // 2, total - total // 2) * 2
    expected = F.conv2d(F.pad(x, pads), weights.weight, weights.bias, stride)
    assert layer(x).shape == (1, 6, 12 // stride, 12 // stride)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_vit_with_conv_stem_is_a_vit_on_its_features():
    config = ViTConfig(image_size=64, patch_size=32, n_layer=1, n_head=2, n_embd=16, n_mlp=16,
                       conv_stem=True)
    vit, images = ViT(config).eval(), torch.randn(2, 3, 64, 64)
    assert sum(p.numel() for p in vit.stem.parameters()) == 2_336_304       # EfficientNet-Lite0's
    features = vit.stem(images)
    assert features.shape == (2, 192, 2, 2)
    assert torch.equal(vit(images), vit.encode(features)) and vit(images).shape == (2, 1 + 4, 16)
    with pytest.raises(UserError, match="multiple of the conv_stem's 32"):
        ViTConfig(patch_size=14, conv_stem=True)
