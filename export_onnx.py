"""Write a checkpoint as two ONNX files, which run without PyTorch: in browsers, on phones, anywhere.

    pip install onnx onnxscript onnxruntime
    python export_onnx.py                                 # the model that sample.py chooses -> web/model
    python export_onnx.py --checkpoint out/flickr8k --out onnx

    encoder.onnx    pixels (1, S, S, 3) uint8 -> visual (X, 2, 1, H, L, D): keys and values of the visual
                    tokens for each of the X cross-attentions
    decoder.onnx    token (R, 1) int64 of R texts about the picture, cache (N, 2, R, H, T, D), visual ->
                    logits (R, V) and new_cache, of T + 1 positions; T is 0 at the start token
    config.json     image_size, the sizes above, the start and end token `eos_id`, n_positions
    tokenizer.json  as in a checkpoint: the bytes of token i are base64 in ranks[i]

Pictures are squashed to S x S with Pillow's bilinear filter. At the end the files are run with onnxruntime:
its greedy captions of the example pictures must equal PyTorch's.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lib import checkpoint, cli
from lib.cli import UserError, flag
from lib.images import load_image, normalize, resize
from lib.picture_sources import find_pictures
from model import VisionGPT
from sample import EXAMPLES


@dataclass
class ExportConfig:
    checkpoint: str | None = flag(None, "checkpoint folder; default: the one that sample.py would choose",
                                  metavar="DIR")
    weights: str | None = flag(None, "another folder to look for the frozen backbones in", metavar="DIR")
    out: str = flag("web/model", "folder to write", metavar="DIR")


class Encoder(nn.Module):
    """Pixels (1, S, S, 3) uint8 -> visual (X, 2, 1, H, L, D)."""

    def __init__(self, model: VisionGPT):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        visual = self.model.encode(normalize(pixels, self.model.config.vit))
        return torch.stack(list(self.model.cross_kv(visual).values()))


class Decoder(nn.Module):
    """One step: token (R, 1), cache (N, 2, R, H, T, D), visual -> logits (R, V), cache of T + 1."""

    def __init__(self, model: VisionGPT):
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, cache: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        held = GrowingCache(cache)
        x = self.model.hidden(token, dict(zip(self.model.xattn, visual)), cache=held)
        return self.model.gpt2.logits(x[:, -1]), torch.stack(held.layers)


class GrowingCache:
    """What gpt2.KVCache offers, without writing into what was given."""

    def __init__(self, cache: Tensor):
        self.past, self.length, self.layers = cache, cache.shape[4], []

    def append(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        self.layers.append(torch.cat([self.past[layer], torch.stack([k, v])], dim=3))
        return self.layers[layer]


@torch.no_grad()
def export(model: VisionGPT, folder: Path) -> None:
    """Write the four files. Raises UserError when a package is missing."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("this needs three more packages: pip install onnx onnxscript onnxruntime") from None
    gpt2 = model.config.gpt2
    # what a program that runs the files must know
    c = dict(image_size=model.config.vit.image_size, n_layer=gpt2.n_layer, n_head=gpt2.n_head,
             head_width=gpt2.n_embd // gpt2.n_head, n_positions=gpt2.n_positions, eos_id=model.eos_id)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = torch.zeros(1, c["image_size"], c["image_size"], 3, dtype=torch.uint8)
    token = torch.zeros(2, 1, dtype=torch.long)                      # sizes of 2 and 3 are no constants below
    cache = torch.zeros(c["n_layer"], 2, 2, c["n_head"], 3, c["head_width"])
    R, T, encoder = torch.export.Dim("R"), torch.export.Dim("T", max=c["n_positions"] - 1), Encoder(model)
    for name, part, inputs, outputs, dynamic in (
        ("encoder", encoder, dict(pixels=pixels), ["visual"], None),
        ("decoder", Decoder(model), dict(token=token, cache=cache, visual=encoder(pixels)),
         ["logits", "new_cache"], dict(token={0: R}, cache={2: R, 4: T}, visual={})),
    ):
        with cli.atomic(folder / f"{name}.onnx") as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(part.eval(), kwargs=inputs, f=temporary, dynamo=True, dynamic_shapes=dynamic,
                              input_names=list(inputs), output_names=outputs, external_data=False,
                              verbose=False)
    model.require_tokenizer().save(folder)
    cli.write_text(folder / "config.json", json.dumps(c, indent=1))


class OnnxCaptioner:
    """The files with onnxruntime and numpy alone."""

    def __init__(self, folder: Path):
        import onnxruntime
        self.config = json.loads((folder / "config.json").read_text())
        self.encoder, self.decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx")
                                      for name in ("encoder", "decoder"))

    def caption(self, image, max_length: int = 50) -> list[int]:
        """A picture -> the tokens of its greedy caption."""
        c = self.config
        pixels = np.asarray(resize(load_image(image), c["image_size"]))[None]
        (visual,) = self.encoder.run(None, dict(pixels=pixels))
        cache = np.zeros((c["n_layer"], 2, 1, c["n_head"], 0, c["head_width"]), np.float32)
        tokens = [c["eos_id"]]
        while len(tokens) <= max_length:
            step = dict(token=np.array([tokens[-1:]]), cache=cache, visual=visual)
            logits, cache = self.decoder.run(None, step)
            tokens.append(int(logits[0].argmax()))
            if tokens[-1] == c["eos_id"]:
                break
        return [token for token in tokens if token != c["eos_id"]]


def check(model: VisionGPT, folder: Path, pictures: list[str]) -> None:
    """Raise UserError unless onnxruntime captions the pictures as PyTorch does."""
    exported = OnnxCaptioner(folder)
    for picture in pictures:
        expected, found = model.caption(picture), model.tokenizer.decode(exported.caption(picture)).strip()
        print(f"{picture}\t{found}")
        if found != expected:
            raise UserError(f"PyTorch captions it differently ({expected}): do not use {folder}")


def main(args: list[str] | None = None) -> None:
    config = ExportConfig(**cli.parse(ExportConfig, __doc__, args))
    folder, out = checkpoint.find_checkpoint(config.checkpoint), Path(config.out)
    if (out / "model.safetensors").exists() or (out / "fusion.safetensors").exists():
        raise UserError(f"--out {out} is a checkpoint: name another folder")
    model = VisionGPT.from_pretrained(folder, "cpu", torch.float32, config.weights)
    export(model, out)
    check(model, out, find_pictures([cli.relative(EXAMPLES)])[0])
    print(f"wrote {out}, {sum(file.stat().st_size for file in out.glob('*.onnx')) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
