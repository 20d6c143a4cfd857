"""Pictures: every kind that Pillow opens, upright and over white, squashed as the ViT expects them."""

import io
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lib import images
from lib.cli import UserError
from lib.images import load_image, normalize, preprocess, resize
from vit import ViTConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest overrides that of lib.images


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
    (None, "no such file"), (b"", "not a JPEG, PNG"), (b"text", "not a JPEG, PNG"), ("jpg", "truncated"),
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
    with pytest.raises(UserError, match=f"a picture.*{reason}") as caught:
        load_image(file)
    assert "\n" not in str(caught.value)


def test_load_image_opens_no_format_that_can_run_a_program(tmp_path):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    (tmp_path / "photo.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n")
    with pytest.raises(UserError, match="photo.jpg: it is not a JPEG, PNG, .* picture"):
        load_image(tmp_path / "photo.jpg")


@pytest.mark.parametrize("name, value", [("MAX_PIXELS", 1599), ("MAX_IMAGE_BYTES", 99)])
def test_load_image_has_limits(name, value, monkeypatch, tmp_path):
    smooth(40, 40).save(tmp_path / "large.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "small.png")
    monkeypatch.setattr(images, name, value)
    with pytest.raises(UserError, match="large.png.*(limit|not read)"):
        load_image(tmp_path / "large.png")
    assert load_image(tmp_path / "small.png").size == (1, 1)


def test_load_image_refuses_what_may_never_end(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for file in (tmp_path / "pipe.jpg", "/dev/zero"):
        with pytest.raises(UserError, match="a pipe or a device"):
            load_image(file)


def test_pictures_decoded_at_once_stay_within_the_limit(monkeypatch):
    stream, largest, together = io.BytesIO(), 0, threading.Lock()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 2 * 64)

    def upright(image):
        nonlocal largest
        with together:
            largest = max(largest, images._decoding)
        time.sleep(0.002)
        return image

    monkeypatch.setattr(images, "upright", upright)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: load_image(io.BytesIO(stream.getvalue())), range(32)))
    assert 64 <= largest <= 2 * 64 and images._decoding == 0


def smooth(width, height):
    x, y = np.linspace(0, 9, width), np.linspace(0, 7, height)[:, None]
    return Image.fromarray((np.stack([np.sin(x + y), np.cos(x * y / 5), np.sin(3 * x - y)], -1) * 120 + 128)
                           .astype(np.uint8))


@pytest.mark.parametrize("width, height, scale", [(800, 600, 2), (401, 401, 1), (900, 99, 1)])
def test_only_huge_jpegs_are_scaled_while_decoding_and_look_the_same(width, height, scale, monkeypatch):
    stream = io.BytesIO()
    smooth(width, height).save(stream, "JPEG", quality=95)
    exact = load_image(stream)
    assert exact.size == (width, height)
    monkeypatch.setattr(images, "EXACT_PIXELS", 401 * 401)
    scaled = load_image(stream)
    assert scaled.size == (width // scale, height // scale)
    difference = np.asarray(resize(scaled, 64)).astype(int) - np.asarray(resize(exact, 64))
    assert abs(difference).max() <= 3


@pytest.mark.parametrize("exif", [b"MM\0*\0\0\0\x08\0\x09", b"garbage", b"II*\0\xff\xff\xff\xff"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_garbage_in_the_exif_data_does_not_cost_the_picture(exif, form):
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (1, 2, 3)).save(stream, form, exif=b"Exif\0\0" + exif, lossless=True)
    assert load_image(stream).size == (6, 4)


def test_errors_name_no_objects_and_take_one_line(tmp_path):
    odd = tmp_path / os.fsdecode(b"two\nlines \xff.jpg")
    odd.write_bytes(b"text")
    for source in (odd, io.BytesIO(b"text")):
        with pytest.raises(UserError) as caught:
            load_image(source)
        assert str(caught.value).isprintable() and "object at" not in str(caught.value)
    assert repr(r"two\nlines \udcff.jpg")[1:-1] in repr(str(pytest.raises(UserError, load_image, odd).value))


def test_odd_pictures_print_nothing(tmp_path):
    """Warnings of Pillow and numpy, a logger's last resort and what libtiff writes to stderr by itself."""
    def save(image, form, **options):
        stream = io.BytesIO()
        image.save(stream, form, **options)
        return bytearray(stream.getvalue())

    fax = save(Image.new("1", (64, 64)), "TIFF", compression="group4")
    fax[8:20] = os.urandom(12)
    many = save(Image.new("RGB", (4, 4)), "TIFF")
    at = many.index(b"\x15\x01\x03\x00")                       # samples per pixel
    many[at + 8 : at + 10] = b"\xff\xff"
    floats = save(Image.fromarray(np.array([[np.nan, np.inf, 1e-45, 1]], np.float32)), "TIFF")
    avif = save(smooth(64, 64), "AVIF")
    for i, content in enumerate([fax, many, floats, avif[:200], save(smooth(9, 9), "MPO")[:-9]]):
        (tmp_path / f"{i}.jpg").write_bytes(content)
    code = """if True:
        import sys
        from lib.cli import UserError
        from lib.images import load_image
        for file in sys.argv[1:]:
            try:
                load_image(file)
            except UserError as error:
                assert file in str(error) and str(error).isprintable()
        """
    done = subprocess.run([sys.executable, "-W", "default", "-c", code, *map(str, tmp_path.iterdir())],
                          cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FORMS = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}),
         ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}), ("AVIF", {})]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(range(len(FORMS))), st.data())
def test_load_image_of_damaged_files_gives_a_picture_or_one_line(form, data):
    stream = io.BytesIO()
    smooth(24, 20).save(stream, FORMS[form][0], **FORMS[form][1])
    content = bytearray(stream.getvalue())
    where = st.integers(0, len(content) - 1) | st.integers(0, 99)
    for at, byte in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), max_size=8)):
        content[at] = byte
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    try:
        assert load_image(io.BytesIO(content)).mode == "RGB"
    except UserError as error:
        assert str(error).isprintable()


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
