"""Pretrained weights, in whatever layout they were published, -> weights/: vit, gpt2, tokenizer.

    python convert_weights.py                                    # downloads torchvision's ViT-B/16 and GPT-2
    python convert_weights.py --vit vit_b_16.pth --gpt2 FOLDER   # files at hand; --check dog.jpg tries them
    python convert_weights.py --vision-gpt gurumurthy3/vision-gpt-flickr8k_v2     # -> weights/vision-gpt
    python convert_weights.py --checkpoint out/flickr8k --dtype float16           # -> out/flickr8k-float16

GPT-2: Hugging Face, OpenAI's TensorFlow checkpoint, nanoGPT. ViT: torchvision (SWAG too), timm, DeiT, DINO,
MAE, Hugging Face, Google's .npz, CLIP in OpenAI's or Hugging Face's form. Any size of either. The last two
commands write complete checkpoints. weight_formats.py holds the layouts.
"""

import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from gpt2 import GPT2, GPT2Config
from lib import checkpoint, cli, weight_formats
from lib.cli import UserError, flag
from lib.download import fetch
from lib.images import load_image, normalize
from model import VisionGPT, VisionGPTConfig
from resampler import ResamplerConfig
from tokenizer import Tokenizer
from vit import ViT, ViTConfig

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
DOWNLOADS = {                                # file -> (address, SHA-256 or its first digits)
    "vit_b_16-c867db91.pth": ("https://download.pytorch.org/models/vit_b_16-c867db91.pth", "c867db91"),
    "gpt2/model.safetensors": (f"{HUB}/openai-community/gpt2/resolve/main/model.safetensors",
                               "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2/merges.txt": (f"{HUB}/openai-community/gpt2/resolve/main/merges.txt",
                        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")}
GPT2_VOCABULARY = 50257
VIT_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}        # by width, where the source does not say
GPT2_HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}


@dataclass
class ConvertConfig:
    vit: str | None = flag(None, "ViT weights to convert", metavar="FILE|DIR")
    gpt2: str | None = flag(None, "GPT-2 weights to convert", metavar="FILE|DIR")
    vision_gpt: str | None = flag(None, "published Vision-GPT to convert", metavar="FILE|HUB_NAME")
    checkpoint: str | None = flag(None, "trained checkpoint to make one stand-alone model of", metavar="DIR")
    weights: str | None = flag(None, "one more folder with the backbones of --checkpoint", metavar="DIR")
    out: str | None = flag(None, "folder to write: weights, weights/vision-gpt or DIR-<dtype>", metavar="DIR")
    dtype: str = flag("auto", "what the tensors are stored as; auto is float32", choices=cli.DTYPES)
    heads: int | None = flag(None, "attention heads, where neither the source nor a known width tells")
    image_size: int | None = flag(None, "interpolate the ViT's positions to pictures of this size")
    check: str | None = flag(None, "show what the converted models make of this picture", metavar="IMAGE")

    def __post_init__(self):
        for name in ("heads", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if sum(map(bool, (self.vit or self.gpt2, self.vision_gpt, self.checkpoint))) > 1:
            raise UserError("--vision-gpt, --checkpoint and --vit or --gpt2 are different tasks: name one")
        if self.image_size and (self.vision_gpt or self.checkpoint or self.gpt2 and not self.vit):
            raise UserError("--image-size is for the conversion of a ViT")


# ------------------------------------------------------------------------------------------------------------
# models: sizes are read off the shapes, the rest off the source's own config and the layout


def shape_of(tensors, name, usual):
    """The shape of a tensor, or the usual one where it is missing: `checkpoint.load_strict` lists what differs."""
    found = tensors.get(name)
    return usual if found is None or found.ndim != len(usual) else tuple(found.shape)


def count(tensors, prefix):
    """The number of layers under a prefix."""
    numbers = (int(m[1]) for name in tensors if (m := re.match(rf"{prefix}\.(\d+)\.", name)))
    return 1 + max(numbers, default=-1)


def pick_heads(stated, given, width, table, source):
    """Attention heads: what the source says, else --heads, else what published models of that width have."""
    if stated and given and stated != given:
        raise UserError(f"{source} says that it has {stated} attention heads, not {given}")
    heads = stated or given or table.get(width)
    if not heads:
        raise UserError(f"{source} does not say how many attention heads it has: name them with --heads")
    return heads


def build(module_class, config, tensors, kind, source):
    """A module that holds `tensors`. Raises UserError that lists what differs and which layouts are known."""
    with torch.device("meta"):
        module = module_class(config)
    try:
        checkpoint.load_strict(module, tensors, source)
    except UserError as error:
        raise UserError(f"{error}; known layouts: {weight_formats.known(kind)}") from None
    return module.eval()


def vit_sizes(tensors, source):
    """The fields of ViTConfig that show in the shapes; reshapes class token and positions to (1, N, C)."""
    for name in ("cls_token", "pos_embed"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
    C = shape_of(tensors, "cls_token", (1, 1, 768))[2]
    P = shape_of(tensors, "patch_embed.weight", (C, 3, 16, 16))[2]
    N = shape_of(tensors, "pos_embed", (1, 197, C))[1] - 1
    if math.isqrt(N) ** 2 != N:
        raise UserError(f"{source} has {N + 1} positions: not a class token and a square of patches")
    return dict(image_size=math.isqrt(N) * P, patch_size=P, n_embd=C, n_layer=count(tensors, "blocks"),
                n_mlp=shape_of(tensors, "blocks.0.mlp.fc1.weight", (3072, C))[0],
                n_class=shape_of(tensors, "head.weight", (0, C))[0])


def load_vit(path, heads=None, image_size=None):
    """A ViT in any known layout -> (ViT in float32, layout's name). `image_size` interpolates positions."""
    source, facts = weight_formats.read(path)
    if any(re.search(r"dist(illation)?_token", name) for name in source):
        raise UserError(f"{path} is a distilled DeiT: its features come of a second token, which has no "
                        "place here; take the plain DeiT of that size")
    layout = weight_formats.recognise(source, "ViT", path)
    tensors = weight_formats.rename(source, layout, path)
    if any("pre_logits" in name for name in source):                 # ImageNet-21k: a tanh layer before it
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    sizes = vit_sizes(tensors, path)
    if layout.config is weight_formats.CLIP:                                # its filters have no bias
        tensors["patch_embed.bias"] = torch.zeros(sizes["n_embd"])
    fields = weight_formats.vit_behaviour(layout, source, facts, sizes["image_size"], path) | sizes
    fields |= dict(image_size=image_size or sizes["image_size"],
                   n_head=pick_heads(fields.get("n_head"), heads, sizes["n_embd"], VIT_HEADS, path))
    config = ViTConfig(**fields)
    config.transform = fit(config.transform, config.image_size)
    if config.image_size != sizes["image_size"] and "pos_embed" in tensors:
        tensors["pos_embed"] = interpolate(tensors["pos_embed"], config.image_size // config.patch_size)
    return build(ViT, config, tensors, "ViT", path), layout.name


def interpolate(positions, side):
    """Positions (1, 1 + g * g, C) -> (1, 1 + side * side, C): bicubic, no antialias, class token as it is."""
    g, C = math.isqrt(positions.shape[1] - 1), positions.shape[2]
    grid = positions[:, 1:].reshape(1, g, g, C).permute(0, 3, 1, 2)                      # (1, C, g, g)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def fit(transform, size):
    """An evaluation transform for pictures of `size`; those published for over 224 pixels have no margin."""
    if "squash" in transform:
        return transform | dict(squash=size)
    if transform["crop"] == size:
        return transform
    resize = size if size > 224 else transform["resize"] * size // transform["crop"]
    return transform | dict(resize=resize, crop=size)


def gpt2_sizes(tensors):
    """The fields of GPT2Config that show in the shapes."""
    C = shape_of(tensors, "ln_f.weight", (768,))[0]
    return dict(vocab_size=shape_of(tensors, "wte.weight", (GPT2_VOCABULARY, C))[0], n_embd=C,
                n_positions=shape_of(tensors, "wpe.weight", (1024, C))[0], n_layer=count(tensors, "h"))


def check_tied(source, name, embedding, path):
    """Raises UserError when the file has a head that is not the token embedding, as GPT-2's is."""
    heads = [tensor for key, tensor in source.items() if key.endswith(name)]
    if heads and embedding is not None and not torch.equal(heads[0].float(), embedding):
        raise UserError(f"{path} has a head of its own ({name}); GPT-2's is its token embedding")


def load_gpt2(path, heads=None):
    """A GPT-2 in any known layout -> (GPT2 in float32, the layout's name)."""
    source, facts = weight_formats.read(path)
    layout = weight_formats.recognise(source, "GPT-2", path)
    fields = {"n_head": facts.get("n_head")}
    if layout is weight_formats.HF_GPT2:
        rows, columns = next(tensor.shape for name, tensor in source.items() if name.endswith(layout.sign))
        if rows == 3 * columns:                                      # (out, in): torch's Linear, not Conv1D
            layout = weight_formats.NANOGPT
        else:
            fields |= dict(eps=facts.get("layer_norm_epsilon", 1e-5),
                           activation=weight_formats.activation_of(
                               facts.get("activation_function", "gelu_new"), path))
            if facts.get("scale_attn_by_inverse_layer_idx") or not facts.get("scale_attn_weights", True):
                raise UserError(f"{path} scales its attention in a way of its own (see its config.json)")
    tensors = weight_formats.rename(source, layout, path)
    check_tied(source, "lm_head.weight", tensors.get("wte.weight"), path)
    surplus = gpt2_sizes(tensors)["vocab_size"] - GPT2_VOCABULARY
    if surplus > 0:                                                  # nanoGPT pads, others add tokens
        print(f"{path}: {surplus} rows beyond GPT-2's vocabulary are left out", file=sys.stderr)
        tensors["wte.weight"] = tensors["wte.weight"][:GPT2_VOCABULARY]
    if layout is weight_formats.NANOGPT and not any(name.endswith(".bias") for name in tensors):    # trained without
        tensors |= {name.replace("weight", "bias"): torch.zeros(len(tensor))
                    for name, tensor in tensors.items() if name.startswith(("h.", "ln_f"))}
    fields |= layout.config | gpt2_sizes(tensors)
    fields["n_head"] = pick_heads(fields["n_head"], heads, fields["n_embd"], GPT2_HEADS, path)
    return build(GPT2, GPT2Config(**fields), tensors, "GPT-2", path), layout.name


def load_published(path, heads=None):
    """The published Vision-GPT -> (VisionGPT in float32 without tokenizer, the layout's name)."""
    source, facts = weight_formats.read(path)
    layout = weight_formats.recognise(source, "Vision-GPT", path)
    tensors = weight_formats.rename(weight_formats.number_blocks(source, path), layout, path)
    check_tied(source, "out_head.weight", tensors.get("gpt2.wte.weight"), path)
    parts = {part: {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}
             for part in ("vit.", "gpt2.", "resampler.")}
    vit, gpt2 = vit_sizes(parts["vit."], path), gpt2_sizes(parts["gpt2."])
    if gpt2["vocab_size"] != GPT2_VOCABULARY and "gpt2.wte.weight" in tensors:
        tensors["gpt2.wte.weight"] = tensors["gpt2.wte.weight"][:-1]         # <|pad|>, which is never read
        gpt2["vocab_size"] -= 1
    vit["n_head"] = pick_heads(None, heads, vit["n_embd"], VIT_HEADS, path)
    gpt2["n_head"] = pick_heads(facts.get("n_heads"), heads, gpt2["n_embd"], GPT2_HEADS, path)
    resampler = ResamplerConfig(
        n_latent=len(tensors["resampler.latents"]), n_layer=count(parts["resampler."], "layers"),
        n_head=shape_of(tensors, "resampler.layers.0.q.weight", (512, 768))[0] // 64,
        n_mlp=shape_of(tensors, "resampler.layers.0.fc1.weight", (256, 768))[0])
    cross_attention = {int(name.split(".")[1]) for name in tensors if name.startswith("xattn.")}
    config = VisionGPTConfig(ViTConfig(**vit), GPT2Config(**gpt2), resampler, cross_attention)
    return build(VisionGPT, config, tensors, "Vision-GPT", path), layout.name


# ------------------------------------------------------------------------------------------------------------
# writing and looking


def find_tokenizer(vocab_size, *folders):
    """GPT-2's tokenizer from tables in `folders`, else as tiktoken finds it, else None and a warning."""
    if vocab_size != GPT2_VOCABULARY:
        print(f"warning: no tokenizer.json is written: {vocab_size} tokens are not GPT-2's", file=sys.stderr)
        return None
    for folder in folders:
        for file in (folder / "merges.txt", folder / "vocab.bpe", *sorted(folder.glob("*.tiktoken"))):
            if file.exists():
                return Tokenizer.gpt2(file)
    try:
        return Tokenizer.gpt2()
    except UserError as error:
        print(f"warning: no tokenizer.json is written: {error}", file=sys.stderr)
        return None


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None


def write_backbone(name, module, layout, out, dtype):
    """Write `out`/`name`.safetensors with the hash of its float32 tensors, and report it."""
    make_folder(out)
    digest = checkpoint.sha256(module.state_dict())
    checkpoint.save_module(module.to(dtype), out / f"{name}.safetensors", sha256=digest)
    report(module.float(), layout, digest, out / f"{name}.safetensors")


def report(module, layout, digest, file):
    sizes = [p.numel() for p in module.parameters()]
    print(f"{file}: {layout}, {len(sizes)} tensors, {sum(sizes):,} parameters, sha256 {digest}")


def write_checkpoint(model, layout, out, dtype, training):
    """Write a complete checkpoint folder. Raises UserError rather than write over a training run."""
    if any((out / name).exists() for name in ("fusion.safetensors", "training_state.pt")):
        raise UserError(f"{out} holds a training run: name another folder with --out")
    make_folder(out)
    digest = checkpoint.sha256(model.state_dict())
    model.save_pretrained(out, dtype, training=training)
    report(model, layout, digest, out / "model.safetensors")


def evaluation_input(image, config):
    """A picture -> (1, 3, S, S), through the evaluation transform that the weights name."""
    image, transform = load_image(image), config.transform
    filter, S = Image.Resampling[transform["filter"].upper()], config.image_size
    if "squash" in transform:
        image = image.resize((S, S), filter)
    else:
        short = min(image.size)
        image = image.resize([transform["resize"] * length // short for length in image.size], filter)
        left, top = (round((length - S) / 2) for length in image.size)
        image = image.crop((left, top, left + S, top + S))
    return normalize(torch.from_numpy(np.array(image))[None], config)


def show_classes(vit, image):
    """Print the five likeliest classes of a picture."""
    if vit.head is None:
        return print("these ViT weights have no classes to tell")
    with torch.inference_mode():
        logits = vit.classify(evaluation_input(image, vit.config))
    for probability, index in zip(*(values.tolist() for values in logits[0].softmax(-1).topk(5))):
        print(f"class {index:<5} {probability:7.2%}")


def show_continuations(gpt2, tokenizer, text="A photo of a man riding a"):
    """Print the five likeliest tokens after a sentence."""
    with torch.inference_mode():
        logits = gpt2(torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]]))
    for probability, token in zip(*(values.tolist() for values in logits[0, -1].softmax(-1).topk(5))):
        print(f"{text}{tokenizer.decode([token])}  {probability:.2%}")


def convert(settings):
    if settings.check:
        load_image(settings.check)                          # rather now than after the work
    dtype = cli.pick_dtype(settings.dtype) or torch.float32
    if settings.vision_gpt:
        convert_published(settings, dtype)
    elif settings.checkpoint:
        convert_checkpoint(settings, dtype)
    else:
        convert_backbones(settings, dtype)


def convert_backbones(settings, dtype):
    files, out = {"vit": settings.vit, "gpt2": settings.gpt2}, Path(settings.out or "weights")
    if not any(files.values()):
        files = download_backbones()
    if files["vit"]:
        vit, layout = load_vit(files["vit"], settings.heads, settings.image_size)
        write_backbone("vit", vit, layout, out, dtype)
        if settings.check:
            show_classes(vit, settings.check)
    if files["gpt2"]:
        gpt2, layout = load_gpt2(files["gpt2"], settings.heads)
        tokenizer = find_tokenizer(gpt2.config.vocab_size, folder_of(files["gpt2"]))
        write_backbone("gpt2", gpt2, layout, out, dtype)
        if tokenizer:
            tokenizer.save(out)
            print(f"{out / 'tokenizer.json'}: GPT-2's, {tokenizer.vocab_size} tokens")
        elif gpt2.config.vocab_size != GPT2_VOCABULARY:
            (out / "tokenizer.json").unlink(missing_ok=True)         # another model's
        if settings.check and tokenizer:
            show_continuations(gpt2, tokenizer)


def download_backbones(folder=Path("downloads")):
    """{"vit": file, "gpt2": file} from where they were published."""
    for name, (url, digest) in DOWNLOADS.items():
        try:
            fetch(url, folder / name, digest)
        except UserError as error:
            if not name.endswith("merges.txt"):                      # tiktoken may have these tables
                raise
            print(f"warning: {error}", file=sys.stderr)
    return {"vit": folder / "vit_b_16-c867db91.pth", "gpt2": folder / "gpt2/model.safetensors"}


def convert_published(settings, dtype):
    path, out = Path(settings.vision_gpt), Path(settings.out or "weights/vision-gpt")
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", settings.vision_gpt):
        path = fetch(f"{HUB}/{settings.vision_gpt}/resolve/main/model_fp32/model_checkpoint.pth",
                     Path("downloads") / path.name / "model_checkpoint.pth")
    model, layout = load_published(path, settings.heads)
    beside = folder_of(path)
    model.tokenizer = find_tokenizer(model.config.gpt2.vocab_size, beside, beside / "tokenizer")
    write_checkpoint(model, layout, out, dtype, dict(
        photographs=True, source=settings.vision_gpt,
        note="trained on Flickr8k's train, val and test images together"))
    if settings.check and model.tokenizer:
        print(model.caption(settings.check))


def convert_checkpoint(settings, dtype):
    folder = Path(settings.checkpoint)
    out = Path(settings.out or f"{folder.resolve()}-{str(dtype).removeprefix('torch.')}")
    if out.resolve() == folder.resolve():
        raise UserError(f"--out is the checkpoint {folder} itself: name another folder")
    model = VisionGPT.from_pretrained(folder, device="cpu", weights=settings.weights)
    write_checkpoint(model, "trained Vision-GPT", out, dtype, checkpoint.read_config(folder).get("training"))
    if settings.check:
        print(model.caption(settings.check))


def folder_of(path):
    return Path(path) if Path(path).is_dir() else Path(path).parent


def main():
    convert(ConvertConfig(**cli.parse(ConvertConfig, __doc__)))


if __name__ == "__main__":
    cli.run(main)
