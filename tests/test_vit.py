"""The ViT against Hugging Face's ViT and CLIP on the same weights; every kind of picture Pillow opens."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lib.cli import UserError
from lib.images import load_image, normalize, preprocess, resize
from vit import ViT, ViTConfig, drop_patches

TINY = dict(image_size=32, patch_size=8, n_layer=2, n_head=4, n_embd=32, n_mlp=48)
HF = dict(image_size=32, patch_size=8, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
          intermediate_size=48)


def random_vit(**config):
    """A ViT whose every parameter, norms and biases too, is random: a swapped or forgotten one shows."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**TINY | config)).eval()
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return vit


def renamed(vit, table, drop=()):
    """Our parameters under another library's names; {i}: a block, [qkv]: thirds of a tensor."""
    theirs = {}
    for name, tensor in vit.state_dict().items():
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        *stem, kind = name.replace(f"blocks.{block}.", "blocks.{i}.").rsplit(".", 1)
        new = table.get(".".join([*stem, kind])) or f"{table['.'.join(stem)]}.{kind}"
        targets = [new.replace("[qkv]", letter) for letter in "qkv"] if "[qkv]" in new else [new]
        for target, part in zip(targets, tensor.chunk(len(targets))):
            theirs[target.replace("{i}", block)] = part
    return {name: tensor for name, tensor in theirs.items() if name not in drop}


@pytest.mark.parametrize("with_head, parameters", [(False, 85_798_656), (True, 86_567_656)])
def test_vit_parameter_count(with_head, parameters):
    with torch.device("meta"):
        vit = ViT(ViTConfig(n_class=1000 if with_head else 0))
    assert sum(p.numel() for p in vit.parameters()) == parameters


@pytest.mark.parametrize("activation, theirs", [("gelu", "gelu"), ("gelu_tanh", "gelu_new")])
def test_vit_features_equal_hugging_face(activation, theirs):
    transformers = pytest.importorskip("transformers")
    ours = random_vit(activation=activation)
    config = transformers.ViTConfig(**HF, hidden_act=theirs, layer_norm_eps=1e-6)
    vit = transformers.ViTModel(config, add_pooling_layer=False)
    layer = "layers.{i}."
    vit.load_state_dict(renamed(ours, {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed": "embeddings.patch_embeddings.projection", "norm": "layernorm",
        "blocks.{i}.norm1": layer + "layernorm_before", "blocks.{i}.norm2": layer + "layernorm_after",
        "blocks.{i}.attn.qkv": layer + "attention.[qkv]_proj",
        "blocks.{i}.attn.proj": layer + "attention.o_proj",
        "blocks.{i}.mlp.fc1": layer + "mlp.fc1", "blocks.{i}.mlp.fc2": layer + "mlp.fc2"}))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        difference = ours(images) - vit.eval()(images).last_hidden_state
    assert difference.shape == (3, 17, 32) and difference.abs().max() <= 1e-4


def test_vit_features_equal_hugging_face_clip():
    """CLIP: a norm before the blocks and none after, quick GELU, eps 1e-5, no bias in its patch embedding."""
    transformers = pytest.importorskip("transformers")
    ours = random_vit(activation="quick_gelu", pre_norm=True, final_norm=False, eps=1e-5)
    torch.nn.init.zeros_(ours.patch_embed.bias)
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF, hidden_act="quick_gelu"))
    layer = "encoder.layers.{i}."
    weights = renamed(ours, {
        "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm",
        "blocks.{i}.norm1": layer + "layer_norm1", "blocks.{i}.norm2": layer + "layer_norm2",
        "blocks.{i}.attn.qkv": layer + "self_attn.[qkv]_proj",
        "blocks.{i}.attn.proj": layer + "self_attn.out_proj",
        "blocks.{i}.mlp.fc1": layer + "mlp.fc1", "blocks.{i}.mlp.fc2": layer + "mlp.fc2"},
        drop=["embeddings.patch_embedding.bias"])
    theirs = clip.state_dict()
    weights = {name: t.reshape(theirs[name].shape) for name, t in weights.items()}
    unused = clip.load_state_dict(weights, strict=False)
    assert set(unused.missing_keys) == {"post_layernorm.weight", "post_layernorm.bias"}
    assert not unused.unexpected_keys
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (ours(images) - clip.eval()(images).last_hidden_state).abs().max() <= 1e-4


def test_patch_dropout_keeps_the_class_token_and_its_share_of_each_image():
    x = torch.arange(5 * 9.0).view(5, 9, 1).expand(-1, -1, 4)
    kept = drop_patches(x, 0.5)
    assert torch.equal(kept[:, 0], x[:, 0]) and kept.shape == (5, 5, 4)
    patches = [set(row[1:, 0].tolist()) for row in kept]
    assert all(len(own) == 4 and own <= set(row[1:, 0].tolist()) for own, row in zip(patches, x))
    assert len({tuple(sorted(p % 9 for p in own)) for own in patches}) > 1        # not the same for all
    model, images = random_vit(patch_dropout=0.75), torch.randn(2, 3, 32, 32)
    assert model.train()(images).shape == (2, 5, 32) and model.eval()(images).shape == (2, 17, 32)


def test_vit_classifies_from_the_class_token():
    vit = random_vit(n_class=5)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit.classify(images), vit.head(vit(images)[:, 0]))
    with pytest.raises(UserError, match="no classification head"):
        random_vit().classify(images)


def test_vit_refuses_pictures_of_another_size():
    with pytest.raises(UserError, match=r"\(1, 3, 16, 64\), but .* \(B, 3, 32, 32\)"):
        random_vit()(torch.zeros(1, 3, 16, 64))         # as many patches, but not their places


@pytest.mark.parametrize("wrong, message", [
    (dict(image_size=30), "30 is not a multiple of patch_size 8"),
    (dict(n_head=5), "32 cannot be split over 5 heads"),
    (dict(activation="relu"), "'relu'; known: gelu, ")])
def test_vit_config_names_what_does_not_fit(wrong, message):
    with pytest.raises(UserError, match=message):
        ViTConfig(**TINY | wrong)


# --------------------------------------------------------------------------------------------------
# pictures


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
    config = ViTConfig(**TINY | dict(image_size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    expected = ((np.asarray(resize(image, 16)) / 255 - (0.1, 0.2, 0.3)) / (0.4, 0.5, 0.6)).transpose(2, 0, 1)
    images = preprocess([image, image], config)
    assert images.dtype == torch.float32 and images.shape == (2, 3, 16, 16)
    assert np.abs(images[1].numpy() - expected).max() < 1e-6
    assert torch.equal(images[:1], normalize(torch.from_numpy(np.array(resize(image, 16)))[None], config))
