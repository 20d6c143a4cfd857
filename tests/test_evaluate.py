"""evaluate.py: what the table says, the controls, and captions that come from a file."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
from gpt2 import GPT2Config
from lib import prepared_set
from lib.cli import UserError
from lib.metrics import score
from model import VisionGPT, VisionGPTConfig
from resampler import ResamplerConfig
from tokenizer import Tokenizer, pack_captions
from vit import ViTConfig

TEST = [7, 2, 5, 3, 6]                   # out of order: a place in the split is not an image index
CAPTIONS = ["a dog runs on the grass", "two dogs play", "a cat sleeps on a red sofa .", "the man's bike",
            "a child in the snow", "people walk along a street", "a brown horse jumps", "a boat on the water"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of 8 pictures of one colour each, image i with i % 3 + 1 captions."""
    folder, rng = tmp_path_factory.mktemp("data") / "tiny", np.random.default_rng(0)
    pictures = (np.full((24, 24, 3), rng.integers(256, size=3), np.uint8) for _ in range(8))
    prepared_set.write_images(folder, pictures)
    captions = [(i, CAPTIONS[i] + " , again" * n) for i in range(8) for n in range(i % 3 + 1)]
    names, ids = [f"{i}.jpg" for i in range(8)], [100 + i for i in range(8)]
    prepared_set.write_set(folder, names, captions, dict(train=[0, 4], val=[1], test=TEST),
                   Tokenizer.train(CAPTIONS, 280), dict(image_size=24), ids)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return save_model(folder, folder.parent / "model", blind=False)


