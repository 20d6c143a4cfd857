"""Pictures: every kind that Pillow opens, upright and over white, squashed as the ViT expects them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lib.cli import UserError
from lib.images import load_image, normalize, preprocess, resize
from vit import ViTConfig


def picture(mode, colour, transparency=None, palette=None):
    image = Image.new(mode, (6, 4), colour)
    if palette:
        image.putpalette(palette)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


PICTURES = {                                              # picture, file type, the RGB colour that it shows
    "1": (picture("1", 1), "png", (255, 255, 255)),
    "L": (picture("L", 100), "png", (100, 100, 100)),
    "L with a transparent level": (picture("L", 100, transparency=100), "png", (255, 255, 255)),
    "LA": (picture("LA", (0, 128)), "png", (127, 127, 127)),
    "RGB": (picture("RGB", (1, 2, 3)), "png", (1, 2, 3)),
    "RGB with a transparent colour": (picture("RGB", (1, 2, 3), (1, 2, 3)), "png", (255, 255, 255)),
    "RGBA": (picture("RGBA", (255, 0, 0, 128)), "png", (255, 127, 127)),
    "RGBA, nothing to be seen": (picture("RGBA", (9, 9, 9, 0)), "webp", (255, 255, 255)),
    "P": (picture("P", 1, palette=[0, 0, 0, 10, 20, 30]), "png", (10, 20, 30)),
    "P with a transparent colour": (picture("P", 1, 1, [0, 0, 0, 10, 20, 30]), "gif", (255, 255, 255)),
    "P with alphas": (picture("P", 1, b"\xff\x80", [0, 0, 0, 255, 0, 0]), "png", (255, 127, 127)),
    "CMYK": (picture("CMYK", (0, 255, 255, 0)), "tiff", (255, 0, 0)),
    "YCbCr": (picture("YCbCr", (128, 128, 128)), "tiff", (128, 128, 128)),
    "I;16": (picture("I;16", 257 * 128), "png", (128, 128, 128)),
    "I;16, its darkest 8 bits only": (picture("I;16", 200), "tiff", (200, 200, 200)),
    "I": (picture("I", 65535), "tiff", (255, 255, 255)),
    "F": (picture("F", 99.6), "tiff", (100, 100, 100)),
    "F, from 0 to 1": (picture("F", 0.9), "tiff", (255, 255, 255)),
    "F, black": (picture("F", 0.0), "tiff", (0, 0, 0)),
}


@pytest.mark.parametrize("image, kind, colour", PICTURES.values(), ids=PICTURES)
def test_load_image_of_every_mode(image, kind, colour, tmp_path):
    file = tmp_path / f"picture.{kind}"
    image.save(file)
    for source in (file, str(file), io.BytesIO(file.read_bytes()), image):
        loaded = load_image(source)
        assert loaded.mode == "RGB" and loaded.size == (6, 4)
        assert loaded.getcolors() == [(24, colour)], source


def test_load_image_takes_the_first_frame(tmp_path):
    red, blue = (Image.new("RGB", (5, 5), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "two.gif", save_all=True, append_images=[blue])
    assert load_image(tmp_path / "two.gif").getpixel((2, 2)) == (255, 0, 0)


def test_load_image_turns_upright(tmp_path):
    """A camera held upright stores the picture lying, and a tag that says so."""
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (16, 0, 32, 16))                          # the right half
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "lying.jpg", exif=exif, quality=95)
    upright = load_image(tmp_path / "lying.jpg")
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 2))[0] > 250 and upright.getpixel((8, 29))[2] > 250    # red above blue


@pytest.mark.parametrize("content, reason", [
    (None, "no such file"), (b"", "cannot identify"), (b"text", "cannot identify"), ("jpg", "truncated"),
    ("png", ""), ("gif", ""), ("webp", ""), ("folder", "directory")])
def test_load_image_says_in_one_line_what_it_cannot_read(content, reason, tmp_path):
    file = tmp_path / "a picture"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "folder":
        file.mkdir()
    elif content:                                                 # the first half of a file of that kind
        stream = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(stream, {"jpg": "jpeg"}.get(content, content))
        file.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    with pytest.raises(UserError, match=f"cannot read the picture .*a picture: .*{reason}") as caught:
        load_image(file)
    assert "\n" not in str(caught.value)


def test_load_image_refuses_a_decompression_bomb(monkeypatch, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(UserError, match="large.png"):
        load_image(tmp_path / "large.png")


def bilinear(pixels, size):
    """Pixels (H, ...) -> (size, ...): triangle filter, widened when the picture shrinks; rounded levels."""
    scale = len(pixels) / size
    width = max(scale, 1)
    centre = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(len(pixels)) + 0.5 - centre[:, None]) / width
    weight = np.clip(1 - distance, 0, None)
    weight /= weight.sum(1, keepdims=True)
    return np.round(np.tensordot(weight, pixels, 1))


@pytest.mark.parametrize("width, height", [(50, 37), (9, 80), (16, 16)])
def test_preprocess_equals_plain_numpy(width, height):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    squashed = bilinear(bilinear(pixels.swapaxes(0, 1), 16).swapaxes(0, 1), 16)          # (16, 16, 3)
    image = Image.fromarray(pixels)
    assert np.abs(np.asarray(resize(image, 16)) - squashed).max() <= 1
    config = ViTConfig(image_size=16, patch_size=8, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    expected = ((np.asarray(resize(image, 16)) / 255 - (0.1, 0.2, 0.3)) / (0.4, 0.5, 0.6)).transpose(2, 0, 1)
    images = preprocess([image, image], config)
    assert images.dtype == torch.float32 and images.shape == (2, 3, 16, 16)
    assert np.abs(images[1].numpy() - expected).max() < 1e-6
    assert torch.equal(images[:1], normalize(torch.from_numpy(np.array(resize(image, 16)))[None], config))
