"""sample.py: what is captioned, in which order, what is printed and written, where the model looked."""

import csv
import http.server
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import attention
import sample
from gpt2 import GPT2Config
from lib.cli import UserError
from model import VisionGPT, VisionGPTConfig
from resampler import ResamplerConfig
from tokenizer import Tokenizer
from vit import ViTConfig


@pytest.fixture(scope="module")
def model():
    """Random everywhere, so that its cross-attention matters; in eval mode."""
    tokenizer = Tokenizer.train(["a dog runs over the grass.", "two men on a bench"] * 9, 300)
    config = VisionGPTConfig(ViTConfig(32, 8, 2, 2, 32, 64), GPT2Config(tokenizer.vocab_size, 64, 4, 2, 32),
                             ResamplerConfig(8, 2, 2, 8, 16))
    model = VisionGPT(config, tokenizer).eval()
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Three pictures, one of them damaged, a text, a subfolder, and the model's checkpoint."""
    folder = tmp_path_factory.mktemp("sample")
    model.save_pretrained(folder / "checkpoint")
    pictures = folder / "photos"
    (pictures / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("img10.png", "img2.PNG", "below/img0.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(pictures / name)
    (pictures / "bad3.jpg").write_bytes(b"no picture")
    (pictures / "notes.txt").write_text("no picture either")
    return folder


@pytest.fixture
def run(folder, capsys):
    """run(arguments) -> exit status, stdout, stderr; `photos/` stands for the folder of pictures."""
    def run(*args):
        args = [str(a).replace("photos/", f"{folder}/photos/") for a in args]
        status = sample.main([*args, "--checkpoint", str(folder / "checkpoint"), "--max-length", "6"])
        out, err = capsys.readouterr()
        return status, out.replace(f"{folder}/photos/", ""), err
    return run


# --------------------------------------------------------------------------------------------------
# pictures


def test_pictures_come_in_natural_order():
    names = ["b/img1.png", "img10.png", "IMG2.png", "img1.png", "a10b2", "a10b10"]
    assert sorted(names, key=sample.natural) == ["a10b2", "a10b10", "b/img1.png", "img1.png", "IMG2.png",
                                                 "img10.png"]


def test_pictures_of_folders_patterns_and_names(folder, monkeypatch):
    monkeypatch.chdir(folder)
    in_folder = ["photos/bad3.jpg", "photos/img2.PNG", "photos/img10.png"]
    assert sample.find_pictures(["photos"]) == (in_folder, [])
    assert sample.find_pictures(["photos/*.png"]) == (["photos/img10.png"], [])
    assert sample.find_pictures(["photos/**/*.png"])[0] == ["photos/below/img0.png", "photos/img10.png"]
    as_named = ["-", "https://a.b/c", "photos/notes.txt"]
    assert sample.find_pictures(as_named[::-1]) == (as_named, [])
    assert sample.find_pictures(["photos/img10.png"] * 2)[0] == ["photos/img10.png"] * 2
    found, missing = sample.find_pictures(["nope.jpg", "no*.jpg", "checkpoint"])
    assert found == [] and [line.split(":")[0] for line in missing] == ["nope.jpg", "no*.jpg", "checkpoint"]


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path):
    (tmp_path / "[2024]").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "[2024]" / "a.png")
    assert len(sample.find_pictures([str(tmp_path / "[2024]")])[0]) == 1


def test_urls_are_fetched_and_their_errors_are_lines(folder, monkeypatch):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder / "photos"))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        picture = sample.load(f"{url}/img10.png", 32, draw=True)
        assert not picture.error and picture.pixels.size == (32, 32) and picture.shown.size == (448, 299)
        local = sample.load(str(folder / "photos/img10.png"), 32, draw=False)
        assert picture.pixels.tobytes() == local.pixels.tobytes() and local.shown is None
        for name, why in (("nope.png", "404"), ("notes.txt", "cannot identify")):
            error = sample.load(f"{url}/{name}", 32, draw=False).error
            assert f"{url}/{name}" in error and why in error and "\n" not in error and "BytesIO" not in error
        monkeypatch.setattr(sample, "LARGEST", 50)
        assert "more than" in sample.load(f"{url}/img10.png", 32, draw=False).error
        server.shutdown()
    assert sample.load(f"{url}/img10.png", 32, draw=False).error


# --------------------------------------------------------------------------------------------------
# command line


