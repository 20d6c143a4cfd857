"""Pretrained weights as they were published -> weights/: vit, gpt2, tokenizer.

    python convert_weights.py                                    # downloads torchvision's ViT-B/16 and GPT-2
    python convert_weights.py --vit vit_b_16.pth --gpt2 FOLDER   # local files; --check dog.jpg tries them out
    python convert_weights.py --vision-gpt gurumurthy3/vision-gpt-flickr8k_v2     # -> weights/vision-gpt
    python convert_weights.py --checkpoint out/flickr8k --dtype float16           # -> out/flickr8k-float16

GPT-2: Hugging Face, OpenAI's TensorFlow checkpoint, nanoGPT. ViT: torchvision (SWAG too), timm, DeiT, DINO,
MAE, Hugging Face, Google's .npz, CLIP from OpenAI or Hugging Face. Any size of either. The last two commands
write complete checkpoints. lib/weight_formats.py describes the formats.
"""

import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gpt2 import GPT2, GPT2Config
from lib import checkpoint, cli, records, weight_formats
from lib.cli import UserError, flag
from lib.download import HUB, download_file
from lib.hub import local_or_hub, model_card
from lib.images import load_image, normalize
from model import VisionGPT, VisionGPTConfig
from resampler import ResamplerConfig
from tokenizer import Tokenizer
from vit import ViT, ViTConfig

DOWNLOADS = {                                # file -> (address, SHA-256 or its first digits)
    "vit_b_16-c867db91.pth": ("https://download.pytorch.org/models/vit_b_16-c867db91.pth", "c867db91"),
    "gpt2/model.safetensors": (f"{HUB}/openai-community/gpt2/resolve/main/model.safetensors",
                               "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2/merges.txt": (f"{HUB}/openai-community/gpt2/resolve/main/merges.txt",
                        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")}
CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "fusion.safetensors",
                    "drafts.safetensors", "training_state.pt", "README.md")
GPT2_VOCAB_SIZE = 50257
VIT_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}        # by width, where the source does not say
GPT2_HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}


@dataclass
class ConvertConfig:
    vit: str | None = flag(None, "ViT weights to convert", metavar="FILE|DIR|HUB_NAME")
    gpt2: str | None = flag(None, "GPT-2 weights to convert", metavar="FILE|DIR|HUB_NAME")
    vision_gpt: str | None = flag(None, "published Vision-GPT to convert", metavar="FILE|HUB_NAME")
    checkpoint: str | None = flag(None, "trained checkpoint to turn into a stand-alone model; "
                                  "its metrics.json (evaluate.py --json FILE) goes into the model card",
                                  metavar="DIR|HUB_NAME")
    weights: str | None = flag(None, "another folder to look for --checkpoint's backbones in", metavar="DIR")
    out: str | None = flag(None, "folder to write; default: weights, weights/vision-gpt or DIR-<dtype>",
                           metavar="DIR")
    dtype: str = flag("auto", "dtype to store the tensors in; auto means float32", choices=cli.DTYPES)
    heads: int | None = flag(None, "attention heads, if the source does not tell", min=1, max=1000)
    check: str | None = flag(None, "show what the converted models make of this image", metavar="IMAGE")

    def __post_init__(self):
        cli.check_ranges(self)
        if sum(map(bool, (self.vit or self.gpt2, self.vision_gpt, self.checkpoint))) > 1:
            raise UserError("give only one of --vision-gpt, --checkpoint, or --vit and --gpt2")


def shape_of(tensors, name, default):
    """The shape of a tensor, or the default if it is missing: `checkpoint.load_strict` lists what differs."""
    tensor = tensors.get(name)
    return default if tensor is None or tensor.ndim != len(default) else tuple(tensor.shape)


def count_layers(tensors, prefix, source):
    """The number of layers under a prefix. Raises UserError for gaps, so that there is a tensor in each."""
    layers = {int(m[1]) for name in tensors if (m := re.match(rf"{prefix}\.([0-9]{{1,4}})\.", name))}
    if layers != set(range(len(layers))):
        raise UserError(f"{source} holds {len(layers)} layers whose numbers have gaps")
    return len(layers)


def pick_heads(stated, width, table, source):
    """Attention heads: what the user or the source states, else what published models of that width have."""
    heads = stated or table.get(width)
    if not heads:
        raise UserError(f"{source} does not say how many attention heads it has: use --heads")
    return heads


