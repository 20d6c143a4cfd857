"""sample.py: what is captioned, in which order, what is printed and written, where the model looked."""

import csv
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, random_captioner
from PIL import Image

import sample
from lib import checkpoint, cli, distributed, figures
from lib.cli import UserError


@pytest.fixture(scope="module")
def model():
    return random_captioner()


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
# command line


@pytest.mark.parametrize("args, message", [
    ([], "name a picture"),
    (["nope.jpg"], "nope.jpg: no such picture"),
    (["--json", "dog.jpg"], "is a picture"),
    (["a.jpg", "--save", "grid"], "grid.png"),
    (["a.jpg", "--csv", "no/such/folder.csv"], "existing folder"),
    (["a.jpg", "--batch-size", "0"], "from 1 to 4096"),
    (["a.jpg", "--batch-size", str(10**9)], "from 1 to 4096"),
    (["a.jpg", "--csv", "a", "--json", "./a"], "--json and --csv both write a"),
    (["a.jpg", "--num-return-sequences", "2"], "num_beams"),
    (["a.jpg", "--attention-layer", "2"], "needs --attention"),
    (["a.jpg", "--out", "captions"], "for .tar shards"),
    (["a.jpg", "a.tar"], "a.tar is a shard, a.jpg is not"),
    (["a.tar", "--csv", "a.csv"], "--csv is for pictures"),
    (["a.tar", "b/a.tar", "--out", "captions"], "two shards would both"),
])
def test_mistakes_are_told_before_a_model_is_loaded(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "EXAMPLES", tmp_path / "none")
    (tmp_path / "b").mkdir()
    for name in ("a.jpg", "a.tar", "b/a.tar"):
        (tmp_path / name).touch()
    monkeypatch.setattr(checkpoint, "find_checkpoint", lambda folder: folder)
    with pytest.raises(UserError, match=message):
        sample.main([*args, "--checkpoint", "does-not-exist"])


@pytest.mark.parametrize("flag", ["--json", "--csv", "--save", "--attention"])
@pytest.mark.parametrize("file", ["photos/img2.PNG", "photos/../photos/img2.PNG", "link.png", "plain"])
def test_a_picture_of_the_run_is_never_written_over(flag, file, folder, monkeypatch):
    """Spelled another way, behind a link, in the folder that is captioned, without a suffix."""
    monkeypatch.chdir(folder)
    (folder / "plain").write_bytes((folder / "photos/img2.PNG").read_bytes())
    (folder / "link.png").unlink(missing_ok=True)
    (folder / "link.png").symlink_to("photos/img2.PNG")
    before = {name: (folder / name).read_bytes() for name in ("photos/img2.PNG", "plain")}
    with pytest.raises(UserError, match="is a picture|would overwrite|does not name a picture format"):
        sample.main(["photos", "plain", flag, file, "--checkpoint", "checkpoint"])
    with pytest.raises(UserError, match="is a picture|would overwrite|does not name a picture format"):
        sample.main([str(folder / "plain"), flag, file, "--checkpoint", "checkpoint"]
                    if file == "plain" else ["photos/*.PNG", flag, file, "--checkpoint", "checkpoint"])
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_the_models_own_files_are_never_written_over(folder):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with pytest.raises(UserError, match="would overwrite"):
            sample.main([str(folder / "photos"), "--checkpoint", str(folder / "checkpoint"),
                         "--json", str(folder / "checkpoint" / name)])


def test_odd_file_names_are_a_line_each_and_survive_in_the_files(folder, tmp_path, capsys):
    names = [b"two\nlines\t.png", b"not utf-8 \xff.png", "写真　1.png".encode(), b"bad\n.png"]
    for name in names:
        content = b"no" if name.startswith(b"bad") else (folder / "photos/img10.png").read_bytes()
        (tmp_path / os.fsdecode(name)).write_bytes(content)
    status = sample.main([str(tmp_path), "--checkpoint", str(folder / "checkpoint"), "--max-length", "3",
                          "--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")])
    out, err = capsys.readouterr()
    assert status == 1 and len(out.splitlines()) == 3 and len(err.splitlines()) == 1 and "bad\\n.png" in err
    assert [line.count("\t") for line in out.splitlines()] == [1] * 3 and "two\\nlines\\t.png\t" in out
    assert "写真　1.png\t" in out
    found = {entry["image"] for entry in json.loads((tmp_path / "a.json").read_text())}
    assert found == {str(tmp_path / os.fsdecode(name)) for name in names[:3]}
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == 4


def write_shard(file, folder, names=("img10.png", "bad3.jpg", "notes.txt", "img2.PNG")):
    with tarfile.open(file, "w") as archive:
        for name in names:
            archive.add(folder / "photos" / name, name)


