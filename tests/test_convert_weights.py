"""Each layout against the library that owns it: transformers, others through fixtures/convert/make.py."""

import functools
import http.server
import json
import math
import os
import pickle
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import convert_weights
from convert_weights import ConvertConfig, convert, load_gpt2, load_published, load_vit
from gpt2 import GPT2, GPT2Config
from lib import checkpoint, download
from lib.cli import UserError
from model import VisionGPT, VisionGPTConfig
from resampler import ResamplerConfig
from tokenizer import Tokenizer
from vit import ViT, ViTConfig

FIXTURES = Path(__file__).parent / "fixtures" / "convert"
IMAGES = torch.sin(torch.arange(2 * 3 * 8 * 8, dtype=torch.float32)).view(2, 3, 8, 8)       # as make.py's
TOKENS = torch.arange(18).view(2, 9) * 7 % 29
TINY_VIT = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16,
                image_size=8, patch_size=4)
TINY_GPT2 = dict(n_embd=12, n_layer=2, n_head=3, n_positions=9, vocab_size=29, bos_token_id=0, eos_token_id=0)


def randomize(module):
    """Every tensor random, LayerNorms and biases too, or a mistake in them would not show."""
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(module.named_parameters()):
        p.data.normal_(std=0.3, generator=generator)
        if p.ndim == 1 and name.endswith("weight"):
            p.data += 1
    return module.eval()


def save(path, content):
    torch.save(content, path)
    return path


def arrays(name):
    with np.load(FIXTURES / f"{name}-outputs.npz") as outputs:
        return [torch.from_numpy(outputs[key]) for key in outputs.files]


@torch.no_grad()
def assert_vit(vit, features, logits=None):
    torch.testing.assert_close(vit(IMAGES), features, atol=1e-4, rtol=0)
    if logits is not None:
        torch.testing.assert_close(vit.classify(IMAGES), logits, atol=1e-4, rtol=0)


@torch.no_grad()
def assert_gpt2(gpt2, logits):
    torch.testing.assert_close(gpt2(TOKENS), logits, atol=2e-4, rtol=0)


# --------------------------------------------------------------------------------------------------
# ViT


def test_torchvision_gives_the_source_outputs():
    vit, layout = load_vit(FIXTURES / "torchvision.pth", heads=3)
    assert layout == "torchvision" and (vit.config.eps, vit.config.activation) == (1e-6, "gelu")
    assert_vit(vit, *arrays("torchvision"))


def test_torchvision_files_from_before_the_renaming_give_the_same(tmp_path):
    state = torch.load(FIXTURES / "torchvision.pth")
    old = {n.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): t for n, t in state.items()}
    vit, _ = load_vit(save(tmp_path / "swag.pth", old), heads=3)
    assert vit.config.transform["filter"] == "bicubic"                   # SWAG's, by its file name
    assert_vit(vit, *arrays("torchvision"))


@pytest.mark.parametrize("wrapper, mean", [(None, 0.5), ("model", 0.485), ("teacher", 0.485)])
def test_timm_and_its_kin_give_the_source_outputs(tmp_path, wrapper, mean):
    """timm's files are flat; DeiT's lie under 'model', DINO's training under 'teacher' with another head."""
    state = torch.load(FIXTURES / "timm.pth")
    if wrapper == "teacher":
        state = {f"module.backbone.{n}": t for n, t in state.items() if not n.startswith("head")}
        state["module.head.last_layer.weight_g"] = torch.ones(3)
    content = {wrapper: state, "epoch": 3} if wrapper else state
    vit, _ = load_vit(save(tmp_path / "file.pth", content), heads=3)
    features, logits = arrays("timm")
    assert vit.config.mean[0] == mean
    assert_vit(vit, features, None if wrapper == "teacher" else logits)


def test_timm_config_beside_the_weights_rules(tmp_path):
    shown = dict(mean=[0.1] * 3, std=[0.2] * 3, crop_pct=0.8, interpolation="bilinear", input_size=[3, 8, 8])
    (tmp_path / "config.json").write_text(json.dumps(dict(pretrained_cfg=shown)))
    shutil.copy(FIXTURES / "timm.pth", tmp_path / "pytorch_model.bin")
    config = load_vit(tmp_path, heads=3)[0].config
    assert (config.mean, config.std) == ((0.1,) * 3, (0.2,) * 3)
    assert config.transform == dict(resize=10, crop=8, filter="bilinear")


@pytest.mark.parametrize("rename", [
    lambda name: name,
    lambda name: "params/" + name.replace("MlpBlock_3", "MlpBlock_0").replace("LayerNorm_2", "LayerNorm_1")
                                 .replace("Attention_1", "Attention_0"),
    lambda name: "opt/target/" + name])
def test_google_gives_the_source_outputs(tmp_path, rename):
    with np.load(FIXTURES / "google.npz") as source:
        np.savez(tmp_path / "file.npz", **{rename(name): source[name] for name in source.files})
    vit, layout = load_vit(tmp_path / "file.npz")                        # the kernels' shape tells the heads
    assert layout == "Google .npz" and (vit.config.n_head, vit.config.activation) == (3, "gelu_tanh")
    assert vit.config.transform == dict(squash=8, filter="bilinear")
    assert_vit(vit, *arrays("google"))


