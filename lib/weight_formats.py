"""Weights as others published them: any container -> tensors by name, any format's names -> ours.

Nothing in a file is ever run: pickles are read by torch's weights-only reader, or by one that knows tensors
and nothing else.
"""

import argparse
import contextlib
import pickle
import re
import warnings
import zipfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib import checkpoint, records
from lib.cli import UserError
from lib.tf_checkpoint import read_tf_checkpoint

BLOAT = 10              # a file whose tensors would fill more than 10 times its bytes is a trap: they repeat

LAYERS, SIDE, EPS = dict(min=1, max=1000), dict(min=1, max=4096), dict(min=0, max=1)
MEAN, STD, RGB = dict(min=0, max=1), dict(min=1e-3, max=1), tuple[float, float, float]
FILTER = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@dataclass
class TimmConfig:
    """pretrained_cfg in timm's config.json."""
    mean: RGB = field(metadata=MEAN)
    std: RGB = field(metadata=STD)
    crop_pct: float = field(metadata=dict(min=0.1, max=1))
    interpolation: FILTER
    input_size: tuple[int, int, int] = field(metadata=SIDE)


@dataclass
class Preprocessor:
    """Hugging Face's preprocessor_config.json."""
    image_mean: RGB | None = field(default=None, metadata=MEAN)
    image_std: RGB | None = field(default=None, metadata=STD)
    size: int | dict[str, int] | None = field(default=None, metadata=SIDE)
    crop_size: int | dict[str, int] | None = field(default=None, metadata=SIDE)
    do_center_crop: bool | None = None
    resample: int | None = field(default=None, metadata=dict(min=0, max=5))

    def __post_init__(self):
        if {} in (self.size, self.crop_size) or self.do_center_crop and self.crop_size is None:
            raise UserError("size or crop_size holds no size")


@dataclass
class SourceConfig:
    """What is of use in config.json, hparams.json or a training run's checkpoint, under its name there."""
    n_head: int | None = field(default=None, metadata=LAYERS)                    # of GPT-2
    n_heads: int | None = field(default=None, metadata=LAYERS)                   # the published Vision-GPT
    layer_norm_epsilon: float = field(default=1e-5, metadata=EPS)
    activation_function: str = "gelu_new"
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    num_attention_heads: int | None = field(default=None, metadata=LAYERS)       # Hugging Face's ViT and CLIP
    layer_norm_eps: float | None = field(default=None, metadata=EPS)
    hidden_act: str | None = None
    vision_config: "SourceConfig | None" = None
    pretrained_cfg: TimmConfig | None = None
    preprocessor: Preprocessor | None = None                                     # ours from here
    wrapper: str | None = None                               # the last dict in the file that was unwrapped


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], SourceConfig]:
    """A file or folder -> its tensors by name, and its SourceConfig.

    Raises UserError if they are missing or damaged, or hold code or no tensors.
    """
    files = find_weight_files(Path(path))
    folder, content, config = files[0].parent, {}, {}
    for name in ("config.json", "hparams.json"):
        with contextlib.suppress(FileNotFoundError):
            config |= records.read_json(dict, folder / name)
            records.convert(SourceConfig, config, folder / name, foreign=True)
    for file in files:
        content |= read_weight_file(file)
    for held in (content.get("config"), content.get("model_args")):      # of a training run's checkpoint
        config |= held if isinstance(held, dict) else {}
    source_config = records.convert(SourceConfig, config, path, foreign=True)
    with contextlib.suppress(FileNotFoundError):
        source_config.preprocessor = records.read_json(
            Preprocessor, folder / "preprocessor_config.json", foreign=True)
    source_config.wrapper = None
    for wrapper in ("model_state_dict", "state_dict", "model", "teacher"):
        if isinstance(content.get(wrapper), dict):
            content, source_config.wrapper = content[wrapper], wrapper
    prefixes = re.compile(r"(_orig_mod\.)?(module\.)?(backbone\.)?")    # of torch.compile, DataParallel, DINO
    tensors = {prefixes.sub("", str(name), count=1): tensor for name, tensor in content.items()
               if isinstance(tensor, Tensor)}
    if not tensors:
        names = ", ".join(map(repr, list(content)[:5]))[:200] or "nothing"
        raise UserError(f"{path} holds no tensors where weights are expected, but {names}")
    check_plain(tensors, path)
    return tensors, source_config


