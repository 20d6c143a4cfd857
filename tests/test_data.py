"""A prepared set makes the round trip; batches, pictures and cached features are what they should be."""

import copy
import fcntl
import json
import math
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_model import TEXTS, tiny_model

from data import (
    CaptionSet,
    ImageInputs,
    augment,
    cached_features,
    collate,
    epoch_batches,
    read_pixels,
    to_device,
)
from lib import checkpoint, cli
from lib.cli import UserError
from lib.images import normalize, preprocess, resize
from lib.prepared_set import clean_caption, write_images, write_set
from tokenizer import Tokenizer
from vit import ViT, ViTConfig

WORDS = "a dog cat runs sleeps on the red sofa grass it's big man with ball".split()


def make_set(folder, images=14, size=24, seed=0, longest=20, **options):
    """A prepared set: captions of 1 to `longest` words, up to five an image, none of image 3, in mixed order.

    Returns pictures (N, S, S, 3) and {image: its source texts}.
    """
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (images, size, size, 3), np.uint8)
    pairs = []
    for place in range(5):
        for image in rng.permutation(images):
            if place < (0 if image == 3 else 1 + image % 5):
                text = " ".join(rng.choice(WORDS, rng.integers(1, longest + 1)))
                pairs.append((int(image), text + rng.choice([" .", "", " !"])))
    names = [f"{i}.jpg" for i in range(images)]
    splits = {"train": list(range(0, images - 5)), "val": list(range(images - 5, images - 1)),
              "test": [images - 1]}
    assert write_images(str(folder), iter(pictures)) == images
    tokenizer = options.pop("tokenizer", None) or Tokenizer.train([text for _, text in pairs], 280)
    write_set(str(folder), names, pairs, splits, tokenizer, {"image_size": size}, **options)
    return pictures, {i: [text for image, text in pairs if image == i] for i in range(images)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return str(folder), *make_set(folder)


# --------------------------------------------------------------------------------------------------
# the set on disk


def test_set_makes_the_round_trip(prepared):
    folder, pictures, texts = prepared
    data = CaptionSet(folder)
    assert np.array_equal(data.images, pictures) and not data.images.flags.writeable
    assert data.names[5] == "5.jpg" and data.image_ids == list(range(14))
    assert sorted(data.captions) == sorted(text for own in texts.values() for text in own)
    assert [data.references(i) for i in range(14)] == [texts[i] for i in range(14)]
    chosen = np.array([7, 2, 3, 4])
    decoded = [[data.tokenizer.decode(row.tolist()) for row in own] for own in data.caption_tokens(chosen)]
    assert decoded == [[clean_caption(t) for t in texts[i]] for i in chosen]
    lengths = [sum(1 + len(data.tokenizer.encode(clean_caption(t))) for t in texts[i]) for i in (7, 2, 4)]
    assert data.row_lengths(chosen[[0, 1, 3]]).tolist() == lengths


def test_split_leaves_out_images_without_captions(prepared):
    folder, _, texts = prepared
    assert CaptionSet(folder).split("train").tolist() == [0, 1, 2, 4, 5, 6, 7, 8] and not texts[3]
    data = CaptionSet(folder)
    data.splits["val"] = np.array([3])
    with pytest.raises(UserError, match="has no val images with captions"):
        data.split("val")


@pytest.mark.parametrize("clean", [True, False])
def test_another_tokenizer_encodes_the_captions_anew(clean, tmp_path):
    _, texts = make_set(tmp_path, clean=clean)
    other = Tokenizer.train(TEXTS, 270)
    data = CaptionSet(str(tmp_path), other)
    assert data.tokenizer is other and other.ranks != Tokenizer.load(tmp_path).ranks
    for image in range(14):
        wanted = [other.encode(clean_caption(t) if clean else t) for t in texts[image]]
        assert [row.tolist() for row in data.caption_tokens([image])[0]] == wanted
    own = CaptionSet(str(tmp_path), Tokenizer.load(tmp_path))            # equal ranks: the stored tokens
    assert np.array_equal(own.tokens, np.fromfile(tmp_path / "tokens.bin", np.uint16))
    assert own.tokenizer.decode(own.tokens[: own.offset[1]].tolist()) == (
        clean_caption(own.captions[0]) if clean else own.captions[0])


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("damage", [os.remove, cut, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["meta.json", "images.bin", "captions.json", "index.npz", "tokens.bin",
                                  "tokenizer.json"])
def test_damaged_set_is_one_line(name, damage, prepared, tmp_path):
    """Truncated pictures or an index cut short once ended in a traceback."""
    folder = shutil.copytree(prepared[0], tmp_path / "set")
    damage(folder / name)
    with pytest.raises(UserError) as caught:
        CaptionSet(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_two_sets_do_not_mix(prepared, tmp_path):
    make_set(tmp_path / "other", images=9)
    for name in ("images.bin", "captions.json", "index.npz", "tokens.bin"):
        folder = shutil.copytree(prepared[0], tmp_path / name)
        shutil.copy(tmp_path / "other" / name, folder)
        with pytest.raises(UserError, match="is damaged"):
            CaptionSet(str(folder))


@pytest.mark.parametrize("name, at, value", [
    ("offset", 0, 1), ("offset", 0, -1), ("offset", 3, 0), ("offset", 3, 10**6), ("offset", -1, 2**60),
    ("image", 0, -1), ("image", 0, 14), ("offset", ..., math.nan), ("image", ..., 0.5),
    ("offset", None, None)])
def test_an_index_that_points_nowhere_is_one_line(name, at, value, prepared, tmp_path):
    """Offsets and images out of range were accepted, or ended in a traceback."""
    folder = shutil.copytree(prepared[0], tmp_path / "set")
    with np.load(folder / "index.npz") as index:
        arrays = {key: index[key].copy() for key in index.files}
    if at is None:
        arrays[name] = arrays[name][:, None]
    elif at is ...:
        arrays[name] = arrays[name] + value
    else:
        arrays[name][at] = value
    np.savez(folder / "index.npz", **arrays)
    with pytest.raises(UserError, match="is damaged"):
        CaptionSet(str(folder))


@pytest.mark.parametrize("change, message", [
    (dict(images="x"), "images is 'x'"), (dict(image_ids=[1]), "another number of image_ids"),
    (dict(splits=dict(train=[0, 0], val=[], test=[])), "one twice"), (dict(format_version=9), "newer"),
    (dict(splits=dict(train=[99], val=[], test=[])), "not there"), (dict(extra=1), "unknown field 'extra'"),
    (dict(splits=dict(train=[0])), "splits lacks the field 'val'"),
    (dict(preprocessing=dict(image_size=10**9, clean_captions=True)), "image_size is 1000000000")])
def test_meta_json_is_not_taken_on_trust(change, message, prepared, tmp_path):
    folder = shutil.copytree(prepared[0], tmp_path / "set")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(UserError, match=message):
        CaptionSet(str(folder))


def test_missing_set_names_the_commands(tmp_path):
    with pytest.raises(UserError, match=r"not a prepared dataset.*prepare_flickr8k.py.*prepare_shapes.py"):
        CaptionSet(str(tmp_path / "none"))


# --------------------------------------------------------------------------------------------------
# batches


def lengths_alone(count):
    lengths = np.random.default_rng(0).integers(5, 40, count)
    return lengths, SimpleNamespace(row_lengths=lambda images: lengths[images])


def test_batches_hold_every_image_once_in_an_order_of_seed_and_epoch_alone():
    _, data = lengths_alone(500)
    images, orders = np.arange(100, 500), {}
    for seed in (1, 2):
        for epoch in (0, 1):
            parts = epoch_batches(data, images, 3, seed, epoch)
            assert sorted(map(len, parts)) == [1] + [3] * 133
            assert sorted(np.concatenate(parts)) == images.tolist()
            orders[seed, epoch] = [part.tolist() for part in parts]
            epoch_batches(data, images, 3, 5, 5)                                     # nothing is carried on
            again = epoch_batches(data, images, 3, seed, epoch)
            assert [part.tolist() for part in again] == orders[seed, epoch]
    assert [len(part) for part in epoch_batches(data, images[:10], 4, 0, 0, at_least=3)].count(6) == 1
    pairs = {frozenset(part) for order in orders.values() for part in order}
    assert len(pairs) > 4 * 130                                                # the company changes too


def test_batches_pad_little_and_come_in_no_order_of_length():
    lengths, data = lengths_alone(2000)
    parts = epoch_batches(data, np.arange(2000), 32, 0, 0)
    padded = sum(len(part) * lengths[part].max() for part in parts)
    assert padded < 1.1 * lengths.sum()
    shuffled = np.array_split(np.random.default_rng(1).permutation(2000), 63)
    assert sum(len(part) * lengths[part].max() for part in shuffled) > 1.5 * lengths.sum()
    tops = np.array([lengths[part].max() for part in parts])
    assert abs(np.corrcoef(tops[1:], tops[:-1])[0, 1]) < 0.3


def test_collate_packs_the_captions_of_an_image_into_a_row(prepared):
    folder, _, texts = prepared
    data, images = CaptionSet(folder), np.array([6, 1, 4])
    batch = collate(data, images, lambda images, rng: {"pixels": images})
    end, lengths = data.tokenizer.eos_id, data.row_lengths(images)
    assert batch["pixels"] is images
    assert batch["tokens"].shape == batch["targets"].shape == batch["positions"].shape == (
        3, -(-lengths.max() // 4) * 4)
    for image, length, *row in zip(images, lengths, batch["tokens"], batch["targets"], batch["positions"]):
        captions = [data.tokenizer.encode(clean_caption(text)) for text in texts[image]]
        tokens, targets, positions = (part.tolist() for part in row)
        assert tokens[:length] == [t for ids in captions for t in [end, *ids]]
        assert targets[:length] == [t for ids in captions for t in [*ids, end]]
        assert positions[:length] == [t for ids in captions for t in range(len(ids) + 1)]
        padding = len(tokens) - length
        assert (tokens[length:], targets[length:], positions[length:]) == (
            [end] * padding, [-100] * padding, [0] * padding)
    assert batch["count"] == lengths.sum() and batch["captions"] == sum(len(texts[i]) for i in images)


def test_collate_draws_so_many_captions_of_each_image(prepared):
    data = CaptionSet(prepared[0])
    images = np.array([4, 9, 1])
    every = [set(map(tuple, own)) for own in data.caption_tokens(images)]
    drawn = set()
    for seed in range(50):
        rows = data.caption_tokens(images, 1, np.random.default_rng(seed))
        assert [len(own) for own in rows] == [1, 1, 1]
        assert all(tuple(own[0]) in all_of_it for own, all_of_it in zip(rows, every))
        drawn.add(tuple(rows[0][0]))
    assert drawn == every[0] and len(drawn) > 1
    assert [len(own) for own in data.caption_tokens(images, 100, np.random.default_rng(0))] == \
        [len(own) for own in data.caption_tokens(images)]


def test_load_ahead_keeps_order_and_passes_errors_on():
    assert list(cli.load_ahead(lambda n: n * n, range(5))) == [0, 1, 4, 9, 16]
    assert list(cli.load_ahead(None, range(0))) == []

    def fail(n):
        if n == 2:
            raise UserError("no more")
        return n
    seen = []
    with pytest.raises(UserError, match="no more"):
        for n in cli.load_ahead(fail, range(4)):
            seen.append(n)
    assert seen == [0, 1]


# --------------------------------------------------------------------------------------------------
# pictures


def test_augment_crops_inside_and_flips():
    """Pictures whose red is x and green is y tell which part of them is seen, and which way round."""
    S, B = 64, 300
    pixels = np.zeros((B, S, S, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 4 * np.arange(S)[None, :], 4 * np.arange(S)[:, None]
    out = augment(pixels, 32, np.random.default_rng(3))
    assert out.shape == (B, 32, 32, 3) and out.dtype == torch.uint8
    assert torch.equal(out, augment(pixels, 32, np.random.default_rng(3)))
    assert not torch.equal(out, augment(pixels, 32, np.random.default_rng(4)))
    x, y = out[:, 16, :, 0].float() / 4, out[:, :, 16, 1].float() / 4   # where each column and row lies
    flipped = x[:, -1] < x[:, 0]
    assert 0.4 < flipped.float().mean() < 0.6
    x = torch.where(flipped[:, None], x.flip(1), x)
    assert (x.diff() >= 0).all() and (y.diff() >= 0).all()                     # upright, the parts in place
    wide, high = ((v[:, 28] - v[:, 3]) * 32 / 25 / S for v in (x, y))          # the borders are clamped
    assert 0.45 < (wide * high).min() < 0.6 and 0.85 < (wide * high).max() < 1.05
    assert (wide / high).min() > 0.7 and (wide / high).max() < 1.45
    assert x[:, 0].max() > 10 and y[:, 0].max() > 10 and x[:, 0].min() < 1     # not always the same corner


def test_read_pixels_gives_what_a_captioner_sees(prepared, tmp_path):
    data = CaptionSet(prepared[0])
    images = np.array([4, 1])
    assert np.array_equal(read_pixels(data, images, 24), data.images[images])
    small = read_pixels(data, images, 16)
    assert small.shape == (2, 16, 16, 3) and small.dtype == torch.uint8
    Image.fromarray(data.images[4]).save(tmp_path / "4.png")
    config = ViTConfig(image_size=16, patch_size=8)
    assert torch.equal(normalize(small, config)[:1], preprocess([tmp_path / "4.png"], config))


def inputs_of(data, model, **changes):
    cfg = SimpleNamespace(**{"blind": False, "augment": False, "train": "fusion", **changes})
    return ImageInputs(model, data, cfg, torch.device("cpu"), torch.float32)


def test_inputs_are_pixels_crops_features_or_nothing(prepared):
    data, model, images = CaptionSet(prepared[0]), tiny_model(), np.array([5, 0, 13])
    plain = normalize(read_pixels(data, images, 16), model.config.vit)

    def seen(inputs, *args):
        return to_device(inputs(images, *args), torch.device("cpu"), model.config.vit)["images"]

    assert torch.equal(seen(inputs_of(data, model, train="all"), np.random.default_rng(0)), plain)
    blind = seen(inputs_of(data, model, blind=True))
    assert blind.shape == plain.shape and not blind.any()
    crops = inputs_of(data, model, augment=True)
    assert torch.equal(seen(crops), plain)                                      # in validation
    one, again = (seen(crops, np.random.default_rng(1)) for _ in range(2))
    assert torch.equal(one, again) and one.shape == plain.shape and not torch.allclose(one, plain, atol=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = inputs_of(data, model)(images)["features"]
    assert features.dtype == torch.float16
    with torch.no_grad():
        assert torch.allclose(features.float(), model.vit(plain)[:, 1:], rtol=1e-3, atol=1e-4)


def test_features_and_pixels_give_the_same_loss(prepared):
    data = CaptionSet(prepared[0], Tokenizer.train(TEXTS, 300))
    model, images = tiny_model(tokenizer=data.tokenizer, std=1.0), data.split("train")
    losses = []
    for choice in ("fusion", "all"):
        batch = collate(data, images, inputs_of(data, model, train=choice))
        assert ("features" in batch) == (choice == "fusion")
        batch = to_device(batch, torch.device("cpu"), model.config.vit)
        visual = model.encode(images=batch.get("images"), features=batch.get("features"))
        for seen in (visual, visual.flip(0)):
            losses.append(model.loss(batch["tokens"], seen, batch["targets"], batch["positions"]).item())
    assert losses[:2] == pytest.approx(losses[2:], rel=3e-5)
    assert abs(losses[2] / losses[3] - 1) > 1e-4                               # who sees what matters more


# --------------------------------------------------------------------------------------------------
# the cache of features


@pytest.fixture
def eye(prepared, tmp_path):
    """A set of its own, a tiny ViT, and `compute(**changes)`, which gives the features and their file."""
    folder = shutil.copytree(prepared[0], tmp_path / "set", ignore=shutil.ignore_patterns("features-*"))
    vit = tiny_model().vit

    def compute(vit=vit, dtype=torch.float32, batch_size=4):
        before = set(folder.glob("features-*"))
        digest, data = checkpoint.sha256(vit.state_dict()), CaptionSet(str(folder))
        vit = copy.deepcopy(vit).to(dtype)
        features = cached_features(vit, data, digest, torch.device("cpu"), dtype, batch_size)
        return np.array(features), [p for p in folder.glob("features-*") if p not in before]

    return SimpleNamespace(folder=folder, vit=vit, compute=compute)


def test_features_are_those_of_a_forward_pass(eye):
    features, (file,) = eye.compute()
    pictures = CaptionSet(str(eye.folder)).images
    pixels = torch.stack([torch.from_numpy(np.array(resize(Image.fromarray(p), 16))) for p in pictures])
    with torch.no_grad():
        wanted = eye.vit(normalize(pixels, eye.vit.config))[:, 1:]
    assert features.shape == (14, 4, 12) and features.dtype == np.float16
    assert np.abs(features - wanted.numpy()).max() <= wanted.abs().max() * 2**-11 + 1e-6    # half an ulp
    assert file.stat().st_size == 14 * (4 * 12 * 2 + 8) and not list(eye.folder.glob("*.partial"))


def test_features_are_computed_once_and_anew_when_anything_changed(eye):
    """Heads, eps and activation are no weights, and yet change the features."""
    first, files = eye.compute()
    names = {files[0].name}
    written = files[0].stat()
    assert np.array_equal(eye.compute()[0], first) and files[0].stat() == written      # read, not computed
    for change in ("weight", "n_head", "eps", "activation", "mean", "dtype", "picture"):
        vit, dtype = eye.vit, torch.float32
        if change == "weight":
            vit = tiny_model(seed=1).vit
        elif change == "picture":
            with open(eye.folder / "images.bin", "r+b") as file:
                file.write(bytes(600))
        elif change == "dtype":
            dtype = torch.bfloat16
        else:
            value = {"n_head": 3, "eps": 1e-2, "activation": "quick_gelu", "mean": (0, 0, 0)}[change]
            settings = {k: getattr(eye.vit.config, k) for k in eye.vit.config.__dataclass_fields__}
            vit = ViT(ViTConfig(**{**settings, change: value})).eval()
            vit.load_state_dict(eye.vit.state_dict())
        features, files = eye.compute(vit, dtype)
        assert len(files) == 1 and files[0].name not in names, change
        names.add(files[0].name)
        assert not np.array_equal(features, first), change


@pytest.mark.parametrize("damage", ["zeros", "a hole", "cut", "longer", "one byte", "empty", "sums"])
def test_damaged_features_are_computed_anew(damage, eye):
    """A cache of zeros, or a part of one, was trained on."""
    whole, (file,) = eye.compute()
    content = file.read_bytes()
    file.write_bytes({"zeros": bytes(len(content)), "a hole": content[:96] + bytes(96) + content[192:],
                      "cut": content[:-96], "longer": content + b"x", "one byte": b"x" + content[1:],
                      "empty": b"", "sums": content[:-8] + bytes(8)}[damage])
    assert np.array_equal(eye.compute()[0], whole) and file.read_bytes() == content


def test_interrupted_features_are_gone_on_from(eye):
    whole, (file,) = eye.compute()
    batch = 4 * 4 * 12 * 2                                                 # bytes of four images
    content = file.read_bytes()
    partial = Path(f"{file}.partial")
    for length in (0, 1, batch - 1, batch, 2 * batch + batch // 2 + 1, len(content)):
        file.unlink()
        partial.write_bytes(content[:length])
        assert np.array_equal(eye.compute()[0], whole)
        assert file.read_bytes() == content and not partial.exists()
    file.unlink()
    partial.write_bytes(bytes(2 * batch + batch // 2))         # as a file system may after a crash
    assert np.array_equal(eye.compute()[0], whole)
    partial.write_bytes(b"\1" * (2 * batch + 1))                # to see what is taken over: a batch
    file.unlink()
    features, _ = eye.compute()
    assert (features[:4] == features[0, 0, 0]).all() and np.array_equal(features[4:], whole[4:])


def test_features_survive_an_error_and_never_run_twice_at_once(eye):
    class Tired(torch.nn.Module):
        config, calls = eye.vit.config, 0

        def forward(self, images):
            Tired.calls += 1
            if Tired.calls == 3:
                raise KeyboardInterrupt
            return eye.vit(images)

    data = CaptionSet(str(eye.folder))
    arguments = data, checkpoint.sha256(eye.vit.state_dict()), torch.device("cpu"), torch.float32, 4
    with pytest.raises(KeyboardInterrupt):
        cached_features(Tired(), *arguments)
    (partial,) = eye.folder.glob("*.partial")
    assert partial.stat().st_size == 8 * 4 * 12 * 2
    with open(partial, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing"):
            eye.compute()
    assert np.array_equal(cached_features(eye.vit, *arguments), cached_features(Tired(), *arguments))
    assert Tired.calls == 3                                                # the second read the file


def test_features_that_overflow_are_an_error(eye):
    with torch.no_grad():
        eye.vit.norm.weight.fill_(1e6)
    with pytest.raises(UserError, match="overflow float16"):
        eye.compute()
    assert [p.suffix for p in eye.folder.glob("features-*")] == [".partial"]