def test_each_shard_gets_a_file_of_its_captions(run, folder, tmp_path):
    """In the order of the shard, a bad picture with its error; a finished one is left alone."""
    write_shard(tmp_path / "0.tar", folder)
    write_shard(tmp_path / "1.tar", folder, ["img2.PNG"])
    _, out, _ = run("photos/img2.PNG", "photos/img10.png")
    expected = dict(line.split("\t") for line in out.splitlines())
    status, out, err = run(tmp_path / "*.tar")
    first, bad, last = map(json.loads, (tmp_path / "0.jsonl").read_text().splitlines())
    assert (status, out) == (1, "") and "0.tar, 1 of 2: unreadable pictures: 1, see" in err
    assert [first["image"], bad["image"], last["image"]] == ["img10.png", "bad3.jpg", "img2.PNG"]
    assert {p["image"]: " ".join(p["caption"].split()) for p in (first, last)} == expected
    assert bad.keys() == {"image", "error"} and "bad3.jpg: it is not a JPEG" in bad["error"]
    assert len((tmp_path / "1.jsonl").read_text().splitlines()) == 1

    (tmp_path / "1.jsonl").unlink()
    (tmp_path / "1.jsonl.partial").write_text("of a run that was killed")
    (tmp_path / "0.jsonl").write_text("done")
    status, _, err = run(tmp_path / "0.tar", tmp_path / "1.tar")
    assert status == 0 and "0.jsonl is there already" in err
    assert (tmp_path / "0.jsonl").read_text() == "done"
    assert json.loads((tmp_path / "1.jsonl").read_text()) == last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.jsonl", "0.tar", "1.jsonl", "1.tar"]


def test_a_damaged_or_taken_shard_keeps_no_other_from_its_captions(run, folder, tmp_path):
    for name in "012":
        write_shard(tmp_path / f"{name}.tar", folder, ["img2.PNG"])
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    with open(tmp_path / "out.jsonl.partial", "w"):
        pass
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/1.jsonl.partial", "w") as taken:
        cli.lock(taken, "")
        status, _, err = run(tmp_path / "*.tar", "--out", tmp_path / "out")
    assert status == 1 and "0.tar is not a whole tar file" in err and "another process is writing" in err
    assert not (tmp_path / "out/0.jsonl").exists() and not (tmp_path / "out/1.jsonl").exists()
    assert json.loads((tmp_path / "out/2.jsonl").read_text())["image"] == "img2.PNG"


def test_processes_share_the_shards(run, folder, tmp_path, monkeypatch):
    for name in "012":
        write_shard(tmp_path / f"{name}.tar", folder, ["img2.PNG"])
    config = sample.SampleConfig(images=[], max_length=6)
    files = sample.shard_files([str(tmp_path / f"{name}.tar") for name in "012"], config)
    model = sample.load_model(folder / "checkpoint", config)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "total", lambda number: number)
    for rank, there in ((1, ["1.jsonl"]), (0, ["0.jsonl", "1.jsonl", "2.jsonl"])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert sample.caption_shards(model, files, config) == 0
        assert sorted(p.name for p in tmp_path.glob("*.jsonl*")) == there


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


def test_only_process_0_fails_for_what_is_missing(run, monkeypatch):
    """torchrun kills process 0, which writes the files, when another one fails before it is done."""
    monkeypatch.setattr(sample, "caption_sources", lambda *args: 1)
    for rank, status in ((0, 1), (1, 0)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert run("photos/img2.PNG", "nope.jpg")[0] == status


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
    assert one[2] == "" and "only the first 1 of 2" in two[2] and len(two[1].splitlines()) == 2
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


@pytest.mark.parametrize("text", ["a dog runs over the grass.", "two men, one bench!", "T-shirt it's ü"])
def test_words_hold_every_token_once_and_spell_the_caption(model, text):
    tokens = model.tokenizer.encode(text)
    found = sample.caption_words(model.tokenizer, tokens)
    assert sum((positions for _, positions in found), []) == list(range(len(tokens)))
    spelled = " ".join(word for word, _ in found)
    for sign in ".,!":
        spelled = spelled.replace(f" {sign}", sign)
    assert spelled == text


def test_attention_sheet_shows_each_word_where_the_model_looked(model, folder):
    """A word of several tokens gets the mean of their maps; the prompt's words are not drawn."""
    picture = sample.read_picture(str(folder / "photos/img10.png"), 32, draw=True)
    images, prompt = model.preprocess([picture.pixels] * 2), model.tokenizer.encode("two men")
    captions = [model.tokenizer.encode(text) for text in (" on a zebra", " on")]
    sample.draw_attention(model, [picture, sample.Picture("other")], images, prompt, captions, layer=2)
    tokens = torch.tensor([[model.eos_id, *prompt, *captions[0]]])
    maps = model.attention_maps(images[:1], tokens, 2)[0, len(prompt) :]
    words = sample.caption_words(model.tokenizer, captions[0])
    assert [word for word, _ in words] == ["on", "a", "zebra"] and max(len(at) for _, at in words) > 1
    of_words = [maps[positions].mean(0) for _, positions in words]
    sheet = figures.attention_sheet(picture.shown, ["on", "a", "zebra"], of_words)
    assert np.abs(np.asarray(picture.sheet, int) - np.asarray(sheet, int)).max() <= 2


def test_int8_captions_and_excludes_other_dtypes(run):
    status, out, err = run("photos/img2.PNG", "--int8")
    assert (status, err) == (0, "") and out.strip()
    with pytest.raises(UserError, match="leave out --dtype float32"):
        run("photos/img2.PNG", "--int8", "--dtype", "float32")