def build_module(module_class, config, tensors, source) -> nn.Module:
    """A module that holds `tensors`. Raises UserError for NaN, or if they do not fit."""
    with torch.device("meta"):
        module = module_class(config)
    checkpoint.load_strict(module, tensors, source)
    checkpoint.check_finite(tensors, f"cannot use {source}")
    return module.eval()


def vit_sizes(tensors, source):
    """The fields of ViTConfig that follow from shapes; reshapes class token and positions to (1, N, C)."""
    for name in ("cls_token", "pos_embed"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
    C = shape_of(tensors, "cls_token", (1, 1, 768))[2]
    P = shape_of(tensors, "patch_embed.weight", (C, 3, 16, 16))[2]
    N = shape_of(tensors, "pos_embed", (1, 197, C))[1] - 1
    if N < 1 or math.isqrt(N) ** 2 != N:
        raise UserError(f"{source} has {N + 1} positions, which is not a class token and a square of patches")
    return dict(image_size=math.isqrt(N) * P, patch_size=P, n_embd=C,
                n_layer=count_layers(tensors, "blocks", source),
                n_mlp=shape_of(tensors, "blocks.0.mlp.fc1.weight", (3072, C))[0],
                n_class=shape_of(tensors, "head.weight", (0, C))[0])


def load_vit(path: str | Path, heads: int | None = None) -> tuple[ViT, str]:
    """A ViT in any known format -> (ViT in float32, format's name)."""
    tensors, fmt, source, config = weight_formats.read_model(path, "ViT")
    if any(re.search(r"dist(illation)?_token", name) for name in source):
        raise UserError(f"{path} is a distilled DeiT, whose distillation token has no place here: "
                        "use the plain DeiT of that size")
    if any("pre_logits" in name for name in source):                 # ImageNet-21k: a tanh layer first
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    sizes = vit_sizes(tensors, path)
    if fmt.config is weight_formats.CLIP:                            # its patch embedding has no bias
        tensors["patch_embed.bias"] = torch.zeros(sizes["n_embd"])
    fields = weight_formats.vit_settings(fmt, source, config, sizes["image_size"], path) | sizes
    fields["n_head"] = pick_heads(heads or fields.get("n_head"), sizes["n_embd"], VIT_HEADS, path)
    config = ViTConfig(**fields)
    config.transform = resize_transform(config.transform, config.image_size)
    return build_module(ViT, config, tensors, f"{path} ({fmt.name})"), fmt.name


def resize_transform(transform: dict, size: int) -> dict:
    """An evaluation transform for images of `size`; those published for over 224 pixels have no margin."""
    if "squash" in transform:
        return transform | dict(squash=size)
    if transform["crop"] == size:
        return transform
    resize = size if size > 224 else transform["resize"] * size // transform["crop"]
    return transform | dict(resize=resize, crop=size)


def gpt2_sizes(tensors, source):
    """The fields of GPT2Config that follow from shapes."""
    C = shape_of(tensors, "ln_f.weight", (768,))[0]
    return dict(vocab_size=shape_of(tensors, "wte.weight", (GPT2_VOCAB_SIZE, C))[0], n_embd=C,
                n_positions=shape_of(tensors, "wpe.weight", (1024, C))[0],
                n_layer=count_layers(tensors, "h", source))


def load_gpt2(path: str | Path, heads: int | None = None) -> tuple[GPT2, str]:
    """A GPT-2 in any known format -> (GPT2 in float32, format's name)."""
    tensors, fmt, source, config = weight_formats.read_model(path, "GPT-2")
    head = next((tensor for name, tensor in source.items() if name.endswith("lm_head.weight")), None)
    if head is not None and "wte.weight" in tensors and not torch.equal(head.float(), tensors["wte.weight"]):
        raise UserError(f"{path} has a head of its own (lm_head.weight), but GPT-2's is its token embedding")
    surplus = gpt2_sizes(tensors, path)["vocab_size"] - GPT2_VOCAB_SIZE
    if surplus > 0:                                                  # nanoGPT pads, others add tokens
        print(f"{path}: dropping {surplus} rows beyond GPT-2's vocabulary", file=sys.stderr)
        tensors["wte.weight"] = tensors["wte.weight"][:GPT2_VOCAB_SIZE]
    if fmt is weight_formats.NANOGPT and not any(name.endswith(".bias") for name in tensors):     # bias=False
        tensors |= {name.replace("weight", "bias"): torch.zeros(len(tensor))
                    for name, tensor in tensors.items() if name.startswith(("h.", "ln_f"))}
    fields = weight_formats.gpt2_settings(fmt, config, path) | gpt2_sizes(tensors, path)
    fields["n_head"] = pick_heads(heads or fields["n_head"], fields["n_embd"], GPT2_HEADS, path)
    return build_module(GPT2, GPT2Config(**fields), tensors, f"{path} ({fmt.name})"), fmt.name


def load_published(path: str | Path, heads: int | None = None) -> tuple[VisionGPT, str]:
    """The published Vision-GPT -> (VisionGPT in float32 without a tokenizer, format's name)."""
    tensors, fmt, _, source = weight_formats.read_model(path, "Vision-GPT")
    parts = {part: {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}
             for part in ("vit.", "gpt2.", "resampler.")}
    vit, gpt2 = vit_sizes(parts["vit."], path), gpt2_sizes(parts["gpt2."], path)
    if gpt2["vocab_size"] != GPT2_VOCAB_SIZE and "gpt2.wte.weight" in tensors:
        tensors["gpt2.wte.weight"] = tensors["gpt2.wte.weight"][:-1]         # <|pad|>, which is never read
        gpt2["vocab_size"] -= 1
    vit["n_head"] = pick_heads(heads, vit["n_embd"], VIT_HEADS, path)
    gpt2["n_head"] = pick_heads(heads or source.n_heads, gpt2["n_embd"], GPT2_HEADS, path)
    resampler = ResamplerConfig(
        n_latent=len(tensors["resampler.latents"]), n_layer=count_layers(parts["resampler."], "layers", path),
        n_head=shape_of(tensors, "resampler.layers.0.q.weight", (512, 768))[0] // 64,
        n_mlp=shape_of(tensors, "resampler.layers.0.fc1.weight", (256, 768))[0])
    cross_attention = {int(name.split(".")[1]) for name in tensors if name.startswith("xattn.")}
    config = VisionGPTConfig(ViTConfig(**vit), GPT2Config(**gpt2), resampler, cross_attention)
    return build_module(VisionGPT, config, tensors, f"{path} ({fmt.name})"), fmt.name


def eval_transform(image, config: ViTConfig) -> Tensor:
    """An image -> (1, 3, S, S), through the evaluation transform that belongs to the weights."""
    image, transform, S = load_image(image), config.transform, config.image_size
    filter = Image.Resampling[transform["filter"].upper()]
    if "squash" in transform:
        image = image.resize((S, S), filter)
    else:
        short = min(image.size)
        image = image.resize([transform["resize"] * length // short for length in image.size], filter)
        left, top = (round((length - S) / 2) for length in image.size)
        image = image.crop((left, top, left + S, top + S))
    return normalize(torch.from_numpy(np.array(image))[None], config)


@torch.inference_mode()
def check_vit(vit: ViT, image):
    """Print the five most likely classes of an image."""
    if vit.head is None:
        return print("these ViT weights have no classification head")
    print_top5(vit.classify(eval_transform(image, vit.config))[0], "class {:<5}".format)


@torch.inference_mode()
def check_gpt2(gpt2: GPT2, tokenizer: Tokenizer, text="A photo of a man riding a"):
    """Print the five most likely tokens after a text."""
    logits = gpt2(torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]]))
    print_top5(logits[0, -1], lambda token: text + tokenizer.decode([token]))