def save_model(folder, out, ends=0.0, **training):
    """A random captioner that looks at pictures of 16 x 16; `ends` draws every word towards the end token."""
    tokenizer = Tokenizer.load(folder)
    model = VisionGPT(VisionGPTConfig(
        ViTConfig(image_size=16, patch_size=8, n_layer=1, n_head=2, n_embd=12, n_mlp=16),
        GPT2Config(tokenizer.vocab_size, 64, n_layer=4, n_head=2, n_embd=16),
        ResamplerConfig(n_latent=3, n_layer=1, n_head=2, head_width=4, n_mlp=8)), tokenizer).eval()
    torch.manual_seed(2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.gpt2.ln_f.bias.data += ends * model.gpt2.wte.weight[model.eos_id]
    model.save_pretrained(out, training=dict(data=str(folder), **training))
    return out


@pytest.fixture
def run(folder, tmp_path):
    """Call main and return what --json FILE holds."""
    def run(*args):
        evaluate.main([*map(str, args), "--json", str(tmp_path / "report.json")])
        return json.loads((tmp_path / "report.json").read_text())
    return run


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def perfect():
    return [{"image": f"{i}.jpg", "caption": CAPTIONS[i]} for i in TEST]


def loss_by_hand(model, captions, images, seen):
    """Mean cross-entropy of all captions of `images`, one at a time, looking at the pictures `seen`."""
    losses = []
    for image, looked_at in zip(images, seen):
        picture = Image.fromarray(captions.images[looked_at])
        for c in captions.captions_of[image]:
            ids = model.tokenizer.encode(prepared_set.clean_caption(captions.captions[c]))
            tokens, targets, _ = pack_captions([[ids]], model.eos_id)
            logits, _ = model(tokens, model.encode(model.preprocess([picture])))
            losses += F.cross_entropy(logits[0], targets[0], reduction="none").tolist()
    return sum(losses) / len(losses)


# --------------------------------------------------------------------------------------------------
# a model


def test_results_are_those_of_the_model_whatever_the_batch_size(folder, checkpoint, run, tmp_path, capsys):
    saved = tmp_path / "captions.json"
    result = run("--checkpoint", checkpoint, "--max-length", 9, "--batch-size", 2,
                 "--save-predictions", saved)
    table = capsys.readouterr().out
    model, captions = VisionGPT.from_pretrained(checkpoint), data.CaptionSet(folder)
    texts = model.caption([Image.fromarray(captions.images[i]) for i in TEST], max_length=9)
    assert json.loads(saved.read_text()) == [
        {"image_id": 100 + i, "caption": text, "image": f"{i}.jpg"} for i, text in zip(TEST, texts)]
    expected = score(texts, [captions.references(i) for i in TEST])[0]
    assert {name: result[name] for name in expected} == expected
    assert list(expected) == [line.split()[0] for line in table.splitlines()[2:8]]
    assert (result["images"], result["references"]) == (5, sum(i % 3 + 1 for i in TEST))
    assert result["distinct_captions"] == len(set(texts)) > 1
    assert result["mean_words"] == sum(len(text.split()) for text in texts) / 5
    assert result["loss"] == pytest.approx(loss_by_hand(model, captions, TEST, TEST), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert f"{result['loss']:.4f}" in table and result["captions_per_s"] > 0
    assert "shuffled" not in result and "right_in_every_word" not in result


def test_too_long_a_reference_is_an_error_before_any_work(folder, checkpoint, run, tmp_path):
    captions, meta = data.CaptionSet(folder), json.loads((folder / "meta.json").read_text())
    pictures, words = [captions.images[i] for i in range(3)], " again" * 70
    prepared_set.write_images(tmp_path / "long", pictures)
    texts = [(0, "a dog"), (1, "a cat"), (2, "dogs" + words)]
    prepared_set.write_set(tmp_path / "long", meta["images"][:3], texts,
                           dict(train=[0], val=[1], test=[2]), captions.tokenizer, meta["preprocessing"])
    with pytest.raises(UserError, match=r"a caption of \d+ tokens is too long .* room for 63"):
        run("--checkpoint", checkpoint, "--data", tmp_path / "long")
    run("--checkpoint", checkpoint, "--data", tmp_path / "long", "--split", "val")    # where none is too long


def test_shuffled_images_are_other_images_in_captions_and_loss(folder, checkpoint, run, tmp_path, capsys):
    result = run("--checkpoint", checkpoint, "--shuffle-images", "--batch-size", 2)
    model, captions = VisionGPT.from_pretrained(checkpoint), data.CaptionSet(folder)
    others = TEST[-2:] + TEST[:-2]
    texts = model.caption([Image.fromarray(captions.images[i]) for i in others])
    expected = score(texts, [captions.references(i) for i in TEST])[0]
    assert {name: result["shuffled"][name] for name in expected} == expected
    loss = loss_by_hand(model, captions, TEST, others)
    assert result["shuffled"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert abs(result["loss"] - loss) > 1e-3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["real", "shuffled"]
    assert f"loss {result['loss']:.4f} {loss:.4f}" in [" ".join(line.split()) for line in lines]
    with pytest.raises(UserError, match="two images"):
        run("--checkpoint", checkpoint, "--shuffle-images", "--limit", 1)


def test_blind_model_sees_the_same_grey_everywhere(folder, run, tmp_path):
    result = run("--checkpoint", save_model(folder, tmp_path / "blind", blind=True), "--shuffle-images")
    assert result["distinct_captions"] == 1 and result["loss"] == result["shuffled"]["loss"]


def test_captions_cut_at_max_length_did_not_end(folder, run, tmp_path):
    out, captions = save_model(folder, tmp_path / "ends", ends=1.0), data.CaptionSet(folder)
    model = VisionGPT.from_pretrained(out)
    visual = model.encode(model.preprocess([Image.fromarray(captions.images[i]) for i in TEST]))
    rows, _ = model.generate_tokens(evaluate.EvaluateConfig(max_length=60), visual=visual)
    lengths = [len(row) for row in rows]
    assert min(lengths) < max(lengths) < 59
    for most in (min(lengths) + 1, max(lengths), max(lengths) + 1):          # the end token needs a place too
        share = sum(length < most for length in lengths) / 5
        assert run("--checkpoint", out, "--max-length", most)["ended_by_end_token"] == share
    for beams in (1, 3):
        args = "--checkpoint", out, "--num-beams", beams
        assert run(*args, "--max-length", 4, "--min-length", 4)["ended_by_end_token"] == 0
        assert run(*args, "--max-length", 40)["ended_by_end_token"] == 1


def test_split_and_limit_choose_the_images(folder, checkpoint, run):
    assert run("--checkpoint", checkpoint, "--split", "train")["images"] == 2
    assert run("--checkpoint", checkpoint, "--limit", 3)["references"] == sum(i % 3 + 1 for i in TEST[:3])


# --------------------------------------------------------------------------------------------------
# captions from a file


def test_saved_predictions_score_as_when_they_were_written(folder, checkpoint, run, tmp_path):
    saved = tmp_path / "captions.json"
    own = run("--checkpoint", checkpoint, "--save-predictions", saved, "--limit", 4)
    theirs = run("--predictions", saved, "--data", folder, "--limit", 4)
    assert theirs == {name: own[name] for name in theirs}
    assert "CIDEr" in theirs and "loss" not in theirs


@pytest.mark.parametrize("name", [
    lambda i: {"image": f"{i}.jpg"}, lambda i: {"image": f"/home/me/{i}.jpg"},
    lambda i: {"image_id": 100 + i}, lambda i: {"image_id": str(100 + i)},
    lambda i: {"image_id": f"{i}.jpg"}], ids=["name", "path", "id", "id as text", "name as id"])
def test_predictions_find_their_image(folder, run, tmp_path, name):
    file = write(tmp_path / "theirs.json", [{**name(i), "caption": CAPTIONS[i]} for i in sorted(TEST)])
    result = run("--predictions", file, "--data", folder)
    assert result["Bleu_4"] == pytest.approx(1) and result["ROUGE_L"] == pytest.approx(1)


def test_worst_captions_are_listed_and_drawn(folder, run, tmp_path, capsys):
    entries = perfect()
    entries[3]["caption"] = "nothing of that kind"
    file = write(tmp_path / "theirs.json", entries)
    grid = tmp_path / "grid.png"
    worst = run("--predictions", file, "--data", folder, "--worst", 2, "--grid", grid)["worst"]
    assert len(worst) == 2 and worst[0]["image"] == f"{TEST[3]}.jpg"
    assert worst[0]["CIDEr"] == 0 < worst[1]["CIDEr"] and worst[0]["references"][0] == CAPTIONS[TEST[3]]
    printed = f"{TEST[3]}.jpg: nothing of that kind   (reference: {CAPTIONS[TEST[3]]})"
    assert printed in capsys.readouterr().out
    colours = {colour for _, colour in Image.open(grid).getcolors(1 << 20)}
    pictures = data.CaptionSet(folder).images
    drawn = {i for i in range(8) if tuple(map(int, pictures[i, 0, 0])) in colours}
    assert drawn == {int(w["image"][0]) for w in worst}


def test_json_on_stdout_stands_alone(folder, tmp_path, capsys):
    file = write(tmp_path / "theirs.json", perfect())
    evaluate.main(["--predictions", str(file), "--data", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["images"] == 5


def test_drawn_scenes_count_captions_right_in_every_word(tmp_path, run):
    folder = tmp_path / "shapes"
    scene = {"arrangement": "in the middle", "objects": [
        {"size": "small", "colour": "red", "shape": "circle", "x": 0.5, "y": 0.5}]}
    texts = ["a small red circle in the middle", "a small red circle at the top"]
    prepared_set.write_images(folder, np.zeros((2, 8, 8, 3), np.uint8))
    (folder / "scenes.jsonl").write_text(f"{json.dumps(scene)}\n" * 2)
    prepared_set.write_set(folder, ["0.png", "1.png"], [(0, texts[0]), (1, texts[0])],
                   dict(train=[], val=[], test=[0, 1]), Tokenizer.train(texts, 260), dict(image_size=8))
    file = write(tmp_path / "p.json", [{"image_id": i, "caption": text} for i, text in enumerate(texts)])
    assert run("--predictions", file, "--data", folder)["right_in_every_word"] == 0.5


# --------------------------------------------------------------------------------------------------
# what the user can mend


@pytest.mark.parametrize("change, message", [
    (lambda e: e + [e[0]], "entry 6: a second caption of 7.jpg"),
    (lambda e: e + [{"image_id": 107, "caption": ""}], "entry 6: a second caption of 107"),
    (lambda e: e[1:], "no caption for 1 of 5 test images, such as 7.jpg; --limit"),
    (lambda e: e + [{"image": "99.jpg", "caption": ""}], "entry 6: .* has no image 99.jpg"),
    (lambda e: e + [{"image": "0.jpg", "caption": ""}], "1 of the 6 images .* outside the test split"),
    (lambda e: e + [{"image": "0.jpg"}], "5 lacks the field .caption"),
    (lambda e: e + [{"caption": "a dog"}], "has no image None"),
    (lambda e: ["a dog"], "0 is 'a dog', but must be an object"),
    (lambda e: {"captions": e}, "is an object, but must be a list"),
])
def test_wrong_predictions_are_told_in_one_line(folder, tmp_path, change, message):
    file = write(tmp_path / "theirs.json", change(perfect()))
    with pytest.raises(UserError, match=message):
        evaluate.main(["--predictions", str(file), "--data", str(folder)])


@pytest.mark.parametrize("content, message", [
    (b"\xff\xfe[", "damaged"), (b"[", "damaged"), (b"[" * 10**5, "nested too deeply"),
    (b'[{"caption": "a", "image_id": ' + b"9" * 5000 + b"}]", "damaged"),
    (b'[{"caption": "a", "image_id": [1]}]', "must be"), (b'[{"caption": 1, "image": "0"}]', "must be text")])
def test_unreadable_predictions_are_told_in_one_line(folder, tmp_path, content, message):
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        evaluate.main(["--predictions", str(tmp_path / "p.json"), "--data", str(folder)])


@pytest.mark.parametrize("args, message", [
    (["--num-beams", "5"], "--num-beams needs a model"),
    (["--checkpoint", "x"], "--checkpoint needs a model"),
    (["--shuffle-images"], "--shuffle-images needs a model"),
    (["--limit", "-1"], "limit is -1"),
    (["--grid", "grid.txt"], "does not name a picture format"),
    (["--grid", "none/grid.png"], "--grid none/grid.png cannot be written"),
    (["--json", "./p.json"], "would overwrite p.json"),
    (["--json", "a", "--save-predictions", "a"], "both write a"),
    (["--batch-size", str(10**9)], "from 1 to 4096"),
])
def test_impossible_settings_are_refused_before_the_work(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").write_text("[]")
    with pytest.raises(UserError, match=message):
        evaluate.main(["--predictions", "p.json", *args])


def test_files_of_the_set_and_the_model_are_never_written_over(folder, checkpoint, tmp_path):
    theirs = write(tmp_path / "theirs.json", perfect())
    files = [*folder.iterdir(), *checkpoint.iterdir()]
    before = {file: file.read_bytes() for file in files}
    for file in files:
        if file.parent == folder:
            with pytest.raises(UserError, match="would overwrite"):
                evaluate.main(["--predictions", str(theirs), "--data", str(folder), "--json", str(file)])
        with pytest.raises(UserError, match="would overwrite"):
            evaluate.main(["--checkpoint", str(checkpoint), "--save-predictions", str(file)])
    assert before == {file: file.read_bytes() for file in files}


def test_several_captions_an_image_are_no_choice(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--num-return-sequences", "2"])
    assert "unknown argument --num-return-sequences" in capsys.readouterr().err