@pytest.mark.parametrize("args, message", [
    ([], "name a picture"),
    (["nope.jpg"], "nope.jpg: no such picture"),
    (["--json", "dog.jpg"], "is a picture"),
    (["dog.png", "--save", "dog.png"], "is a picture"),
    (["a.jpg", "--save", "grid"], "grid.png"),
    (["a.jpg", "--csv", "no/such/folder.csv"], "in none"),
    (["a.jpg", "--batch-size", "0"], "at least 1"),
    (["a.jpg", "--num-return-sequences", "2"], "num_beams"),
])
def test_mistakes_are_told_before_a_model_is_loaded(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "EXAMPLES", tmp_path / "none")
    with pytest.raises(UserError, match=message):
        sample.main([*args, "--checkpoint", "does-not-exist"])


def test_one_file_prints_the_bare_caption(run, model, folder):
    caption = model.caption(str(folder / "photos/img10.png"), max_length=6)
    status, out, err = run("photos/img10.png")
    assert (status, out, err) == (0, " ".join(caption.split()) + "\n", "")


def test_several_print_path_and_caption_whatever_the_batch_size(run, model, folder):
    names = ["img2.PNG", "img10.png"]
    captions = model.caption([str(folder / "photos" / name) for name in names], max_length=6)
    expected = "".join(f"{name}\t{' '.join(text.split())}\n" for name, text in zip(names, captions))
    for size in (1, 2, 7):
        assert run("photos/img10.png", "--batch-size", size, "photos/img2.PNG") == (0, expected, "")


def test_a_bad_picture_is_named_and_the_others_are_captioned(run):
    status, out, err = run("photos/", "nope.jpg", "--batch-size", 1)
    assert status == 1 and [line.split("\t")[0] for line in out.splitlines()] == ["img2.PNG", "img10.png"]
    assert "nope.jpg" in err and "bad3.jpg" in err and len(err.splitlines()) == 2


def test_pictures_in_the_examples_folder_are_the_default(run, folder, monkeypatch):
    monkeypatch.setattr(sample, "EXAMPLES", folder / "photos/below")
    monkeypatch.chdir(folder)
    assert run()[1].startswith("photos/below/img0.png\t")


def test_json_on_stdout_is_all_there_is(run):
    status, out, err = run("photos/img2.PNG", "photos/img10.png", "--json")
    assert [set(entry) for entry in json.loads(out)] == [{"image", "caption", "score"}] * 2
    assert (status, err) == (0, "")


def test_prompt_and_several_captions_reach_every_output(run, tmp_path):
    files = {name: tmp_path / f"captions.{name}" for name in ("json", "csv")}
    flags = [a for name, file in files.items() for a in (f"--{name}", file)]
    _, out, _ = run("photos/img2.PNG", "photos/img10.png", "--num-beams", 3, "--num-return-sequences", 2,
                    "--prompt", "two men", *flags)
    entries = json.loads(files["json"].read_text())
    assert [len(entry["captions"]) for entry in entries] == [2, 2]
    assert all(text.startswith("two men") for entry in entries for text in entry["captions"])
    assert all(entry["scores"] == sorted(entry["scores"], reverse=True) for entry in entries)
    with open(files["csv"], newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [["image", "caption"], *([e["image"], text] for e in entries for text in e["captions"])]
    assert len(out.splitlines()) == 4


def test_sampling_follows_the_seed(run):
    def captions(seed):
        return run("photos/img10.png", "--temperature", 1, "--num-return-sequences", 8, "--seed", seed)[1]
    assert captions(1) == captions(1) != captions(2)


def test_drawings_hold_every_picture_up_to_the_limit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "DRAWN", 1)
    one = run("photos/img2.PNG", "--save", tmp_path / "one.png", "--attention", tmp_path / "look.png")
    two = run("photos/img2.PNG", "photos/img10.png", "--save", tmp_path / "two.png")
    assert one[2] == "" and "first 1 will be drawn" in two[2] and len(two[1].splitlines()) == 2
    assert Image.open(tmp_path / "one.png").tobytes() == Image.open(tmp_path / "two.png").tobytes()
    assert Image.open(tmp_path / "look.png").width > 400            # the plain picture and at least one word


def script(*args, **options):
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, **options)