def print_top5(logits, label):
    for probability, index in zip(*(values.tolist() for values in logits.softmax(-1).topk(5))):
        print(f"{label(index)} {probability:8.2%}")


def convert(settings: ConvertConfig):
    if settings.check:
        load_image(settings.check)                          # rather fail now than after the work
    dtype = cli.pick_dtype(settings.dtype)
    if settings.vision_gpt:
        convert_published(settings, dtype)
    elif settings.checkpoint:
        convert_checkpoint(settings, dtype)
    else:
        convert_backbones(settings, dtype)


def convert_backbones(settings, dtype):
    vit_path, gpt2_path, out = settings.vit, settings.gpt2, Path(settings.out or "weights")
    if not (vit_path or gpt2_path):
        vit_path, gpt2_path, _ = (download_file(url, Path("downloads") / name, digest)
                                  for name, (url, digest) in DOWNLOADS.items())
    if vit_path:
        vit, fmt = load_vit(local_or_hub(vit_path), settings.heads)
        write_backbone("vit", vit, fmt, out, dtype)
        if settings.check:
            check_vit(vit, settings.check)
    if gpt2_path:
        gpt2_path = local_or_hub(gpt2_path)
        gpt2, fmt = load_gpt2(gpt2_path, settings.heads)
        size = gpt2.config.vocab_size
        tokenizer = find_tokenizer(size, gpt2_path)
        held = Tokenizer.load(out) if (out / "tokenizer.json").exists() else None
        if held and (held.vocab_size != size or tokenizer and held.ranks != tokenizer.ranks):
            refuse_existing(out, "tokenizer.json")                   # another model's
        write_backbone("gpt2", gpt2, fmt, out, dtype)
        if tokenizer and not held:
            tokenizer.save(out)
            print(f"{out / 'tokenizer.json'}: GPT-2's, {tokenizer.vocab_size} tokens")
        if settings.check and tokenizer:
            check_gpt2(gpt2, tokenizer)