def test_a_head_behind_pre_logits_is_dropped(tmp_path):
    with np.load(FIXTURES / "google.npz") as source:
        np.savez(tmp_path / "file.npz", **source, **{"pre_logits/kernel": np.eye(12, dtype=np.float32),
                                                     "pre_logits/bias": np.zeros(12, np.float32)})
    vit, _ = load_vit(tmp_path / "file.npz")
    assert vit.head is None
    assert_vit(vit, arrays("google")[0])


@pytest.mark.parametrize("form", ["classifier", "no classifier"])
def test_hugging_face_vit_gives_the_source_outputs(tmp_path, form):
    import transformers
    config = transformers.ViTConfig(**TINY_VIT, num_labels=5, hidden_act="gelu_new", layer_norm_eps=1e-3)
    model = randomize(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    if form == "no classifier":
        model.vit.save_pretrained(tmp_path)
    vit, layout = load_vit(tmp_path)
    assert layout == "Hugging Face ViT" and (vit.config.eps, vit.config.activation) == (1e-3, "gelu_tanh")
    with torch.no_grad():
        features = model.vit(IMAGES).last_hidden_state
        assert_vit(vit, features, None if form == "no classifier" else model(IMAGES).logits)


def test_hugging_face_preprocessor_beside_the_weights_rules(tmp_path):
    import transformers
    transformers.ViTModel(transformers.ViTConfig(**TINY_VIT)).save_pretrained(tmp_path)
    shown = dict(image_mean=[0.1] * 3, image_std=[0.2] * 3, size=10, crop_size=8, do_center_crop=True,
                 resample=3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(shown))
    config = load_vit(tmp_path)[0].config
    assert (config.mean, config.std) == ((0.1,) * 3, (0.2,) * 3)
    assert config.transform == dict(resize=10, crop=8, filter="bicubic")
    shown |= dict(size={"height": 8, "width": 8}, do_center_crop=False, resample=2)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(shown))
    assert load_vit(tmp_path)[0].config.transform == dict(squash=8, filter="bilinear")


@pytest.mark.parametrize("tower", ["both", "vision"])
def test_hugging_face_clip_gives_the_tokens_before_the_post_norm(tmp_path, tower):
    import transformers
    text = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16,
                vocab_size=9, bos_token_id=0, eos_token_id=1, max_position_embeddings=5)
    config = transformers.CLIPConfig(vision_config=TINY_VIT, text_config=text)
    model = randomize(transformers.CLIPModel(config))
    if tower == "both":
        model.save_pretrained(tmp_path)
    else:
        vision = transformers.CLIPVisionModel(config.vision_config)
        vision.load_state_dict(model.vision_model.state_dict())
        vision.save_pretrained(tmp_path)
    vit, layout = load_vit(tmp_path)
    assert layout == "Hugging Face CLIP" and vit.head is None and vit.config.eps == 1e-5
    with torch.no_grad():
        assert_vit(vit, model.vision_model(IMAGES).last_hidden_state)


class OpenAITower(nn.Module):
    """CLIP's visual tower with OpenAI's names, and its tokens before the post-norm."""

    def __init__(self, C=64, layers=2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, C, 4, 4, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(C))
        self.positional_embedding = nn.Parameter(torch.zeros(5, C))
        self.ln_pre, self.ln_post = nn.LayerNorm(C), nn.LayerNorm(C)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(OpenAIBlock(C) for _ in range(layers)))
        self.proj = nn.Parameter(torch.zeros(C, 6))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.transformer.resblocks(self.ln_pre(x))


