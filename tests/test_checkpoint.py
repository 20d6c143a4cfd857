"""Checkpoints: what is written is read back, frozen backbones are found and checked, damage is one line."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_model import captioner, tiny_model

from gpt2 import GPT2
from lib import checkpoint
from lib.cli import UserError
from model import VisionGPT
from vit import ViT

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def save_backbones(model, folder, dtype=None):
    """The frozen parts as convert_weights.py writes them -> {"vit": file, "gpt2": file}."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in ("vit", "gpt2"):
        module, files[name] = getattr(model, name), folder / f"{name}.safetensors"
        digest = checkpoint.sha256(module.state_dict())
        tensors = {key: t.to(dtype or t.dtype) for key, t in module.state_dict().items()}
        checkpoint.save_module(module, files[name], sha256=digest)
        checkpoint.write_tensors(files[name], tensors, **checkpoint.read_metadata(files[name]))
    return files


def test_weights_get_the_permissions_of_any_other_file(tmp_path):
    """safetensors writes files that nobody else may read."""
    (tmp_path / "plain").touch()
    checkpoint.write_tensors(tmp_path / "weights", {"a": torch.zeros(2)})
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A fusion checkpoint out/run with its backbones in weights/, in an empty current folder; the model."""
    monkeypatch.chdir(tmp_path)
    model = captioner()
    model.save_pretrained("out/run", backbones=save_backbones(model, tmp_path / "weights"))
    return model


def same(model, other, dtype=torch.float32):
    """Same parameters, after those of `other` have been rounded to `dtype`."""
    theirs = other.state_dict()
    return model.state_dict().keys() == theirs.keys() and all(
        torch.equal(p.float(), theirs[name].to(dtype).float()) for name, p in model.state_dict().items())


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", [None, *DTYPES])
def test_complete_checkpoint_makes_the_round_trip(stored, wanted, tmp_path):
    model = captioner()
    model.save_pretrained(tmp_path / "run", dtype=stored, training={"steps": 3})
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert {t.dtype for t in checkpoint.read_tensors(tmp_path / "run/model.safetensors").values()} == {stored}
    loaded = VisionGPT.from_pretrained(tmp_path / "run", device="cpu", dtype=wanted)
    assert {p.dtype for p in loaded.parameters()} == {wanted or torch.float32}     # none: float32 on the CPU
    assert same(loaded, captioner().to(stored).to(wanted or torch.float32)) and not loaded.training
    assert loaded.config == model.config and loaded.tokenizer.ranks == model.tokenizer.ranks
    assert not loaded.vit.cls_token.requires_grad and loaded.resampler.latents.requires_grad
    assert json.loads((tmp_path / "run/config.json").read_text())["training"] == {"steps": 3}
    if stored == torch.float32 and wanted is None:
        images = torch.randn(3, 3, 16, 16)
        assert loaded.generate(images, max_length=9) == model.generate(images, max_length=9)


@pytest.mark.parametrize("stored", DTYPES)
def test_fusion_checkpoint_holds_what_was_trained_alone(stored, tmp_path):
    model = captioner()
    files = save_backbones(model, tmp_path / "weights", dtype=torch.float16)
    model.save_pretrained(tmp_path / "run", dtype=stored, backbones=files)
    tensors = checkpoint.read_tensors(tmp_path / "run/fusion.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"resampler", "xattn"}
    assert {t.dtype for t in tensors.values()} == {stored}
    payload = sum(t.numel() * t.itemsize for t in tensors.values())
    assert payload < (tmp_path / "run/fusion.safetensors").stat().st_size < payload + 8000
    loaded = VisionGPT.from_pretrained(tmp_path / "run", device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert same(loaded.resampler, model.resampler, stored) and same(loaded.vit, model.vit, torch.float16)
    assert loaded.caption([]) == [] and loaded.generate(torch.randn(1, 3, 16, 16), max_length=3)
    backbones = json.loads((tmp_path / "run/config.json").read_text())["backbones"]
    assert backbones["vit"] == dict(file="vit.safetensors", path="../weights/vit.safetensors",
                                    sha256=checkpoint.sha256(model.vit.state_dict()))


@pytest.mark.gpu
@pytest.mark.parametrize("stored", DTYPES)
def test_on_a_gpu_the_dtype_is_that_of_the_stored_fusion(stored, tmp_path):
    """Of all parts, even where the backbones lie in another: the parts of one model share their dtype."""
    model = captioner()
    files = save_backbones(model, tmp_path / "weights")
    model.save_pretrained(tmp_path / "run", dtype=stored, backbones=files)
    loaded = VisionGPT.from_pretrained(tmp_path / "run", device="cuda")
    assert {p.dtype for p in loaded.parameters()} == {stored}
    assert loaded.generate(torch.randn(2, 3, 16, 16), max_length=5)


def test_a_loaded_model_trains_without_touching_its_file(trained):
    files = checkpoint.Path("out/run/fusion.safetensors"), checkpoint.Path("weights/vit.safetensors")
    before = [file.read_bytes() for file in files]
    model = VisionGPT.from_pretrained("out/run", device="cpu").freeze()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert [file.read_bytes() for file in files] == before
    model.save_pretrained("out/run", backbones=model.backbones)                # over the file that is open
    assert same(VisionGPT.from_pretrained("out/run", device="cpu").resampler, model.resampler)


@pytest.mark.parametrize("place, arguments", [
    ("weights", {}), ("elsewhere", dict(weights="elsewhere")), ("out/weights", {}), ("cwd/weights", {})])
def test_backbones_are_found(place, arguments, trained, tmp_path, monkeypatch):
    """At the recorded path, in --weights, in weights/ beside the checkpoint or in the current folder."""
    if place != "weights":
        shutil.move("weights", place if "cwd" not in place else tmp_path / "moved")
    if place == "cwd/weights":
        (tmp_path / "cwd").mkdir()
        shutil.move(tmp_path / "moved", tmp_path / "cwd/weights")
        monkeypatch.chdir(tmp_path / "cwd")
    assert same(VisionGPT.from_pretrained(tmp_path / "out/run", device="cpu", **arguments), trained)


def test_checkpoint_and_weights_may_move_together(trained, tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    for name in ("out", "weights"):
        shutil.move(name, tmp_path / "new" / name)
    monkeypatch.chdir("/")
    assert same(VisionGPT.from_pretrained(tmp_path / "new/out/run", device="cpu"), trained)


def test_missing_backbones_are_named_with_the_places_looked_at(trained):
    shutil.move("weights/vit.safetensors", "moved")
    message = "the vit weights of out/run are missing.*convert_weights.py.*--weights"
    with pytest.raises(UserError, match=message) as caught:
        VisionGPT.from_pretrained("out/run", weights="other")
    assert "other/vit.safetensors" in str(caught.value) and "out/weights/vit.safetensors" in str(caught.value)


def test_another_backbone_is_refused_and_the_right_one_found_behind_it(trained, tmp_path):
    shutil.move("weights", "right")
    save_backbones(captioner(seed=7), tmp_path / "weights")
    with pytest.raises(UserError, match="is not the vit that out/run was trained on"):
        VisionGPT.from_pretrained("out/run")
    assert same(VisionGPT.from_pretrained("out/run", device="cpu", weights="right"), trained)


def test_a_backbone_makes_the_round_trip_alone(trained):
    files = dict(vit="weights/vit.safetensors", gpt2="weights/gpt2.safetensors")
    vit, gpt2 = ViT.from_pretrained(files["vit"]), GPT2.from_pretrained(files["gpt2"])
    assert same(vit, trained.vit) and vit.config == trained.config.vit and not vit.training
    assert same(gpt2, trained.gpt2) and gpt2.config == trained.config.gpt2
    fresh = VisionGPT.from_backbones(files, trained.tokenizer)
    assert same(fresh.vit, trained.vit) and not fresh.gpt2.wte.weight.requires_grad
    assert not fresh.xattn["1"].out.weight.any()
    with pytest.raises(UserError, match="does not hold a GPT2"):
        GPT2.from_pretrained("weights/vit.safetensors")
    with pytest.raises(UserError, match="nowhere.safetensors does not exist"):
        ViT.from_pretrained("nowhere.safetensors")
    save_file({"a": torch.zeros(1)}, "foreign.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="written by another program"):
        ViT.from_pretrained("foreign.safetensors")
    checkpoint.write_tensors("newer.safetensors", vit.state_dict(), kind="ViT", config={"registers": 4})
    with pytest.raises(UserError, match="newer.safetensors has the unknown field 'registers'"):
        ViT.from_pretrained("newer.safetensors")


def test_the_hash_is_of_float32_values_and_names():
    state = tiny_model().vit.half().state_dict()
    digest = checkpoint.sha256(state)
    assert digest == checkpoint.sha256({name: t.float() for name, t in reversed(state.items())})
    assert digest != checkpoint.sha256(state | {"cls_token": state["cls_token"] + 1})


def test_loading_draws_no_initial_weights(trained):
    """They would take seconds for 222M parameters, only to be thrown away."""
    state = torch.get_rng_state()
    VisionGPT.from_pretrained("out/run")
    ViT.from_pretrained("weights/vit.safetensors")
    GPT2.from_pretrained("weights/gpt2.safetensors")
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_folder_the_newest_model_of_photographs_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path / "project")
    with pytest.raises(UserError, match="no checkpoint found"):
        VisionGPT.from_pretrained()
    model = captioner()
    runs = ["project/assets/mini", "weights/vision-gpt", "out/old", "out/new", "out/shapes", "out/other"]
    for age, folder in enumerate(runs):
        photographs = {"photographs": True} if folder in ("out/old", "out/new") else {"photographs": False}
        model.save_pretrained(folder, training=None if folder == "out/other" else photographs)
        os.utime(f"{folder}/config.json", (age, age))
        expected = {"out/shapes": "out/new", "out/other": "out/new"}.get(folder, folder)
        root = tmp_path if "mini" in folder else checkpoint.Path()
        assert checkpoint.find_checkpoint() == root / expected
    (tmp_path / "out/broken").mkdir()
    (tmp_path / "out/broken/config.json").write_text("{")
    assert checkpoint.find_checkpoint() == checkpoint.Path("out/new")
    assert same(VisionGPT.from_pretrained(device="cpu"), model)


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


def edit(**changes):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name, damage, message", [
    ("config.json", os.remove, "out/run is not a checkpoint folder"),
    ("config.json", truncate, "config.json is damaged"),
    ("config.json", lambda file: file.write_text("[]"), "config.json is a list"),
    ("config.json", lambda file: file.write_bytes(b"\xff\xff"), "config.json is damaged"),
    ("config.json", edit(format_version=2), "format 2, newer than the 1 known here"),
    ("config.json", edit(format_version="x"), "format_version is 'x'"),
    ("config.json", edit(model=None), "model is null, but must be an object"),
    ("config.json", edit(model={"colour": 1}), "config of out/run has the unknown field 'colour'"),
    ("config.json", edit(model={}), "config of out/run lacks the field 'vit'"),
    ("config.json", edit(backbones={"vit": {"path": 3}}), "backbones.vit lacks the field 'file'"),
    ("tokenizer.json", truncate, "tokenizer.json is damaged"),
    ("fusion.safetensors", os.remove, "fusion.safetensors does not exist"),
    ("fusion.safetensors", truncate, "fusion.safetensors is not a whole safetensors file"),
    ("fusion.safetensors", lambda file: file.write_bytes(b"\0" * 100), "is not a whole safetensors file"),
    ("fusion.safetensors", lambda file: file.write_bytes(b""), "is not a whole safetensors file"),
    ("fusion.safetensors", lambda file: shutil.copy("weights/vit.safetensors", file), "unknown blocks"),
    ("../../weights/gpt2.safetensors", truncate, "gpt2.safetensors is not a whole safetensors file")])
def test_a_damaged_checkpoint_is_one_line(name, damage, message, trained):
    damage(checkpoint.Path("out/run") / name)
    with pytest.raises(UserError, match=message) as caught:
        VisionGPT.from_pretrained("out/run")
    assert "\n" not in str(caught.value)


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["weights/vit.safetensors", "out/run/fusion.safetensors"])
def test_a_flipped_byte_is_noticed(name, trained):
    """One anywhere in the data gave other captions in silence, and one in the header another config."""
    file = checkpoint.Path(name)
    size = file.stat().st_size
    for at in [*range(0, size, size // 60), size - 1]:
        flip(file, at)
        with pytest.raises(UserError) as caught:
            checkpoint.read_tensors(file)
        assert "\n" not in str(caught.value)
        flip(file, at)
    assert same(VisionGPT.from_pretrained("out/run", device="cpu"), trained)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_values_that_are_none_are_neither_saved_nor_loaded(value, trained, tmp_path):
    tensors = {"a": torch.ones(3, 2), "b": torch.ones(3, 2)}
    tensors["b"][2, 1] = value
    with pytest.raises(UserError, match="cannot write .*: b holds NaN"):
        checkpoint.write_tensors(tmp_path / "file.safetensors", tensors)
    assert not list(tmp_path.glob("file*"))
    fusion = checkpoint.read_tensors("out/run/fusion.safetensors")
    fusion["resampler.latents"] = fusion["resampler.latents"] * value
    save_file(fusion, "out/run/fusion.safetensors")                    # as an older version, without checksum
    with pytest.raises(UserError, match="cannot use out/run/fusion.safetensors: resampler.latents holds NaN"):
        VisionGPT.from_pretrained("out/run")


def test_weights_from_before_the_checksum_load(trained):
    save_file(checkpoint.read_tensors("out/run/fusion.safetensors"), "out/run/fusion.safetensors")
    config = json.loads(checkpoint.Path("out/run/config.json").read_text())
    config["model"]["vit"]["patch_dropout"] = 0.5                      # a setting that is gone
    checkpoint.Path("out/run/config.json").write_text(json.dumps(config))
    assert same(VisionGPT.from_pretrained("out/run", device="cpu"), trained)


def test_what_is_no_file_and_no_weight_is_refused(trained):
    checkpoint.write_tensors("ints.safetensors", {"a": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(UserError, match="unsupported dtypes: a torch.int64"):
        checkpoint.load_strict(trained, checkpoint.read_tensors("ints.safetensors"), "ints")
    os.remove("out/run/fusion.safetensors")
    os.mkfifo("out/run/fusion.safetensors")                            # reading it would wait for ever
    with pytest.raises(UserError, match="fusion.safetensors is not a file"):
        VisionGPT.from_pretrained("out/run")
    os.remove("out/run/config.json")
    os.mkfifo("out/run/config.json")
    with pytest.raises(UserError, match="config.json"):
        VisionGPT.from_pretrained("out/run")


def test_a_model_that_does_not_fit_is_described(trained):
    tensors = trained.state_dict()
    wrong = {name: t for name, t in tensors.items() if name != "gpt2.ln_f.bias"} | {
        "extra": torch.zeros(1), "resampler.latents": torch.zeros(7, 16)}
    with pytest.raises(UserError) as caught:
        checkpoint.load_strict(trained, wrong, "a file")
    assert str(caught.value) == ("a file does not fit the model: missing gpt2.ln_f.bias; unknown extra; "
                                 "of another shape "
                                 "resampler.latents (7, 16) instead of (3, 16)")
