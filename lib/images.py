"""Pictures: the one way from a file to the ViT's input, for preparing, training and captioning."""

import os
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from lib.cli import UserError


def load_image(source: str | os.PathLike | BinaryIO | Image.Image) -> Image.Image:
    """A path, an open file or a PIL image -> an upright RGB PIL image: first frame, transparency over white.

    Raises UserError when the picture cannot be read.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()                                          # reads the first frame, now and not later
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):   # Pillow's convert() would clip them
            levels = np.asarray(image, dtype=np.float32)
            top = levels.max(initial=0)
            if image.mode != "F" or not 0 < top <= 1:         # floats may range from 0 to 1
                top = 255 if top <= 255 else max(65535, top)
            image = Image.fromarray((levels.clip(0) * (255 / top)).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"cannot read the picture {source}: {reason}") from None


def resize(image: Image.Image, size: int) -> Image.Image:
    """Squash a PIL image to (size, size) with Pillow's bilinear filter, whatever its aspect ratio."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def normalize(pixels: torch.Tensor, config) -> torch.Tensor:
    """uint8 pixels (B, S, S, 3) -> the ViT's input (B, 3, S, S), float32, on the same device."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (config.mean, config.std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def preprocess(images: list, config) -> torch.Tensor:
    """Paths, open files or PIL images -> (B, 3, S, S) float32 on the CPU. Raises what `load_image` does."""
    pixels = [np.array(resize(load_image(image), config.image_size)) for image in images]
    return normalize(torch.from_numpy(np.stack(pixels)), config)