def check_plain(tensors: dict[str, Tensor], path):
    """Raise UserError for tensors that are not plain arrays, or that repeat what the file holds once."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError(f"{path}: {name} is not a plain tensor: save it as one")
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if sum(tensor.nbytes for tensor in tensors.values()) > BLOAT * held:
        raise UserError(f"{path} is damaged: its tensors are far larger than what it holds")


def find_weight_files(path: Path) -> list[Path]:
    """The weight files of a path: itself, the shards that an index names, or what a folder holds."""
    if not (path.exists() or Path(f"{path}.index").exists()):
        raise UserError(f"cannot read {path}: no such file or folder")
    if path.is_dir():
        usual = [path / name for name in ("model.safetensors.index.json", "model.safetensors",
                                          "pytorch_model.bin.index.json", "pytorch_model.bin")]
        suffixes = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".index")
        found = [file for file in usual if file.exists()][:1] or [
            file for file in sorted(path.iterdir()) if file.suffix in suffixes]
        if len(found) != 1:
            what = f"several files ({', '.join(file.name for file in found)})" if found else "no weights"
            raise UserError(f"{path} holds {what}: name the file")
        path = found[0]
    if path.suffix != ".json":
        return [path]
    weight_map = records.read_json(dict, path).get("weight_map", {})
    shards = set(records.convert(dict[str, str], weight_map, path, ("weight_map",)).values())
    if not shards or any(Path(name).name != name for name in shards):
        raise UserError(f"{path} is not an index of shards beside it: name the weights or their folder")
    return [path.parent / name for name in sorted(shards)]


def read_weight_file(file: Path) -> dict:
    """The tensors of one file by name, or what torch.save wrote; its first bytes tell which kind it is."""
    if file.suffix == ".index" or Path(f"{file}.index").exists():
        prefix = str(file).removesuffix(".index")
        return {name: torch.from_numpy(array) for name, array in read_tf_checkpoint(prefix).items()}
    if not file.is_file():                                   # a pipe would never end
        raise UserError(f"cannot read {file}: it is not a file" if file.exists() else f"{file} is missing")
    try:
        with open(file, "rb") as opened:
            start = opened.read(64)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if start.lstrip()[:1] == b"<" or start.startswith(b"version https://git-lfs"):
        what = "Git LFS pointer" if start.startswith(b"version") else "web page"
        raise UserError(f"{file} is a {what}, not the weights: download the file itself")
    if start[8:9] == b"{":
        with checkpoint.open_safetensors(file) as opened:
            if "kind" in (opened.metadata() or {}):
                raise UserError(f"{file} was written by convert_weights.py: it needs no conversion")
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    try:
        with warnings.catch_warnings(action="ignore"):
            content = read_archive(file) if start.startswith(b"PK") else torch_load(file)
    except UserError:
        raise
    except Exception as error:                       # whatever numpy and torch raise for a damaged file
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(f"{file} holds more than tensors ({code[1]}), which can run code: "
                            "it is not opened") from None
        reason = str(error).strip().split("\n")[0][:150] or type(error).__name__
        reason = re.sub("<.* at 0x.*>", "...", reason)
        raise UserError(f"{file} is damaged, cut short or not weights ({reason}); get it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not weights by name")
    return content


def torch_load(file: Path, mmap=False):
    with torch.serialization.safe_globals([argparse.Namespace]):             # the flags of DINO's training
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def read_archive(file):
    """The content of a zip archive: .npz, TorchScript or torch.save's."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if sum(member.file_size for member in archive.infolist()) > BLOAT * file.stat().st_size:
            raise UserError(f"{file} would unpack to more than {BLOAT} times its size: it is not read")
        if member := archive.testzip():
            raise UserError(f"{file} is damaged: {member!r:.99} does not match its checksum; get it again")
        if any(name.endswith(".npy") for name in names):
            arrays = np.load(file, allow_pickle=False)
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if any(name.endswith("/constants.pkl") for name in names):
            return read_torchscript(archive)
    return torch_load(file, mmap=True)


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive, as OpenAI published CLIP; its code is never looked at."""
    root, storages, seen = archive.namelist()[0].split("/")[0], {}, set()
    known = {"HalfStorage": torch.half, "FloatStorage": torch.float, "LongStorage": torch.long,
             "IntStorage": torch.int, "OrderedDict": dict, "_rebuild_tensor_v2": lambda storage, offset, size,
             stride, *_: storage.as_strided(size, stride, offset)}

    class Holder:                                    # stands for every other class and function in the pickle
        def __init__(self, *args):
            pass

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return known.get(name, Holder)

        def persistent_load(self, key):              # ("storage", dtype, member, device, length)
            member, dtype = f"{root}/data/{key[2]}", key[1]
            if member not in storages:
                storages[member] = torch.frombuffer(bytearray(archive.read(member)), dtype=dtype)
            return storages[member]

    def named_tensors(holder, prefix=""):
        seen.add(id(holder))                         # each once: a few that hold each other make any number
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, Holder) and id(value) not in seen:
                yield from named_tensors(value, f"{prefix}{name}.")

    with archive.open(f"{root}/data.pkl") as pickled:
        return dict(named_tensors(Unpickler(pickled).load()))

class WeightFormat(NamedTuple):
    """How a source names its tensors: {name there: name here}.

    In a name {i} is the layer and * anything; a module stands for its weight and bias; /0 /1 /2 are parts to
    be concatenated; "" drops a tensor. `marker` is a name that no other format has, `config` holds what
    shapes do not show, `prefix` is a pattern of what may stand before the names, and
    `to_torch(name here, tensor)` puts a tensor into torch's orientation.
    """

    name: str
    marker: str
    weight_map: dict[str, str]
    config: dict = {}
    prefix: str = ""
    to_torch: Callable = lambda name, tensor: tensor


def table(top: str, source: str = "", block: str = "", ours: str = "blocks.{i}.") -> dict[str, str]:
    """Pairs there=here, or a name that is the same in both: of the whole model, and of a block."""
    def pairs(text, before, after):
        for pair in text.split():
            there, differs, here = pair.partition("=")
            here = here if differs else there
            yield before + there, here and after + here

    return dict([*pairs(top, "", ""), *pairs(block, source, ours)])


def from_flax(name, tensor):
    """flax stores (in, out), splits the heads off and puts a filter's channels last."""
    if name == "patch_embed.weight":
        return tensor.permute(3, 2, 0, 1)
    if "qkv" in name:
        tensor = tensor.flatten(-2)                                  # (C, H, D) -> (C, H * D), bias likewise
    return tensor.flatten(0, -2).T if tensor.ndim > 1 and name.endswith("weight") else tensor


