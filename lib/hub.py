"""Repositories of the Hugging Face hub by their name, user/name, as folders under downloads/."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lib import download, records
from lib.cli import UserError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
SETTINGS = ("config.json", "preprocessor_config.json", "tokenizer.json", "merges.txt", "vocab.bpe",
            "drafts.safetensors")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "fusion.safetensors", "pytorch_model.bin",
           "pytorch_model.bin.index.json", "model_fp32/model_checkpoint.pth")       # the first that is there


@dataclass
class Repository:
    """What the hub's API says of a repository."""
    sha: str
    siblings: list[dict]


def local_or_hub(path: str | Path) -> Path:
    """`path`, or the download of the hub's repository of that name if nothing here is called so."""
    name = str(path)
    if not NAME.fullmatch(name) or os.path.lexists(name) or os.path.lexists(name.split("/")[0]):
        return Path(path)
    return download_repository(name)


def download_repository(name: str) -> Path:
    """Download settings, weights and tokenizer tables of one revision into the folder downloads/`name`.

    A complete folder is not asked for again: delete it to update.
    """
    folder = Path("downloads", name)
    complete, started = folder / "repository.json", folder / "repository.started.json"
    if complete.exists():
        return folder
    download.download_file(f"{download.HUB}/api/models/{name}", started)
    repository = records.read_json(Repository, started, foreign=True)
    held = {str(file.get("rfilename")) for file in repository.siblings}
    weights = next((file for file in WEIGHTS if file in held), None)
    if weights is None or not re.fullmatch("[0-9a-f]{40}", repository.sha):
        raise UserError(f"{download.HUB}/{name} holds no weights under a known name ({', '.join(WEIGHTS)})")

    def fetch(file):
        url = f"{download.HUB}/{name}/resolve/{repository.sha}/{file}"
        return download.download_file(url, folder / file)

    for file in held.intersection(SETTINGS):
        fetch(file)
    path = fetch(weights)
    if path.suffix == ".json":
        from lib.weight_formats import find_weight_files
        for shard in find_weight_files(path):
            fetch(shard.name)
    os.replace(started, complete)
    return folder


def model_card(config: dict, training: dict, scores: dict) -> str:
    """README.md of a stand-alone model, from its config, training summary and evaluate.py's scores."""
    gpt2, facts = config["gpt2"], ["library_name: pytorch", "pipeline_tag: image-to-text"]
    if "flickr8k" in f"{training.get('data')} {training.get('note')}".lower():       # for research alone
        facts += ["license: other", "license_name: flickr8k-terms", "datasets: [jxie/flickr8k]"]
    size = {768: "gpt2", 1024: "gpt2-medium", 1280: "gpt2-large", 1600: "gpt2-xl"}.get(gpt2["n_embd"])
    if size and gpt2["vocab_size"] == 50257:
        facts.append(f"base_model: openai-community/{size}")
    rows = [f"| {name} | {scores[name]:.4f} |" for name in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr")
            if isinstance(scores.get(name), float)]
    return "\n".join([
        "---", *facts, "---", "", "# Vision-GPT", "",
        f"An image captioner in plain PyTorch: a ViT of {config['vit']['n_layer']} blocks, a Perceiver "
        f"Resampler, and a GPT-2 of {gpt2['n_layer']} blocks with cross-attention.", "",
        "```python", "from model import VisionGPT", 'model = VisionGPT.from_pretrained("USER/NAME")',
        'print(model.caption("dog.jpg"))', "```", "",
        *[f"- {name}: {value}" for name, value in training.items()],
        *["", "| score | |", "|---|---|", *rows] * bool(rows), ""])
