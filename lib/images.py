"""Pictures: the one way from a file to the ViT's input, for preparing, training and captioning."""

import contextlib
import ctypes
import importlib.util
import io
import logging
import math
import os
import struct
import threading
import warnings
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from lib import records
from lib.cli import UserError, printable

# What is read from others, and how much of it. Decoding takes up to 17 bytes per pixel: all the pictures that
# are being decoded at the same time take 1.1 GB at most.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]     # with MPO; not PostScript, which is a program
FORMATS += ["AVIF"] * bool(importlib.util.find_spec("PIL.AvifImagePlugin"))         # Pillow has it since 11.3
SUFFIXES = {".jpg", ".jpeg", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
MAX_IMAGE_BYTES = 128 << 20
MAX_PIXELS = 64_000_000                       # of a JPEG once scaled; before, Pillow takes 179 million
EXACT_PIXELS = 16_000_000                     # JPEGs with more are decoded at 1/2, 1/4 or 1/8 of their size

UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,               # by orientation
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
           7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError)
warnings.filterwarnings("ignore", module=r"PIL\.")      # the error alone is the one line per picture
logging.getLogger("PIL").addHandler(logging.NullHandler())
with contextlib.suppress(OSError, AttributeError):      # of libtiff, unless it is a part of Pillow's own file
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
Image.core.set_block_size(256 << 20)                    # so large that freed pictures go back to the system

_decoding, _turn = 0, threading.Condition()             # pixels


def load_image(source: str | os.PathLike | BinaryIO | Image.Image, size: int | None = None) -> Image.Image:
    """A path, an open file or a PIL image -> an upright RGB PIL image: first frame, transparency over white.

    With `size` it is squashed to (size, size) at once. Raises UserError when the picture cannot be read, is
    too large, or is not in one of FORMATS.
    """
    name = f" {printable(os.fspath(source))}" if isinstance(source, (str, os.PathLike)) else ""
    try:
        image = source
        if not isinstance(source, Image.Image):
            file = io.BytesIO(records.read_bytes(source, MAX_IMAGE_BYTES)) if name else source
            image = Image.open(file, formats=FORMATS)
        with memory(shrink_jpeg(image)):
            image = upright(image)                            # what was `image` is freed each time
            if image.mode.startswith("I;16") or image.mode in ("I", "F"):
                image = to_8_bits(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            return resize(image, size) if size else image
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        reason = "it is not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF picture"
    except DAMAGE as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else printable(str(error))
    raise UserError(f"cannot read the picture{name}: {reason}")


def shrink_jpeg(image: Image.Image) -> int:
    """Have a huge JPEG decoded at a fraction of its size; returns for how many pixels memory is needed."""
    width, height = image.size
    shrink = math.ceil(math.sqrt(width * height / EXACT_PIXELS))
    if image.format in ("JPEG", "MPO") and shrink > 1:
        image.draft(None, (width // shrink, height // shrink))        # at least of this size
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(f"it has {pixels // 10**6} megapixels; the limit is {MAX_PIXELS // 10**6}")
    return min(max(pixels, width * height // 3), MAX_PIXELS)          # a progressive JPEG is held whole


@contextlib.contextmanager
def memory(pixels: int):
    """Wait until so many pixels can be decoded beside those of other threads."""
    global _decoding
    with _turn:
        _turn.wait_for(lambda: _decoding + pixels <= MAX_PIXELS)
        _decoding += pixels
    try:
        yield
    finally:
        with _turn:
            _decoding -= pixels
            _turn.notify_all()


def upright(image: Image.Image) -> Image.Image:
    """The picture, decoded, as it should be looked at."""
    try:
        image.load()
    except (TypeError, IndexError, struct.error) as error:    # its numbers make no sense to Pillow
        raise ValueError(f"damaged ({error})") from None
    orientation = None
    with contextlib.suppress(*DAMAGE, TypeError, LookupError, struct.error):     # of its Exif data alone
        orientation = image.getexif().get(0x0112)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def to_8_bits(image: Image.Image) -> Image.Image:
    """Integers of more bits, which Pillow's convert() would clip, or floats, which may range from 0 to 1."""
    levels = np.nan_to_num(np.array(image, dtype=np.float32), copy=False, posinf=0).clip(0)
    top = levels.max(initial=0)
    if image.mode != "F" or not 0 < top <= 1:
        top = 255 if top <= 255 else max(65535, top)
    levels /= top
    levels *= 255
    return Image.fromarray(levels.round(out=levels).astype(np.uint8))


def resize(image: Image.Image, size: int) -> Image.Image:
    """Squash a PIL image to (size, size) with Pillow's bilinear filter, whatever its aspect ratio."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def normalize(pixels: torch.Tensor, config) -> torch.Tensor:
    """uint8 pixels (B, S, S, 3) -> the ViT's input (B, 3, S, S), float32, on the same device."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (config.mean, config.std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def preprocess(images: list, config) -> torch.Tensor:
    """Paths, open files or PIL images -> (B, 3, S, S) float32 on the CPU. Raises what `load_image` does."""
    pixels = [np.array(load_image(image, config.image_size)) for image in images]
    return normalize(torch.from_numpy(np.stack(pixels)), config)