def from_conv1d(name, tensor):
    """OpenAI's linear layers are convolutions of width 1: (in, out) or (1, in, out)."""
    return tensor.squeeze(0).mT if name.startswith("h.") and tensor.ndim > 1 else tensor


CENTER_CROP = dict(transform=dict(resize=224, crop=224, filter="bicubic"))
MEAN_HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
BICUBIC = dict(transform=dict(resize=248, crop=224, filter="bicubic"))
SQUASH = dict(transform=dict(squash=224, filter="bilinear"))
CLIP = dict(eps=1e-5, activation="quick_gelu", pre_norm=True, final_norm=False,
            mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), **CENTER_CROP)

# mlp.linear_1 and mlp.linear_2 are the names in torchvision's published file
TORCHVISION = WeightFormat("torchvision", "encoder.layers.encoder_layer_0.ln_1.weight", table("""
    class_token=cls_token encoder.pos_embedding=pos_embed conv_proj=patch_embed encoder.ln=norm
    heads.head=head""", "encoder.layers.encoder_layer_{i}.", """
    ln_1=norm1 self_attention.in_proj_weight=attn.qkv.weight self_attention.in_proj_bias=attn.qkv.bias
    self_attention.out_proj=attn.proj ln_2=norm2 mlp.0=mlp.fc1 mlp.3=mlp.fc2
    mlp.linear_1=mlp.fc1 mlp.linear_2=mlp.fc2"""))
# the second line drops the heads of DINO and MAE
TIMM = WeightFormat("timm", "blocks.0.attn.qkv.weight", table("""
    cls_token pos_embed patch_embed.proj=patch_embed norm head pre_logits.*=
    head.mlp.*= head.last_layer.*= mask_token= decoder_*=
    """, "blocks.{i}.", "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2"), BICUBIC)