class OpenAIBlock(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.attn = nn.MultiheadAttention(C, C // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(C, 2 * C), c_proj=nn.Linear(2 * C, C)))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("archive", ["TorchScript", "state dict"])
def test_openai_clip_gives_the_tokens_before_the_post_norm(tmp_path, archive):
    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.logit_scale = OpenAITower(), nn.Parameter(torch.zeros(()))
            self.ln_final = nn.LayerNorm(4)
            self.register_buffer("context_length", torch.tensor(77))

        def forward(self, images):
            return self.visual(images)

    clip = randomize(Clip())
    clip.visual.half().float()                                           # OpenAI's file is in half precision
    with torch.no_grad():
        features = clip(IMAGES)
        if archive == "TorchScript":
            torch.jit.trace(clip, IMAGES, check_trace=False).save(tmp_path / "clip.pt")
        else:
            clip.visual.half()
            save(tmp_path / "clip.pt", clip.state_dict())
    vit, layout = load_vit(tmp_path / "clip.pt")
    assert layout == "OpenAI CLIP" and vit.config.n_head == 1 and vit.config.mean[0] == 0.48145466
    assert_vit(vit, features)


def test_torchscript_reader_runs_nothing_of_the_archive(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
        archive.writestr("clip/data.pkl", pickle.dumps(Code()))
        archive.writestr("clip/constants.pkl", b"")
    with pytest.raises(UserError):
        load_vit(tmp_path / "clip.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("transform, size, wanted", [
    (dict(resize=256, crop=224, filter="bilinear"), 224, (256, 224)),
    (dict(resize=256, crop=224, filter="bilinear"), 112, (128, 112)),
    (dict(resize=248, crop=224, filter="bicubic"), 384, (384, 384)),
    (dict(resize=400, crop=384, filter="bicubic"), 384, (400, 384))])
def test_transforms_follow_the_image_size(transform, size, wanted):
    fitted = convert_weights.resize_transform(transform, size)
    assert (fitted["resize"], fitted["crop"], fitted["filter"]) == (*wanted, transform["filter"])


def test_evaluation_takes_the_centre_or_squashes(tmp_path):
    """A picture of four vertical stripes: the centre crop sees the middle two, squashing all four."""
    stripes = np.repeat(np.array([0, 85, 170, 255], np.uint8), 20)
    Image.fromarray(np.tile(stripes[None, :, None], (40, 1, 3))).save(tmp_path / "stripes.png")
    config = ViTConfig(8, 4, mean=(0,) * 3, std=(1,) * 3, transform=dict(resize=8, crop=8, filter="bilinear"))
    row = convert_weights.eval_transform(tmp_path / "stripes.png", config)[0, 0, 4] * 255
    assert row[1] == 85 and row[6] == 170
    config.transform = dict(squash=8, filter="bilinear")
    row = convert_weights.eval_transform(tmp_path / "stripes.png", config)[0, 0, 4] * 255
    assert row[0] == 0 and row[7] == 255


# --------------------------------------------------------------------------------------------------
# GPT-2


def hugging_face_gpt2(**options):
    import transformers
    return randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY_GPT2, **options)))


@pytest.mark.parametrize("form", ["safetensors", "shards", "hub", "state dict"])
def test_hugging_face_gpt2_gives_the_source_outputs(tmp_path, form):
    """hub: without the prefix, with masks, as published; state dict: with head and both kinds of mask."""
    model = hugging_face_gpt2(layer_norm_epsilon=1e-3)
    model.save_pretrained(tmp_path, **({"max_shard_size": "5KB"} if form == "shards" else {}))
    state = model.state_dict()
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 9, 9, dtype=torch.uint8).tril()
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if form == "hub":
        del state["lm_head.weight"]
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    if form in ("hub", "state dict"):
        (tmp_path / "model.safetensors").unlink()
        save(tmp_path / "pytorch_model.bin", state)
    gpt2, layout = load_gpt2(tmp_path)
    assert layout == "Hugging Face GPT-2" and (gpt2.config.eps, gpt2.config.activation) == (1e-3, "gelu_tanh")
    with torch.no_grad():
        assert_gpt2(gpt2, model(TOKENS).logits)


def test_tensorflow_gives_the_source_outputs():
    gpt2, layout = load_gpt2(FIXTURES / "tensorflow")                    # hparams.json tells the heads
    assert layout == "OpenAI GPT-2" and gpt2.config.n_head == 3
    assert_gpt2(gpt2, *arrays("tensorflow"))
    assert_gpt2(load_gpt2(FIXTURES / "tensorflow" / "model.ckpt")[0], *arrays("tensorflow"))


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_gives_the_source_outputs_with_the_exact_gelu(tmp_path, bias):
    model = hugging_face_gpt2(activation_function="gelu")        # same formulas, weights the other way round
    state = {f"_orig_mod.{name}": tensor.T.contiguous() if "c_" in name and tensor.ndim > 1 else tensor
             for name, tensor in model.state_dict().items()}
    if not bias:
        for name in [name for name in state if name.endswith(".bias")]:
            state.pop(name).zero_()
    save(tmp_path / "ckpt.pt", dict(model=state, model_args=dict(n_head=3), config=dict(n_head=99)))
    gpt2, layout = load_gpt2(tmp_path / "ckpt.pt")
    assert layout == "nanoGPT" and gpt2.config.activation == "gelu"
    with torch.no_grad():
        assert_gpt2(gpt2, model(TOKENS).logits)


def test_rows_beyond_the_vocabulary_are_cut_with_a_notice(tmp_path, capsys):
    padded = GPT2(GPT2Config(50304, 8, 1, 2, 4))
    state = {f"transformer.{name}": tensor for name, tensor in padded.state_dict().items()}
    save(tmp_path / "ckpt.pt", dict(model=state | {"lm_head.weight": state["transformer.wte.weight"]},
                                    model_args=dict(n_head=2)))
    gpt2, _ = load_gpt2(tmp_path / "ckpt.pt")
    assert torch.equal(gpt2.wte.weight, state["transformer.wte.weight"][:50257])
    assert "47 rows" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# the published Vision-GPT


