"""Weights as others wrote them: any container -> tensors by name, and any layout -> our names.

Nothing that a file holds is ever run: pickles are read by torch's weights-only reader, or by one that knows
tensors alone.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from lib import checkpoint
from lib.cli import UserError
from lib.tf_checkpoint import read_checkpoint

# ------------------------------------------------------------------------------------------------------------
# containers: safetensors, torch.save, TorchScript, .npz, TensorFlow


def read(path):
    """A file or folder -> its tensors by name, and facts: what config files and the file itself say of them.

    `facts["wrapper"]` is the last dict that had to be opened. Raises UserError for what is missing, damaged,
    holds code or no tensors.
    """
    files = find(Path(path))
    beside, facts = files[0].parent, {}
    for name in ("config.json", "hparams.json"):
        facts |= read_json(beside / name) if (beside / name).exists() else {}
    if (beside / "preprocessor_config.json").exists():
        facts["preprocessor"] = read_json(beside / "preprocessor_config.json")
    tensors = {}
    for file in files:
        tensors |= read_file(file)
    for key in ("config", "model_args"):                     # of a training run's checkpoint
        facts |= tensors[key] if isinstance(tensors.get(key), dict) else {}
    facts["wrapper"] = None
    for wrapper in ("model_state_dict", "state_dict", "model", "teacher"):
        if isinstance(tensors.get(wrapper), dict):
            tensors, facts["wrapper"] = tensors[wrapper], wrapper
    names = ", ".join(map(str, list(tensors)[:5])) or "nothing"
    tensors = {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors where weights are known to lie, but {names}")
    for prefix in ("_orig_mod.", "module.", "backbone."):    # of torch.compile, DataParallel and DINO
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors, facts


def find(path):
    """The weight files of a path: itself, the shards that an index names, or what a folder holds."""
    if path.is_dir():
        usual = [path / name for name in ("model.safetensors.index.json", "model.safetensors",
                                          "pytorch_model.bin.index.json", "pytorch_model.bin")]
        suffixes = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".index")
        held = [file for file in usual if file.exists()][:1] or [
            file for file in sorted(path.iterdir()) if file.suffix in suffixes]
        if len(held) != 1:
            what = f"several files ({', '.join(file.name for file in held)})" if held else "no weights"
            raise UserError(f"{path} holds {what}: name the file")
        path = held[0]
    if path.suffix == ".json":
        shards = read_json(path).get("weight_map")
        if not shards:
            raise UserError(f"{path} is no index of shards: name the weights or their folder")
        return [path.parent / name for name in sorted(set(shards.values()))]
    return [path]


def read_json(file):
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {file}: it is no dictionary")
    return content


def read_file(file):
    """{name: tensor} of one file, told apart by its first bytes; what torch.save wrote comes as it is."""
    if file.suffix == ".index" or Path(f"{file}.index").exists():
        prefix = str(file).removesuffix(".index")
        return {name: torch.from_numpy(array) for name, array in read_checkpoint(prefix).items()}
    try:
        with open(file, "rb") as opened:
            start = opened.read(64)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if start.lstrip()[:1] == b"<" or start.startswith(b"version https://git-lfs"):
        what = "Git LFS pointer" if start.startswith(b"version") else "web page"
        raise UserError(f"{file} is a {what}, not the weights: download the file itself")
    if start[8:9] == b"{":
        tensors = checkpoint.read_tensors(file)
        if "kind" in (safe_open(file, framework="pt").metadata() or {}):
            raise UserError(f"{file} was written by convert_weights.py: it needs no conversion")
        return tensors
    try:
        members = zipfile.ZipFile(file).namelist() if start.startswith(b"PK") else []
        if any(name.endswith(".npy") for name in members):
            arrays = np.load(file, allow_pickle=False)
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if any(name.endswith("/constants.pkl") for name in members):
            return read_torchscript(file)
        with torch.serialization.safe_globals([argparse.Namespace]):         # the flags of DINO's training
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=bool(members))
    except Exception as error:                       # whatever a damaged file makes of numpy and torch
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(f"{file} holds more than tensors ({code[1]}), which can run code: "
                            "it is not opened") from None
        reason = str(error).strip().split("\n")[0][:150] or type(error).__name__
        raise UserError(f"{file} is damaged, cut short or no weights ({reason}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not weights by name")
    return content


def read_torchscript(file):
    """{name: tensor} of a TorchScript archive, as OpenAI published CLIP; its code is never looked at."""
    archive = zipfile.ZipFile(file)
    root = archive.namelist()[0].split("/")[0]
    dtypes = {"HalfStorage": torch.half, "FloatStorage": torch.float, "LongStorage": torch.long,
              "IntStorage": torch.int}

    class Holder:                                    # stands for every other class and function in the pickle
        def __init__(self, *args):
            pass

    def tensor(storage, offset, size, stride, *_):
        return torch.as_strided(storage, size, stride, offset)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return {"_rebuild_tensor_v2": tensor, "OrderedDict": dict, **dtypes}.get(name, Holder)

        def persistent_load(self, key):              # ("storage", dtype, member, device, length)
            return torch.frombuffer(bytearray(archive.read(f"{root}/data/{key[2]}")), dtype=key[1])

    def leaves(holder, prefix=""):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            elif isinstance(value, Holder):
                yield from leaves(value, f"{prefix}{name}.")

    with archive.open(f"{root}/data.pkl") as pickled:
        return dict(leaves(Unpickler(pickled).load()))


# ------------------------------------------------------------------------------------------------------------
# layouts: how each source names its tensors


def keep(name, tensor):
    return tensor


class Layout(NamedTuple):
    """Source names -> ours, as templates: {i} is the layer, * anything, a module means its weight and bias.

    None drops a tensor; /0 /1 /2 are parts to be concatenated. `sign` is a name that no other layout has,
    `config` what its shapes do not show, `prefix` a pattern of what may stand before the names, and
    `fix(our name, tensor)` puts a tensor into torch's orientation.
    """

    name: str
    sign: str
    table: dict
    config: dict = {}
    prefix: str = ""
    fix: Callable = keep


def blocks(prefix, table, target="blocks.{i}"):
    return {f"{prefix}.{source}": f"{target}.{ours}" for source, ours in table.items()}


def flax(name, tensor):
    """flax stores (in, out), splits the heads off and puts a filter's channels last."""
    if name == "patch_embed.weight":
        return tensor.permute(3, 2, 0, 1)
    if "qkv" in name:
        tensor = tensor.flatten(-2)                                  # (C, H, D) -> (C, H * D), bias likewise
    return tensor.flatten(0, -2).T if tensor.ndim > 1 and name.endswith("weight") else tensor