HF_VIT = WeightFormat("Hugging Face ViT", "embeddings.patch_embeddings.projection.weight", table("""
    embeddings.cls_token=cls_token embeddings.position_embeddings=pos_embed layernorm=norm classifier=head
    embeddings.patch_embeddings.projection=patch_embed embeddings.mask_token= pooler.dense=
    """, "encoder.layer.{i}.", """
    layernorm_before=norm1 attention.attention.query=attn.qkv/0 attention.attention.key=attn.qkv/1
    attention.attention.value=attn.qkv/2 attention.output.dense=attn.proj layernorm_after=norm2
    intermediate.dense=mlp.fc1 output.dense=mlp.fc2"""), MEAN_HALF | SQUASH, r"vit\.")
GOOGLE = WeightFormat("Google .npz", "embedding.kernel", table("""
    cls=cls_token embedding=patch_embed Transformer.posembed_input.pos_embedding=pos_embed
    Transformer.encoder_norm=norm head pre_logits= opt.state.*=
    """, "Transformer.encoderblock_{i}.", """
    MultiHeadDotProductAttention_*.query=attn.qkv/0 MultiHeadDotProductAttention_*.key=attn.qkv/1
    MultiHeadDotProductAttention_*.value=attn.qkv/2 MultiHeadDotProductAttention_*.out=attn.proj
    LayerNorm_0=norm1 LayerNorm_1=norm2 LayerNorm_2=norm2 MlpBlock_*.Dense_0=mlp.fc1
    MlpBlock_*.Dense_1=mlp.fc2"""), MEAN_HALF | SQUASH | dict(activation="gelu_tanh"),
    r"params\.|opt\.target\.", from_flax)
OPENAI_CLIP = WeightFormat("OpenAI CLIP", "visual.ln_pre.weight", table("""
    visual.class_embedding=cls_token visual.positional_embedding=pos_embed visual.conv1=patch_embed
    visual.ln_pre=norm_pre visual.ln_post= visual.proj= transformer.*= token_embedding= positional_embedding=
    ln_final= text_projection= logit_scale= input_resolution= context_length= vocab_size=
    """, "visual.transformer.resblocks.{i}.", """
    ln_1=norm1 attn.in_proj_weight=attn.qkv.weight attn.in_proj_bias=attn.qkv.bias attn.out_proj=attn.proj
    ln_2=norm2 mlp.c_fc=mlp.fc1 mlp.c_proj=mlp.fc2"""), CLIP)
HF_CLIP = WeightFormat("Hugging Face CLIP", "pre_layrnorm.weight", table("""
    embeddings.class_embedding=cls_token embeddings.position_embedding.weight=pos_embed
    embeddings.patch_embedding=patch_embed pre_layrnorm=norm_pre post_layernorm= embeddings.position_ids=
    text_model.*= visual_projection= text_projection= logit_scale=
    """, "encoder.layers.{i}.", """
    layer_norm1=norm1 self_attn.q_proj=attn.qkv/0 self_attn.k_proj=attn.qkv/1 self_attn.v_proj=attn.qkv/2
    self_attn.out_proj=attn.proj layer_norm2=norm2 mlp.fc1 mlp.fc2"""), CLIP, r"vision_model\.")
GPT2_BLOCK = "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj"
NANOGPT = WeightFormat("nanoGPT", "h.0.attn.c_attn.weight", table(            # attn.bias: the causal mask
    "wte wpe ln_f lm_head.weight= h.{i}.attn.bias= h.{i}.attn.masked_bias=", "h.{i}.", GPT2_BLOCK, "h.{i}."),
    dict(activation="gelu"), r"transformer\.")                       # torch's default GELU is the exact one
HF_GPT2 = NANOGPT._replace(name="Hugging Face GPT-2", config={}, to_torch=from_conv1d)
OPENAI_GPT2 = WeightFormat("OpenAI GPT-2", "model.h0.attn.c_attn.w", table(
    "model.wte=wte.weight model.wpe=wpe.weight model.ln_f=ln_f", "model.h{i}.", GPT2_BLOCK, "h.{i}."),
    to_torch=from_conv1d)
