"""Every command in the README runs: long ones shortened, those that need the network or a GPU as --help."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
INLINE = re.findall(r"`((?:python|pip) [^`]*)`", TEXT)
COMMANDS = sorted({part.split("#")[0].strip() for lines in [*BLOCKS, *INLINE] for line in lines.splitlines()
                   for part in line.split("&&")} - {""})
SCRIPTS = [c for c in COMMANDS if c.startswith("python ") and "-m pytest" not in c]


@pytest.fixture
def run(capfd, monkeypatch):
    """Run a script in a folder as if from the shell, in this process, which has imported torch before."""
    def run(arguments, folder):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(arguments[0], run_name="__main__")
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=ended.value.code or 0, stdout=out, stderr=err)
    return run


def test_readme_names_only_known_programs():
    assert len(SCRIPTS) >= 8
    for command in COMMANDS:
        assert command.startswith(("python ", "pip install -r requirements")), command


SETTINGS = {"prepare_flickr8k.py": "PrepareConfig", "convert_weights.py": "ConvertConfig",
            "train.py": "TrainConfig", "sample.py": "SampleConfig", "evaluate.py": "EvaluateConfig",
            "bench.py": "BenchConfig", "demo.py": "DemoConfig"}


@pytest.mark.parametrize("command", SCRIPTS)
def test_readme_command_has_flags_and_values_that_exist(command):
    _, script, *arguments = command.split()
    module = importlib.import_module(script.removesuffix(".py"))
    given = cli.parse(getattr(module, SETTINGS[script]), "", arguments)
    assert len(given) >= sum(a.startswith("--") for a in arguments)


@pytest.mark.parametrize("script", SETTINGS)
def test_readme_script_explains_itself(run, script):
    done = run([script, "--help"], ROOT)
    assert done.returncode == 0 and f"python {script}" in done.stdout, done.stderr


def test_readme_first_command_captions_the_examples(tmp_path):
    """From any folder: the model and the pictures come with the project."""
    done = subprocess.run([sys.executable, ROOT / "sample.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0 and "assets/mini" in done.stderr, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 5 and all(len(caption.split()) > 1 for _, caption in rows)
    assert len({caption for _, caption in rows}) > 2


def test_readme_shapes_run_trains_and_captions(run, tmp_path):
    """The command that works out of the box, three steps of it, and then a caption from what it wrote."""
    (command,) = [c for c in SCRIPTS if "--preset shapes" in c]
    data = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    from prepare_shapes import ShapesConfig, prepare
    prepare(ShapesConfig(out=data[1], train_scenes=40, eval_scenes=8))
    done = run([str(ROOT / command.split()[1]), *command.split()[2:], *data, "--max-steps", "3"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "right in every word" in done.stdout.splitlines()[-1]
    picture = tmp_path / "run" / "samples.png"
    done = run([str(ROOT / "sample.py"), str(picture), "--checkpoint", str(tmp_path / "run")], tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr


def test_readme_own_pictures_scores_and_stand_alone_model(run, tmp_path):
    """The commands on one's own pictures, the scores and the stand-alone model, begun from a tiny model."""
    from PIL import Image

    from prepare_shapes import ShapesConfig, prepare
    from tokenizer import Tokenizer
    prepare(ShapesConfig(out=str(tmp_path / "shapes"), train_scenes=40, eval_scenes=8))
    tiny = ["train.py", "--preset", "shapes", "--data", "shapes", "--out", "out/flickr8k", "--max-steps", "1"]
    (tmp_path / "weights").mkdir()                      # stands in for GPT-2's tables
    Tokenizer("gpt2", Tokenizer.load(tmp_path / "shapes").ranks).save(tmp_path / "weights")
    (tmp_path / "photos").mkdir()
    rows = ["image,caption,split"]
    for i, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2):
        Image.new("RGB", (60, 40), (30 * i, 90, 40)).save(tmp_path / f"photos/{i}.png")
        rows.append(f"{i}.png,a red star,{split}")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    block = next(b for b in BLOCKS if "--init-from" in b)
    own = [line.split("#")[0].strip() for line in block.splitlines()]
    score = next(c for c in SCRIPTS if "evaluate.py" in c) + " --data data/mine --checkpoint out/mine"
    alone = next(c for c in SCRIPTS if "convert_weights.py --checkpoint" in c)
    for command in [" ".join(["python", *tiny]), own[0], own[1] + " --max-steps 3", own[2], score, alone]:
        _, script, *arguments = command.split()
        done = run([str(ROOT / script), *arguments], tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (tmp_path / "grid.png").exists()
    assert (tmp_path / "out/flickr8k-float16/model.safetensors").exists()


def test_readme_has_no_blanks_to_fill():
    assert not re.search(r"\b[A-Z]+_[A-Z]+\b", TEXT.replace("TIKTOKEN_CACHE_DIR", ""))


def test_readme_python_names_exist():
    from model import VisionGPT
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    for name in re.findall(r"(?:VisionGPT|model)\.(\w+)\(", snippet):
        assert hasattr(VisionGPT, name), name


def test_readme_map_lists_every_module():
    (tree,) = re.findall(r"```\n(vit\.py.*?)```", TEXT, re.S)
    listed = set(re.findall(r"\w+", tree))
    assert {p.stem for folder in (ROOT, ROOT / "lib") for p in folder.glob("[!_]*.py")} <= listed
    assert len(TEXT.splitlines()) <= 150


def test_readme_test_command_is_what_continuous_integration_runs():
    (command,) = [line for line in INLINE if "-m pytest" in line]
    for file in (".ci/run", ".github/workflows/tests.yml"):
        assert (ROOT / file).read_text().strip().splitlines()[-1].removeprefix("      - run: ") == command


@pytest.mark.parametrize("file", ["README.md", "docs/benchmarks.md"])
def test_scores_in_the_documents_are_those_of_the_bundled_model(file):
    scores = json.loads((ROOT / "assets/mini/metrics.json").read_text())
    header, row = (re.search(rf"^\|.*{text}.*$", (ROOT / file).read_text(), re.M)[0].split("|")
                   for text in ("CIDEr, wrong picture", "4 beams, length penalty 0.65"))
    written = dict(zip((name.strip() for name in header), (value.strip() for value in row)))
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"):
        exact = scores[name.replace("BLEU-", "Bleu_").replace("-", "_")]
        assert written[name] == f"{exact:.3f}".lstrip("0"), name
    assert written["CIDEr, wrong picture"] == f"{scores['shuffled']['CIDEr']:.3f}".lstrip("0")


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "docs/benchmarks.md"])
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / file).read_text()):
        assert (ROOT / file).parent.joinpath(target).exists(), target