def test_script_reads_stdin_and_names_the_checkpoint_it_chose(folder, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/vision-gpt").symlink_to(folder / "checkpoint")
    done = script("-", "--max-length", 6, cwd=tmp_path, input=(folder / "photos/img10.png").read_bytes())
    assert done.returncode == 0 and done.stderr.decode() == "checkpoint: weights/vision-gpt\n"
    assert len(done.stdout.splitlines()) == 1


def test_script_ends_mistakes_in_one_line(tmp_path):
    done = script("nope.jpg", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == "error: nope.jpg: no such picture\n"


# --------------------------------------------------------------------------------------------------
# attention


@pytest.fixture(scope="module")
def seen(model):
    """Two images and captions, and what each attention module took and gave in the forward pass."""
    torch.manual_seed(1)
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(0, model.eos_id, (2, 7))
    calls = {}
    modules = {**{f"layer {i}": layer for i, layer in enumerate(model.resampler.layers)}, **model.xattn}
    hooks = [module.register_forward_hook(lambda _, given, out, name=name: calls.update({name: (given, out)}))
             for name, module in modules.items()]
    with torch.inference_mode():
        model(tokens, model.encode(images))
    for hook in hooks:
        hook.remove()
    return images, tokens, calls


def test_resampler_probabilities_are_those_of_the_forward_pass(model, seen):
    images, _, calls = seen
    with torch.inference_mode():
        visual, found = attention.resampler_attention(model.resampler, model.vit(images)[:, 1:])
        for i, layer in enumerate(model.resampler.layers):
            (latents, patches), out = calls[f"layer {i}"]
            v = layer.attention_inputs(latents, patches)[2]
            x = latents + layer.proj((found[i] @ v).transpose(1, 2).flatten(2))
            x = x + layer.fc2(torch.nn.functional.gelu(layer.fc1(layer.norm_mlp(x))))
            torch.testing.assert_close(x, out, rtol=0, atol=1e-5)
        torch.testing.assert_close(visual, out, rtol=0, atol=0)


def test_cross_attention_probabilities_are_those_of_the_forward_pass(model, seen):
    images, tokens, calls = seen
    with torch.inference_mode():
        found = attention.cross_attention(model, tokens, model.encode(images))
        assert tuple(found) == model.config.cross_attention
        for i, probability in found.items():
            (x, (_, v), *_), out = calls[str(i)]
            looked = model.xattn[str(i)].out((probability @ v).transpose(1, 2).flatten(2))
            assert looked.abs().max() > 0.1
            torch.testing.assert_close(x + looked, out, rtol=0, atol=1e-5)


def test_maps_are_shares_of_the_picture_and_the_default_is_the_mean_of_the_layers(model, seen):
    images, tokens, _ = seen
    maps = attention.attention_maps(model, images, tokens)
    assert maps.shape == (2, 7, 4, 4) and maps.min() >= 0
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 7))
    layers = [attention.attention_maps(model, images, tokens, i) for i in model.config.cross_attention]
    torch.testing.assert_close(maps, sum(layers) / len(layers))
    with pytest.raises(UserError, match="choose from 1, 2, 3"):
        attention.attention_maps(model, images, tokens, 0)


def test_map_of_a_word_does_not_see_what_follows_it_nor_the_padding(model, seen):
    images, tokens, _ = seen
    torch.testing.assert_close(attention.attention_maps(model, images[:1], tokens[:1, :4]),
                               attention.attention_maps(model, images, tokens)[:1, :4])


def test_map_lies_over_the_picture_row_by_row():
    """With a ViT that does not mix its patches, a change in one place moves the map most there."""
    torch.manual_seed(0)
    model = VisionGPT(VisionGPTConfig(ViTConfig(32, 8, 0, 2, 32, 64), GPT2Config(300, 64, 4, 2, 32),
                                      ResamplerConfig(8, 1, 2, 8, 16))).eval()
    plain = torch.randn(1, 3, 1, 1).expand(1, 3, 32, 32)
    changed = plain.clone()
    changed[:, :, 8:16, 16:24] += 3 * torch.randn(1, 3, 8, 8)              # patch (1, 2) of 4 x 4
    tokens = torch.zeros(1, 1, dtype=torch.long)
    moved = attention.attention_maps(model, changed, tokens) - attention.attention_maps(model, plain, tokens)
    assert moved.abs().flatten().argmax() == 4 * 1 + 2


@pytest.mark.parametrize("text", ["a dog runs over the grass.", "two men, one bench!", "T-shirt it's ü"])
def test_words_hold_every_token_once_and_spell_the_caption(model, text):
    tokens = model.tokenizer.encode(text)
    found = attention.words(model.tokenizer, tokens)
    assert sum((positions for _, positions in found), []) == list(range(len(tokens)))
    spelled = " ".join(word for word, _ in found)
    for sign in ".,!":
        spelled = spelled.replace(f" {sign}", sign)
    assert spelled == text


def test_int8_captions_and_compile_wants_a_gpu(run):
    status, out, err = run("photos/img2.PNG", "--int8")
    assert (status, err) == (0, "") and out.strip()
    with pytest.raises(UserError, match="--device cuda"):
        run("photos/img2.PNG", "--compile", "--device", "cpu")