PUBLISHED = WeightFormat("published Vision-GPT", "vision.resampler.latents", {       # after `split_blocks`
    **table("""
    tok_emb=gpt2.wte pos_emb=gpt2.wpe final_norm=gpt2.ln_f out_head.weight= text.{i}.att.mask=
    vision.resampler.latents=resampler.latents
    """, "text.{i}.", """
    norm1=ln_1 att.W_query=attn.c_attn/0 att.W_key=attn.c_attn/1 att.W_value=attn.c_attn/2
    att.out_proj=attn.c_proj norm2=ln_2 ff.layers.0=mlp.c_fc ff.layers.2=mlp.c_proj""", "gpt2.h.{i}."),
    **table("", "cross.{i}.", "attn_norm=ln att.W_query=q att.W_key=kv/0 att.W_value=kv/1 att.out_proj=out",
            "xattn.{i}."),
    **table("", "vision.resampler.", """
    to_q.{i}=q to_kv.{i}=kv proj_out.{i}=proj norms_latent.{i}=norm_latents norms_media.{i}=norm_patches
    mlp.{i}.0=norm_mlp mlp.{i}.1=fc1 mlp.{i}.3=fc2""", "resampler.layers.{i}."),
    **{f"vision.encoder.model.{there}": f"vit.{here}" for there, here in TORCHVISION.weight_map.items()}})
FORMATS = {"ViT": (TORCHVISION, TIMM, HF_VIT, GOOGLE, OPENAI_CLIP, HF_CLIP),
           "GPT-2": (HF_GPT2, NANOGPT, OPENAI_GPT2), "Vision-GPT": (PUBLISHED,)}
SUFFIXES = {"weight": "weight", "kernel": "weight", "scale": "weight", "w": "weight", "g": "weight",
            "bias": "bias", "b": "bias", "shift": "bias"}


def read_model(path: str | Path, kind: str) -> tuple:
    """A ViT, GPT-2 or Vision-GPT -> tensors by our names, its format, tensors as read, its SourceConfig."""
    source, config = read_weights(path)
    fmt = detect_format(source, kind, path)
    renamed = split_blocks(source, path) if fmt is PUBLISHED else source
    return map_names(renamed, fmt, path), fmt, source, config


def detect_format(tensors: dict[str, Tensor], kind: str, source) -> WeightFormat:
    """The format of a ViT, GPT-2 or Vision-GPT. Raises UserError that says what the file holds instead."""
    for found, formats in FORMATS.items():
        for fmt in formats:
            marker = re.compile(f"({fmt.prefix})?{re.escape(fmt.marker)}")
            name = next((name for name in tensors if marker.fullmatch(name.replace("/", "."))), None)
            if name and found != kind:
                raise UserError(f"{source} holds a {found} ({fmt.name}), not a {kind}")
            shape = tensors[name].shape if name else ()
            if name and not (fmt is HF_GPT2 and len(shape) == 2 and shape[0] == 3 * shape[1]):
                return fmt                                           # (3 C, C) are nanoGPT's linear layers
    known = ", ".join(fmt.name for fmt in FORMATS[kind])
    raise UserError(f"{source} holds no {kind} in a known format ({known}); "
                    f"it begins with {', '.join(map(repr, sorted(tensors)[:3]))[:200]}")


def map_names(tensors: dict[str, Tensor], fmt: WeightFormat, source) -> dict[str, Tensor]:
    """{our name: float32 tensor}. What the format does not know keeps its name, put in quotes."""
    rules, parts = [], defaultdict(dict)                             # our name -> {part: tensor}
    for template, target in fmt.weight_map.items():
        pattern = re.escape(template).replace(r"\{i\}", r"(?P<layer>[0-9]{1,4})").replace(r"\*", ".*")
        suffix = rf"(?:\.(?P<suffix>{'|'.join(SUFFIXES)}))?"
        rules.append((re.compile(f"(?:{fmt.prefix})?{pattern}{suffix}"), target))
    try:
        for name, tensor in tensors.items():
            matches = ((pattern.fullmatch(name.replace("/", ".")), target) for pattern, target in rules)
            match, target = next((found for found in matches if found[0]), (None, repr(name)))
            if not target:
                continue
            part = ""
            if match:
                if not (tensor.is_floating_point() and tensor.ndim and tensor.numel()):
                    raise UserError(f"{source}: {name} is {tensor.dtype} {tuple(tensor.shape)}, no weights")
                layer, suffix = match.groupdict().get("layer"), match["suffix"]
                target, _, part = target.replace("{i}", layer or "").partition("/")
                target += f".{SUFFIXES[suffix]}" if suffix else ""
                tensor = fmt.to_torch(target, tensor.float())
            if part in parts[target]:                                # a second source of one tensor
                target = repr(name)
            parts[target][part] = tensor
        return {name: held[""] if "" in held else torch.cat([held[part] for part in sorted(held)])
                for name, held in parts.items()}
    except (RuntimeError, IndexError) as error:                      # of a permutation or concatenation
        raise UserError(f"{source} holds shapes that {fmt.name} does not have ({error})") from None