def published_state(cross=(1, 3), layers=4, vocab=51, C=24):
    """A random checkpoint in the published layout: cross-attention before the blocks `cross` of GPT-2."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def add(name, *shape):
        around = 1 if len(shape) == 1 and name.endswith((".scale", ".weight")) else 0        # a LayerNorm's
        state[name] = torch.randn(shape, generator=generator) * 0.3 + around

    def linear(name, n_in, n_out, bias=True):
        add(f"{name}.weight", n_out, n_in)
        if bias:
            add(f"{name}.bias", n_out)

    def attention(name):
        for part in ("W_query", "W_key", "W_value", "out_proj"):
            linear(f"{name}.att.{part}", C, C)

    def norm(name, scale="scale", shift="shift"):
        add(f"{name}.{scale}", C)
        add(f"{name}.{shift}", C)

    add("tok_emb.weight", vocab, C)
    state["out_head.weight"] = state["tok_emb.weight"]
    add("pos_emb.weight", 10, C)
    kinds = [kind for i in range(layers) for kind in (["cross", "text"] if i in cross else ["text"])]
    for t, kind in enumerate(kinds):
        attention(f"trf_blocks.{t}")
        if kind == "cross":
            norm(f"trf_blocks.{t}.attn_norm")
            continue
        state[f"trf_blocks.{t}.att.mask"] = torch.ones(6, 6).triu(1)
        linear(f"trf_blocks.{t}.ff.layers.0", C, 4 * C)
        linear(f"trf_blocks.{t}.ff.layers.2", 4 * C, C)
        norm(f"trf_blocks.{t}.norm1")
        norm(f"trf_blocks.{t}.norm2")
    norm("final_norm")
    tower = torch.load(FIXTURES / "torchvision.pth")
    for name, tensor in tower.items():                                   # widened from 12 to C channels
        shape = [2 * n if n in (12, 36) else n for n in tensor.shape]
        add(f"vision.encoder.model.{name}", *shape)
    add("vision.resampler.latents", 7, C)
    for d in range(2):
        linear(f"vision.resampler.to_q.{d}", C, 128, bias=False)
        linear(f"vision.resampler.to_kv.{d}", C, 256, bias=False)
        linear(f"vision.resampler.proj_out.{d}", 128, C, bias=False)
        for part in ("norms_latent", "norms_media"):
            norm(f"vision.resampler.{part}.{d}", "weight", "bias")
        norm(f"vision.resampler.mlp.{d}.0", "weight", "bias")
        linear(f"vision.resampler.mlp.{d}.1", C, 16)
        linear(f"vision.resampler.mlp.{d}.3", 16, C)
    return state


def published_forward(w, images, tokens, heads, vit_heads, blocks):
    """The published model in plain functions of its state dict: images, tokens (B, T) -> logits (B, T, V)."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name, eps, scale="scale", shift="shift"):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * w[f"{name}.{scale}"] + w[f"{name}.{shift}"]

    def attend(q, k, v, heads, mask=None):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    p = "vision.encoder.model."
    filters = w[p + "conv_proj.weight"]
    x = F.conv2d(images, filters, w[p + "conv_proj.bias"], stride=filters.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w[p + "class_token"].expand(len(x), -1, -1), x], 1) + w[p + "encoder.pos_embedding"]
    for i in range(sum(name.endswith("in_proj_bias") for name in w)):
        b = f"{p}encoder.layers.encoder_layer_{i}."
        y = norm(x, b + "ln_1", 1e-6, "weight", "bias")
        qkv = y @ w[b + "self_attention.in_proj_weight"].T + w[b + "self_attention.in_proj_bias"]
        x = x + linear(attend(*qkv.chunk(3, -1), vit_heads), b + "self_attention.out_proj")
        y = norm(x, b + "ln_2", 1e-6, "weight", "bias")
        x = x + linear(F.gelu(linear(y, b + "mlp.0")), b + "mlp.3")
    media = norm(x, p + "encoder.ln", 1e-6, "weight", "bias")[:, 1:]
    latents = w["vision.resampler.latents"].expand(len(images), -1, -1)
    for d in range(2):
        r = "vision.resampler."
        q = linear(norm(latents, f"{r}norms_latent.{d}", 1e-5, "weight", "bias"), f"{r}to_q.{d}")
        k, v = linear(norm(media, f"{r}norms_media.{d}", 1e-5, "weight", "bias"),
                      f"{r}to_kv.{d}").chunk(2, -1)
        latents = latents + linear(attend(q, k, v, q.shape[-1] // 64), f"{r}proj_out.{d}")
        y = norm(latents, f"{r}mlp.{d}.0", 1e-5, "weight", "bias")
        latents = latents + linear(F.gelu(linear(y, f"{r}mlp.{d}.1")), f"{r}mlp.{d}.3")
    T = tokens.shape[1]
    x = w["tok_emb.weight"][tokens] + w["pos_emb.weight"][:T]
    mask = torch.ones(T, T).triu(1).bool()
    for t in range(blocks):
        b, cross = f"trf_blocks.{t}", f"trf_blocks.{t}.attn_norm.scale" in w
        y = norm(x, f"{b}.{'attn_norm' if cross else 'norm1'}", 1e-5)
        q, k, v = (linear(s, f"{b}.att.W_{part}") for s, part in
                   zip((y, latents if cross else y, latents if cross else y), ("query", "key", "value")))
        x = x + linear(attend(q, k, v, heads, None if cross else mask), f"{b}.att.out_proj")
        if not cross:
            y = linear(norm(x, f"{b}.norm2", 1e-5), f"{b}.ff.layers.0")
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + linear(y, f"{b}.ff.layers.2")
    return norm(x, "final_norm", 1e-5) @ w["out_head.weight"].T


@pytest.mark.parametrize("cross, dtype", [
    ((1, 3), torch.float32), ((0, 2), torch.float16), ((1, 2, 3), torch.float32)])
def test_published_checkpoint_gives_the_source_outputs(tmp_path, cross, dtype):
    state = {name: tensor.to(dtype) for name, tensor in published_state(cross).items()}
    file = save(tmp_path / "model_checkpoint.pth", dict(
        model_state_dict=state, config=dict(vocab_size=51), epoch=1, loss=None, model_class="GPTModal"))
    convert(ConvertConfig(vision_gpt=str(file), out=str(tmp_path / "out"), heads=3))
    model = VisionGPT.from_pretrained(tmp_path / "out", device="cpu")
    assert model.config.cross_attention == cross and model.config.gpt2.vocab_size == 50
    training = checkpoint.read_config(tmp_path / "out")["training"]
    assert training["photographs"] is True and "data" not in training   # evaluate.py took it for a folder
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        logits, _ = model(tokens, model.encode(IMAGES))
        state = {name: tensor.float() for name, tensor in state.items()}
        wanted = published_forward(state, IMAGES, tokens, 3, 3, 4 + len(cross))
    torch.testing.assert_close(logits, wanted[..., :50], atol=2e-4, rtol=0)


def test_published_checkpoint_with_a_damaged_layout_is_refused(tmp_path):
    state = published_state()
    del state["trf_blocks.2.ff.layers.0.bias"]
    state["trf_blocks.0.gate"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"missing gpt2\.h\.1\.mlp\.c_fc\.bias.*unknown 'text\.0\.gate'"):
        load_published(save(tmp_path / "file.pth", dict(model_state_dict=state)), heads=3)


# --------------------------------------------------------------------------------------------------
# refusals


def bomb(file):
    """An .npz of 64 kB that unpacks to 64 MB."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("cls.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, dict(descr="<f4", fortran_order=False, shape=(1 << 24,)))
        member.write(bytes(1 << 26))
    return file


def bad_files(folder):
    """{what the message says: (kind, file)} of files that are not what they should be."""
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    def write(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    state = torch.load(FIXTURES / "torchvision.pth")
    whole = (FIXTURES / "torchvision.pth").read_bytes()
    npz = (FIXTURES / "google.npz").read_bytes()
    checkpoint.write_tensors(folder / "whole.safetensors", state)
    whole_safetensors = (folder / "whole.safetensors").read_bytes()
    checkpoint.save_module(ViT(ViTConfig(8, 4, 1, 1, 4, 4)), folder / "ours.safetensors")
    distilled = torch.load(FIXTURES / "timm.pth") | {"dist_token": torch.zeros(1, 1, 12)}
    swapped = state | {"encoder.ln.weight": torch.ones(13)}
    np.savez(folder / "objects.npz", **{"embedding/kernel": np.array([Code()], dtype=object)})
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    os.mkfifo(folder / "pipe.pth")
    return {
        "no such file": folder / "nothing.pth",
        "web page": write("page.bin", b"\n<!DOCTYPE html><html>login</html>"),
        "Git LFS": write("pointer.bin", b"version https://git-lfs.github.com/spec/v1\n"),
        "damaged": write("empty.pth", b""),
        "cut short": write("short.pth", whole[: len(whole) // 2]),
        "cut short.*zip": write("short.npz", npz[: len(npz) // 2]),
        "not a whole safetensors": write("short.safetensors", whole_safetensors[:3000]),
        "more than tensors": save(folder / "code.pth", {"weight": Code()}),
        "allow_pickle": folder / "objects.npz",
        "holds a GPT-2": save(folder / "gpt2.pth", GPT2(GPT2Config(8, 8, 1, 1, 4)).state_dict()),
        "known format": save(folder / "other.pth", {"fc.weight": torch.zeros(3)}),
        "no tensors": save(folder / "none.pth", {"epoch": 3}),
        "not weights by name": save(folder / "list.pth", [torch.zeros(3)]),
        "needs no conversion": folder / "ours.safetensors",
        "distillation token": save(folder / "distilled.pth", distilled),
        "missing blocks.1.norm1.bias": save(folder / "missing.pth", {
            n: t for n, t in state.items() if n != "encoder.layers.encoder_layer_1.ln_1.bias"}),
        r"\(torchvision\) does not fit the model: unknown 'encoder\.extra'": save(
            folder / "extra.pth", state | {"encoder.extra": torch.zeros(1)}),
        r"norm.weight \(13,\) instead of \(12,\)": save(folder / "swapped.pth", swapped),
        r"patch_embed.weight \(12,\) instead of": save(
            folder / "flat.pth", state | {"conv_proj.weight": torch.zeros(12)}),
        "6 positions": save(
            folder / "positions.pth", state | {"encoder.pos_embedding": torch.zeros(1, 6, 12)}),
        "NaN.* infinite": save(folder / "nan.pth", state | {"encoder.ln.bias": torch.full((12,), torch.nan)}),
        "absurdly large": save(folder / "large.pth", state | {"encoder.ln.bias": torch.full((12,), 1e30)}),
        "torch.int64": save(folder / "ints.pth", state | {"encoder.ln.bias": torch.zeros(12).long()}),
        r"\(\), no weights": save(folder / "scalar.pth", state | {"class_token": torch.zeros(())}),
        "not a plain tensor": save(folder / "sparse.pth", state | {"class_token": torch.eye(3).to_sparse()}),
        "far larger than what it holds": save(
            folder / "expanded.pth", state | {"encoder.ln.bias": torch.zeros(1).expand(1 << 40)}),
        r"unknown 'encoder\.layers\.encoder_layer_1000000000\.ln_1\.bias'": save(
            folder / "number.pth", state | {
                "encoder.layers.encoder_layer_1000000000.ln_1.bias": torch.zeros(12)}),
        "3 layers whose numbers have gaps": save(folder / "gap.pth", state | {
            "encoder.layers.encoder_layer_999.ln_1.bias": torch.zeros(12)}),
        "it is not a file": folder / "pipe.pth",
        "would unpack to more than 10 times": bomb(folder / "bomb.npz"),
        "does not match its checksum": write("flipped.pth", flipped),
    }


def test_vit_files_that_are_not_one_get_one_clear_line(tmp_path):
    for message, file in bad_files(tmp_path).items():
        with pytest.raises(UserError, match=message) as caught:
            load_vit(file, heads=3)
        assert str(file.name) in str(caught.value) and "\n" not in str(caught.value), message
    assert not (tmp_path / "ran").exists()                               # no pickle in them was run


def test_gpt2_files_that_are_not_one_get_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="holds a ViT"):
        load_gpt2(FIXTURES / "torchvision.pth")
    model = hugging_face_gpt2()
    save(tmp_path / "untied.pth", model.state_dict() | {"lm_head.weight": torch.zeros(29, 12)})
    with pytest.raises(UserError, match="head of its own"):
        load_gpt2(tmp_path / "untied.pth", heads=3)
    save(tmp_path / "heads.pth", model.state_dict())
    with pytest.raises(UserError, match="--heads"):
        load_gpt2(tmp_path / "heads.pth")
    for options, message in (dict(scale_attn_by_inverse_layer_idx=True), "does not scale attention"), \
                            (dict(activation_function="relu"), "needs the activation 'relu'"):
        hugging_face_gpt2(**options).save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=message):
            load_gpt2(tmp_path / "other")
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    sorted((tmp_path / "shards").glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match="00002-of"):
        load_gpt2(tmp_path / "shards")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no weights"):
        load_gpt2(tmp_path / "empty")


@pytest.mark.parametrize("name, change, message", [
    ("config.json", dict(num_attention_heads="x"), "config.json: num_attention_heads is 'x'"),
    ("config.json", dict(num_attention_heads=0), "num_attention_heads is 0, but must be a whole"),
    ("config.json", dict(num_attention_heads=10**30), "num_attention_heads is 1000"),
    ("config.json", dict(num_attention_heads=5), "cannot be split over 5 heads"),
    ("config.json", dict(layer_norm_eps=float("nan")), "layer_norm_eps is nan"),
    ("config.json", dict(hidden_act=["gelu"]), "hidden_act is a list"),
    ("config.json", dict(vision_config=3), "vision_config is 3"),
    ("config.json", dict(pretrained_cfg=dict(mean=[1])), "pretrained_cfg"),
    ("config.json", None, "config.json is damaged: it is nested too deeply"),
    ("preprocessor_config.json", dict(size={}), "holds no size"),
    ("preprocessor_config.json", dict(size={"height": -1}), "size.height is -1"),
    ("preprocessor_config.json", dict(image_std=[0, 0, 0]), "image_std.0 is 0"),
    ("preprocessor_config.json", dict(image_mean=[0.5]), "image_mean is a list of 1"),
    ("preprocessor_config.json", dict(do_center_crop=True, crop_size=None), "holds no size")])
def test_configs_beside_the_weights_are_not_trusted(tmp_path, name, change, message):
    """Each of these ended in a traceback from wherever the value was used."""
    import transformers
    transformers.ViTModel(transformers.ViTConfig(**TINY_VIT)).save_pretrained(tmp_path)
    file = tmp_path / name
    content = json.loads(file.read_text()) if name == "config.json" else dict(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, size=8)
    file.write_text("[" * 100_000 if change is None else json.dumps(content | change))
    with pytest.raises(UserError, match=message) as caught:
        load_vit(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["torchvision.pth", "google.npz", "timm.safetensors", "tensorflow"])
def test_any_damage_gives_one_line_or_finite_weights(name, tmp_path):
    """Bytes changed at random, in the headers above all: no traceback, no endless loop, no NaN."""
    if name == "timm.safetensors":
        checkpoint.save_file(torch.load(FIXTURES / "timm.pth"), tmp_path / name)
    elif name == "tensorflow":
        shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    else:
        shutil.copy(FIXTURES / name, tmp_path)
    file = tmp_path / ("model.ckpt.index" if name == "tensorflow" else name)
    content, random = file.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for at in random.integers(0, random.choice([300, len(content)]), random.choice([1, 4])):
            damaged[at] = random.integers(256)
        length = random.choice([len(content), random.integers(len(content))], p=[0.7, 0.3])
        file.write_bytes(damaged[:length])
        try:
            module, _ = (load_gpt2 if name == "tensorflow" else load_vit)(file, heads=3)
            assert all(p.isfinite().all() for p in module.parameters())
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("damage", ["data cut", "index cut", "index changed", "data missing"])
def test_tensorflow_damage_is_found(tmp_path, damage):
    shutil.copytree(FIXTURES / "tensorflow", tmp_path, dirs_exist_ok=True)
    index, data = tmp_path / "model.ckpt.index", tmp_path / "model.ckpt.data-00000-of-00001"
    if damage == "data missing":
        data.unlink()
    elif damage == "data cut":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "index cut":
        index.write_bytes(index.read_bytes()[:-100])
    else:
        content = bytearray(index.read_bytes())
        content[100] ^= 1
        index.write_bytes(content)
    with pytest.raises(UserError, match="TensorFlow checkpoint"):
        load_gpt2(tmp_path)


@pytest.mark.parametrize("options", [
    dict(vit="a", checkpoint="b"), dict(vision_gpt="a", checkpoint="b"),
    dict(heads=0)])
def test_flags_that_do_not_go_together_are_refused(options):
    with pytest.raises(UserError):
        ConvertConfig(**options)


# --------------------------------------------------------------------------------------------------
# what is written


def merges(folder):
    """A merges.txt as long as GPT-2's: the first 50,000 pairs of bytes."""
    printable = [b for b in range(256) if chr(b).isprintable() and b != 0x20]
    signs = [chr(b) for b in printable] + [chr(256 + i) for i in range(68)]
    pairs = [f"{a} {b}" for a in signs for b in signs][:50000]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """tiktoken finds neither a cache nor a network."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no-cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def gpt2_folder(folder, n_head=2):
    folder.mkdir()
    tensors = {n: t.T if "c_" in n and t.ndim > 1 else t
               for n, t in randomize(GPT2(GPT2Config(50257, 32, 1, n_head, 4))).state_dict().items()}
    checkpoint.write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(dict(n_head=n_head)))
    return folder


def test_weights_are_written_with_config_hash_and_tokenizer(tmp_path, capsys):
    folder, out, red = gpt2_folder(tmp_path / "gpt2"), tmp_path / "weights", str(tmp_path / "red.png")
    merges(folder)
    Image.new("RGB", (30, 20), "red").save(red)
    convert(ConvertConfig(gpt2=str(folder), out=str(out), check=red))
    convert(ConvertConfig(vit=str(FIXTURES / "torchvision.pth"), out=str(out), heads=3, check=red))
    said = capsys.readouterr().out
    vit, gpt2 = ViT.from_pretrained(out / "vit.safetensors"), GPT2.from_pretrained(out / "gpt2.safetensors")
    for name, module in (("vit", vit), ("gpt2", gpt2)):
        digest = checkpoint.read_metadata(out / f"{name}.safetensors")["sha256"]
        assert digest == checkpoint.sha256(module.state_dict()) and digest in said
    assert Tokenizer.load(out).vocab_size == 50257
    assert said.count("class ") == 5 and said.count("A photo of") == 5
    assert_vit(vit, *arrays("torchvision"))


def test_half_precision_keeps_the_hash_of_the_source(tmp_path):
    source, files = str(FIXTURES / "timm.pth"), []
    for dtype in ("float32", "fp16"):
        convert(ConvertConfig(vit=source, heads=3, out=str(tmp_path / dtype), dtype=dtype))
        files.append(tmp_path / dtype / "vit.safetensors")
    full, half = (checkpoint.read_metadata(file)["sha256"] for file in files)
    assert full == half
    assert checkpoint.read_tensors(files[1])["norm.weight"].dtype == torch.float16


def test_without_tokenizer_tables_conversion_warns_and_succeeds(tmp_path, offline, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(ConvertConfig(gpt2=str(gpt2_folder(tmp_path / "gpt2")), out=str(tmp_path / "weights")))
    assert "warning: no tokenizer.json" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "weights").iterdir()] == ["gpt2.safetensors"]


def test_files_in_the_folder_to_write_are_not_replaced(tmp_path, capsys):
    """The same model in another dtype may be written again, another model or somebody's file may not."""
    vit, gpt2 = str(FIXTURES / "timm.pth"), str(FIXTURES / "tensorflow")
    (tmp_path / "vit.safetensors").write_text("mine")
    with pytest.raises(UserError, match="vit.safetensors is already there"):
        convert(ConvertConfig(vit=vit, heads=3, out=str(tmp_path)))
    assert (tmp_path / "vit.safetensors").read_text() == "mine"
    (tmp_path / "vit.safetensors").unlink()
    convert(ConvertConfig(vit=vit, heads=3, out=str(tmp_path)))
    convert(ConvertConfig(vit=vit, heads=3, out=str(tmp_path), dtype="fp16"))
    with pytest.raises(UserError, match="vit.safetensors is already there"):
        convert(ConvertConfig(vit=str(FIXTURES / "torchvision.pth"), heads=3, out=str(tmp_path)))
    assert checkpoint.read_tensors(tmp_path / "vit.safetensors")["norm.weight"].dtype == torch.float16
    Tokenizer("bpe", {bytes([b]): b for b in range(256)}).save(tmp_path)
    with pytest.raises(UserError, match="tokenizer.json is already there"):
        convert(ConvertConfig(gpt2=gpt2, out=str(tmp_path)))
    assert Tokenizer.load(tmp_path).vocab_size == 257 and not (tmp_path / "gpt2.safetensors").exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The addresses of convert_weights.py, served from a folder of this machine, and a working folder."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    web = tmp_path / "web"
    gpt2_folder(web)
    merges(web)
    shutil.copy(FIXTURES / "torchvision.pth", web / "vit.pth")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=web))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    known = {"vit_b_16-c867db91.pth": "vit.pth", "gpt2/model.safetensors": "model.safetensors",
             "gpt2/merges.txt": "merges.txt"}
    monkeypatch.setattr(convert_weights, "DOWNLOADS", {n: (f"{url}/{f}", None) for n, f in known.items()})
    monkeypatch.setattr(convert_weights, "VIT_HEADS", {12: 3})
    monkeypatch.setattr(convert_weights, "GPT2_HEADS", {4: 2})
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.chdir(tmp_path)
    yield web
    server.shutdown()
    server.server_close()