def convert_published(settings, dtype):
    out = Path(settings.out or "weights/vision-gpt")
    refuse_existing(out, *CHECKPOINT_FILES)
    path = local_or_hub(settings.vision_gpt)
    path = path / "model_fp32" if (path / "model_fp32").is_dir() else path
    model, fmt = load_published(path, settings.heads)
    model.tokenizer = find_tokenizer(model.config.gpt2.vocab_size, path)
    model.save_pretrained(out, dtype, training=dict(
        photographs=True, source=settings.vision_gpt,
        note="trained on Flickr8k's train, val and test images together"))
    print_summary(model, fmt, out / "model.safetensors")
    if settings.check and model.tokenizer:
        print(model.caption(settings.check))


def convert_checkpoint(settings, dtype):
    folder = local_or_hub(settings.checkpoint)
    out = Path(settings.out or f"{folder.resolve()}-{str(dtype).removeprefix('torch.')}")
    refuse_existing(out, *CHECKPOINT_FILES)
    model = VisionGPT.from_pretrained(folder, device="cpu", weights=settings.weights)
    training = checkpoint.read_config(folder).get("training") or {}
    model.save_pretrained(out, dtype, training=training)
    print_summary(model, "trained Vision-GPT", out / "model.safetensors")
    scores = records.read_json(dict, file) if (file := folder / "metrics.json").exists() else {}
    cli.write_text(out / "README.md", model_card(asdict(model.config), training, scores), end="")
    if settings.check:
        print(model.caption(settings.check))


def find_tokenizer(vocab_size: int, path: Path) -> Tokenizer | None:
    """GPT-2's tokenizer from tables beside the weights, else as tiktoken finds it; None with a warning."""
    folder = path if path.is_dir() else path.parent
    tables = [file for place in (folder, folder / "tokenizer")
              for name in ("merges.txt", "vocab.bpe", "*.tiktoken") for file in sorted(place.glob(name))]
    try:
        if vocab_size != GPT2_VOCAB_SIZE:
            tables = []
            raise UserError(f"{vocab_size} tokens are not GPT-2's")
        return Tokenizer.gpt2(*tables[:1])
    except UserError as error:
        if tables:
            raise
        print(f"warning: no tokenizer.json is written: {error}", file=sys.stderr)
        return None


def refuse_existing(out, *names):
    """Raise UserError rather than replace or contradict a file in the folder to write."""
    if found := [out / name for name in names if (out / name).exists()]:
        raise UserError(f"{found[0]} is already there: name another folder with --out, or move it away")


def write_backbone(name, module, fmt, out, dtype):
    """Write `out`/`name`.safetensors with the hash of its float32 tensors, unless another model is there."""
    file, digest = out / f"{name}.safetensors", checkpoint.sha256(module.state_dict())
    try:
        same = checkpoint.read_metadata(file).get("sha256") == digest
    except UserError:                                                # missing, or not written by this program
        same = False
    if not same:
        refuse_existing(out, file.name)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save_module(module.to(dtype), file, sha256=digest)
    print_summary(module.float(), fmt, file, digest)


def print_summary(module, fmt, file, digest=None):
    sizes, digest = [p.numel() for p in module.parameters()], digest or checkpoint.sha256(module.state_dict())
    print(f"{file}: {fmt}, {len(sizes)} tensors, {sum(sizes):,} parameters, sha256 {digest}")


def main():
    convert(ConvertConfig(**cli.parse(ConvertConfig, __doc__)))


if __name__ == "__main__":
    cli.run(main)