def conv1d(name, tensor):
    """OpenAI's linear layers are convolutions of width 1: (in, out) or (1, in, out)."""
    return tensor.squeeze(0).T if name.startswith("h.") and tensor.ndim > 1 else tensor


CENTRE = dict(transform=dict(resize=224, crop=224, filter="bicubic"))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
BICUBIC = dict(transform=dict(resize=248, crop=224, filter="bicubic"))
SQUASH = dict(transform=dict(squash=224, filter="bilinear"))
CLIP = dict(eps=1e-5, activation="quick_gelu", pre_norm=True, final_norm=False,
            mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), **CENTRE)

TORCHVISION = Layout("torchvision", "encoder.layers.encoder_layer_0.ln_1.weight", {
    "class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj": "patch_embed",
    "encoder.ln": "norm", "heads.head": "head",
    **blocks("encoder.layers.encoder_layer_{i}", {
        "ln_1": "norm1", "self_attention.in_proj_weight": "attn.qkv.weight",
        "self_attention.in_proj_bias": "attn.qkv.bias", "self_attention.out_proj": "attn.proj",
        "ln_2": "norm2", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2",
        "mlp.linear_1": "mlp.fc1", "mlp.linear_2": "mlp.fc2"})})     # the names in the published file
TIMM = Layout("timm", "blocks.0.attn.qkv.weight", {
    "cls_token": "cls_token", "pos_embed": "pos_embed", "patch_embed.proj": "patch_embed", "norm": "norm",
    "head": "head", "pre_logits.*": None,
    "head.mlp.*": None, "head.last_layer.*": None, "mask_token": None, "decoder_*": None,    # of DINO, MAE
    **blocks("blocks.{i}", {
        n: n for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")})}, BICUBIC)
HF_VIT = Layout("Hugging Face ViT", "embeddings.patch_embeddings.projection.weight", {
    "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed", "layernorm": "norm", "classifier": "head",
    "embeddings.mask_token": None, "pooler.dense": None,
    **blocks("encoder.layer.{i}", {
        "layernorm_before": "norm1", "attention.attention.query": "attn.qkv/0",
        "attention.attention.key": "attn.qkv/1", "attention.attention.value": "attn.qkv/2",
        "attention.output.dense": "attn.proj", "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}),
    **blocks("layers.{i}", {                                         # in the memory of transformers 5
        "layernorm_before": "norm1", "attention.q_proj": "attn.qkv/0", "attention.k_proj": "attn.qkv/1",
        "attention.v_proj": "attn.qkv/2", "attention.o_proj": "attn.proj", "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"})}, HALF | SQUASH, r"vit\.")
GOOGLE = Layout("Google .npz", "embedding.kernel", {
    "cls": "cls_token", "embedding": "patch_embed", "Transformer.posembed_input.pos_embedding": "pos_embed",
    "Transformer.encoder_norm": "norm", "head": "head", "pre_logits": None, "opt.state.*": None,
    **blocks("Transformer.encoderblock_{i}", {
        "LayerNorm_0": "norm1", "MultiHeadDotProductAttention_*.query": "attn.qkv/0",
        "MultiHeadDotProductAttention_*.key": "attn.qkv/1",
        "MultiHeadDotProductAttention_*.value": "attn.qkv/2",
        "MultiHeadDotProductAttention_*.out": "attn.proj", "LayerNorm_1": "norm2", "LayerNorm_2": "norm2",
        "MlpBlock_*.Dense_0": "mlp.fc1", "MlpBlock_*.Dense_1": "mlp.fc2"})},
    HALF | SQUASH | dict(activation="gelu_tanh"), r"params\.|opt\.target\.", flax)
OPENAI_CLIP = Layout("OpenAI CLIP", "visual.ln_pre.weight", {
    "visual.class_embedding": "cls_token", "visual.positional_embedding": "pos_embed",
    "visual.conv1": "patch_embed", "visual.ln_pre": "norm_pre", "visual.ln_post": None, "visual.proj": None,
    **blocks("visual.transformer.resblocks.{i}", {
        "ln_1": "norm1", "attn.in_proj_weight": "attn.qkv.weight", "attn.in_proj_bias": "attn.qkv.bias",
        "attn.out_proj": "attn.proj", "ln_2": "norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}),
    **dict.fromkeys(["transformer.*", "token_embedding", "positional_embedding", "ln_final",
                     "text_projection", "logit_scale", "input_resolution", "context_length",
                     "vocab_size"])}, CLIP)
HF_CLIP = Layout("Hugging Face CLIP", "pre_layrnorm.weight", {       # spelled so
    "embeddings.class_embedding": "cls_token", "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding": "patch_embed", "pre_layrnorm": "norm_pre",
    **blocks("encoder.layers.{i}", {
        "layer_norm1": "norm1", "self_attn.q_proj": "attn.qkv/0", "self_attn.k_proj": "attn.qkv/1",
        "self_attn.v_proj": "attn.qkv/2", "self_attn.out_proj": "attn.proj", "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}),
    **dict.fromkeys(["post_layernorm", "embeddings.position_ids", "text_model.*", "visual_projection",
                     "text_projection", "logit_scale"])}, CLIP, r"vision_model\.")
GPT2_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
HF_GPT2 = Layout("Hugging Face GPT-2", "h.0.attn.c_attn.weight", {
    "wte": "wte", "wpe": "wpe", "ln_f": "ln_f", "lm_head.weight": None,
    "h.{i}.attn.bias": None, "h.{i}.attn.masked_bias": None,         # the causal mask
    **{f"h.{{i}}.{n}": f"h.{{i}}.{n}" for n in GPT2_BLOCK}}, {}, r"transformer\.", conv1d)
# nanoGPT: torch's Linear (out, in), and torch's default GELU, which is the exact one
NANOGPT = HF_GPT2._replace(name="nanoGPT", config=dict(activation="gelu"), fix=keep)
OPENAI_GPT2 = Layout("OpenAI GPT-2", "model.h0.attn.c_attn.w", {
    "model.wte": "wte.weight", "model.wpe": "wpe.weight", "model.ln_f": "ln_f",
    **{f"model.h{{i}}.{n}": f"h.{{i}}.{n}" for n in GPT2_BLOCK}}, fix=conv1d)
PUBLISHED = Layout("published Vision-GPT", "vision.resampler.latents", {       # after `number_blocks`
    "tok_emb": "gpt2.wte", "pos_emb": "gpt2.wpe", "final_norm": "gpt2.ln_f", "out_head.weight": None,
    "text.{i}.att.mask": None,
    **blocks("text.{i}", {
        "norm1": "ln_1", "att.W_query": "attn.c_attn/0", "att.W_key": "attn.c_attn/1",
        "att.W_value": "attn.c_attn/2", "att.out_proj": "attn.c_proj", "norm2": "ln_2",
        "ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj"}, "gpt2.h.{i}"),
    **blocks("cross.{i}", {
        "attn_norm": "ln", "att.W_query": "q", "att.W_key": "kv/0", "att.W_value": "kv/1",
        "att.out_proj": "out"}, "xattn.{i}"),
    "vision.resampler.latents": "resampler.latents",
    **{f"vision.resampler.{n}": f"resampler.layers.{{i}}.{ours}" for n, ours in {
        "to_q.{i}": "q", "to_kv.{i}": "kv", "proj_out.{i}": "proj", "norms_latent.{i}": "norm_latents",
        "norms_media.{i}": "norm_patches", "mlp.{i}.0": "norm_mlp", "mlp.{i}.1": "fc1",
        "mlp.{i}.3": "fc2"}.items()},
    **{f"vision.encoder.model.{n}": f"vit.{ours}" for n, ours in TORCHVISION.table.items()}})
KNOWN = {"ViT": (TORCHVISION, TIMM, HF_VIT, GOOGLE, OPENAI_CLIP, HF_CLIP),
         "GPT-2": (HF_GPT2, NANOGPT, OPENAI_GPT2), "Vision-GPT": (PUBLISHED,)}
PARTS = {"weight": "weight", "kernel": "weight", "scale": "weight", "w": "weight", "g": "weight",
         "bias": "bias", "b": "bias", "shift": "bias"}


def recognise(tensors, kind, source):
    """The layout of a ViT, GPT-2 or Vision-GPT. Raises UserError that names what the file holds instead."""
    for found, layouts in KNOWN.items():
        for layout in layouts:
            sign = re.compile(f"({layout.prefix})?{re.escape(layout.sign)}")
            if any(sign.fullmatch(name.replace("/", ".")) for name in tensors):
                if found != kind:
                    raise UserError(f"{source} holds a {found} ({layout.name}), not a {kind}")
                return layout
    raise UserError(f"{source} holds no {kind} in a known layout ({known(kind)}); "
                    f"it begins with {', '.join(sorted(tensors)[:3])}")


def known(kind):
    return ", ".join(layout.name for layout in KNOWN[kind])


def rename(tensors, layout, source):
    """{our name: float32 tensor}. What the table does not know keeps its name, put in quotes."""
    rules = []
    for template, target in layout.table.items():
        names = re.escape(template).replace(r"\{i\}", r"(?P<layer>\d+)").replace(r"\*", ".*")
        rules.append((re.compile(rf"(?:{layout.prefix})?{names}(?:\.(?P<part>{'|'.join(PARTS)}))?"), target))
    pieces = defaultdict(dict)
    try:
        for name, tensor in tensors.items():
            matches = ((pattern.fullmatch(name.replace("/", ".")), target) for pattern, target in rules)
            match, target = next((found for found in matches if found[0]), (None, None))
            if match and target is None:
                continue
            piece = ""
            if match:
                groups = match.groupdict()
                target, _, piece = target.replace("{i}", groups.get("layer") or "").partition("/")
                target += f".{PARTS[groups['part']]}" if groups["part"] else ""
                tensor = layout.fix(target, tensor.float())
            if not match or piece in pieces[target]:                 # unknown, or a second source of a tensor
                target = f"'{name}'"
            pieces[target][piece] = tensor
        return {name: held[""] if "" in held else torch.cat([held[piece] for piece in sorted(held)])
                for name, held in pieces.items()}
    except (RuntimeError, IndexError) as error:                      # of a permutation or concatenation
        raise UserError(f"{source} holds shapes that {layout.name} does not have ({error})") from None


def number_blocks(source, path):
    """trf_blocks.{t} -> text.{i}, or cross.{i} where it is the cross-attention before text block i."""
    text = sorted({int(m[1]) for name in source if (m := re.match(r"trf_blocks\.(\d+)\.norm1\.", name))})

    def number(match):
        t = int(match[1])
        return f"text.{text.index(t)}." if t in text else f"cross.{sum(i < t for i in text)}."

    numbered = {re.sub(r"^trf_blocks\.(\d+)\.", number, name): tensor for name, tensor in source.items()}
    if len(numbered) < len(source):
        raise UserError(f"{path} has two cross-attentions before one block")
    return numbered


# ------------------------------------------------------------------------------------------------------------
# behaviour: what shapes do not show

ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}      # Hugging Face's names


def activation_of(name, source):
    if name not in ACTIVATIONS:
        raise UserError(f"{source} needs the activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def vit_behaviour(layout, source, facts, image_size, path):
    """The fields of ViTConfig that shapes do not show: from the layout, then from files beside them."""
    fields = dict(layout.config)
    if layout is TORCHVISION and ("swag" in Path(path).name or image_size > 224):
        fields |= CENTRE
    if layout is TIMM:
        if facts["wrapper"] is None and "head.weight" in source:     # DeiT, DINO, MAE: ImageNet's mean, std
            fields |= HALF
        shown = facts.get("pretrained_cfg", {})
        if {"mean", "std", "crop_pct", "interpolation", "input_size"} <= shown.keys():
            crop = shown["input_size"][-1]
            fields |= dict(mean=shown["mean"], std=shown["std"], transform=dict(
                resize=int(crop / shown["crop_pct"]), crop=crop, filter=shown["interpolation"]))
    if layout is GOOGLE:
        kernels = (tensor for name, tensor in source.items() if name.endswith("query/kernel"))
        fields["n_head"] = next((kernel.shape[1] for kernel in kernels if kernel.ndim == 3), None)
    if layout is OPENAI_CLIP:
        fields["n_head"] = len(source["visual.ln_pre.weight"]) // 64
    if layout in (HF_VIT, HF_CLIP):
        config = facts.get("vision_config", facts)
        for ours, theirs in (("n_head", "num_attention_heads"), ("eps", "layer_norm_eps")):
            if theirs in config:
                fields[ours] = config[theirs]
        if "hidden_act" in config:
            fields["activation"] = activation_of(config["hidden_act"], path)
        shown = facts.get("preprocessor", {})
        if {"image_mean", "image_std", "size"} <= shown.keys():
            fields |= dict(mean=shown["image_mean"], std=shown["image_std"], transform=hf_transform(shown))
    return fields


def hf_transform(shown):
    """Hugging Face's preprocessor_config.json as ViTConfig.transform."""
    sizes = shown["size"], shown.get("crop_size")
    side, crop = (min(size.values()) if isinstance(size, dict) else size for size in sizes)
    filter = "bicubic" if shown.get("resample") == 3 else "bilinear"
    if shown.get("do_center_crop"):
        return dict(resize=side, crop=crop, filter=filter)
    return dict(squash=side, filter=filter)