def test_no_arguments_download_and_convert(server):
    convert(ConvertConfig())
    assert {file.name for file in Path("weights").iterdir()} == {"gpt2.safetensors", "tokenizer.json",
                                                                 "vit.safetensors"}
    assert Path("downloads/gpt2/merges.txt").exists()


def test_a_download_of_another_hash_is_not_converted(server, monkeypatch):
    known = {name: (url, "c867db91") for name, (url, _) in convert_weights.DOWNLOADS.items()}
    monkeypatch.setattr(convert_weights, "DOWNLOADS", known)
    with pytest.raises(UserError, match="c867db91"):
        convert(ConvertConfig())
    assert not Path("weights").exists()


def test_a_trained_checkpoint_becomes_one_model(tmp_path, monkeypatch):
    """Fusion and backbones in one folder, which works after the backbones are gone."""
    monkeypatch.chdir(tmp_path)
    convert(ConvertConfig(vit=str(FIXTURES / "timm.pth"), heads=3))
    convert(ConvertConfig(gpt2=str(FIXTURES / "tensorflow")))
    files = {name: Path("weights") / f"{name}.safetensors" for name in ("vit", "gpt2")}
    vit, gpt2 = ViT.from_pretrained(files["vit"]), GPT2.from_pretrained(files["gpt2"])
    model = VisionGPT(VisionGPTConfig(vit.config, gpt2.config, ResamplerConfig(4, 1, 1, 4, 8)))
    model.vit.load_state_dict(vit.state_dict())
    model.gpt2.load_state_dict(gpt2.state_dict())
    randomize(model.xattn)
    model.save_pretrained("out/run", backbones=files, training=dict(photographs=True))
    Path("out/run/metrics.json").write_text(json.dumps(dict(CIDEr=0.5, worst=[])))
    convert(ConvertConfig(checkpoint="out/run", dtype="float16"))
    convert(ConvertConfig(checkpoint="out/run", out="whole"))
    for source, out in ("out/run", "out/run"), ("whole", "out/run"), ("out/run", "whole"):
        with pytest.raises(UserError, match="config.json is already there"):
            convert(ConvertConfig(checkpoint=source, out=out))
    shutil.rmtree("weights")
    for folder, tolerance in (("whole", 0), ("out/run-float16", 0.05)):
        again = VisionGPT.from_pretrained(folder, device="cpu")
        with torch.no_grad():
            wanted, _ = model.eval()(TOKENS[:, :6], model.encode(IMAGES))
            logits, _ = again(TOKENS[:, :6], again.encode(IMAGES))
        torch.testing.assert_close(logits, wanted, atol=tolerance, rtol=0)
        assert checkpoint.read_config(folder)["training"] == dict(photographs=True)
    card = Path("whole/README.md").read_text()
    assert "pipeline_tag: image-to-text" in card and "CIDEr | 0.5000" in card and "photographs: True" in card
    stored = checkpoint.read_tensors("out/run-float16/model.safetensors")
    assert stored["vit.norm.weight"].dtype == torch.float16