def split_blocks(tensors: dict[str, Tensor], path) -> dict[str, Tensor]:
    """trf_blocks.{t} -> text.{i}, or cross.{i} where it is the cross-attention before text block i."""
    block = re.compile(r"trf_blocks\.([0-9]{1,4})\.")
    text = sorted({int(m[1]) for name in tensors
                   if (m := block.match(name)) and name.startswith("norm1.", m.end())})

    def number(match):
        t = int(match[1])
        return f"{'text' if t in text else 'cross'}.{bisect_left(text, t)}."

    numbered = {block.sub(number, name, count=1): tensor for name, tensor in tensors.items()}
    if len(numbered) < len(tensors):
        raise UserError(f"{path} has two cross-attentions before one block")
    return numbered


ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}      # Hugging Face's names


def activation(name, source):
    if name not in ACTIVATIONS:
        raise UserError(f"{source} needs the activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gpt2_settings(fmt: WeightFormat, source: SourceConfig, path) -> dict:
    """The fields of GPT2Config that shapes do not show; n_head is None where the source does not tell."""
    fields = dict(n_head=source.n_head, **fmt.config)
    if fmt is HF_GPT2:
        fields["eps"] = source.layer_norm_epsilon
        fields["activation"] = activation(source.activation_function, path)
        if source.scale_attn_by_inverse_layer_idx or not source.scale_attn_weights:
            raise UserError(f"{path} does not scale attention as GPT-2 does (see its config.json)")
    return fields


def vit_settings(fmt: WeightFormat, tensors: dict, source: SourceConfig, image_size: int, path) -> dict:
    """The fields of ViTConfig that shapes do not show: from the format, then from the source's own files."""
    fields = dict(fmt.config)
    if fmt is TORCHVISION and ("swag" in Path(path).name or image_size > 224):
        fields |= CENTER_CROP
    if fmt is TIMM:
        if source.wrapper is None and "head.weight" in tensors:      # else ImageNet's mean and std
            fields |= MEAN_HALF
        if timm := source.pretrained_cfg:
            crop = timm.input_size[-1]
            fields |= dict(mean=timm.mean, std=timm.std, transform=dict(
                resize=int(crop / timm.crop_pct), crop=crop, filter=timm.interpolation))
    if fmt is GOOGLE:
        kernels = (tensor for name, tensor in tensors.items() if name.endswith("query/kernel"))
        fields["n_head"] = next((kernel.shape[1] for kernel in kernels if kernel.ndim == 3), None)
    if fmt is OPENAI_CLIP:
        fields["n_head"] = tensors["visual.ln_pre.weight"].numel() // 64
    if fmt in (HF_VIT, HF_CLIP):
        config, shown = source.vision_config or source, source.preprocessor
        found = dict(n_head=config.num_attention_heads, eps=config.layer_norm_eps,
                     activation=config.hidden_act and activation(config.hidden_act, path))
        fields |= {name: value for name, value in found.items() if value is not None}
        if shown and shown.image_mean and shown.image_std and shown.size:
            sizes = shown.size, shown.crop_size
            side, crop = (min(size.values()) if isinstance(size, dict) else size for size in sizes)
            transform = dict(resize=side, crop=crop) if shown.do_center_crop else dict(squash=side)
            transform["filter"] = "bicubic" if shown.resample == 3 else "bilinear"
            fields |= dict(mean=shown.image_mean, std=shown.image_std, transform=transform)
    return fields
