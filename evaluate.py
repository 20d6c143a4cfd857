"""Score a trained model's captions, or captions from anywhere else, against a set's reference captions.

    python evaluate.py                                  # the newest model, on the test split
    python evaluate.py --checkpoint out/flickr8k --num-beams 5 --save-predictions beams.json
    python evaluate.py --shuffle-images                 # control: each image captioned from another one
    python evaluate.py --worst 12 --grid worst.png      # the pictures it describes worst
    python evaluate.py --predictions theirs.json --data data/flickr8k

Scores are those of coco-caption, on its scales; papers print them times 100. References are the captions as
they came with the pictures. Loss and perplexity are over all their tokens, end token included.
"""

if __name__ == "__main__":
    import lib.startup  # noqa: F401  before torch

import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import CaptionSet, read_pixels
from lib import checkpoint, cli, distributed, figures
from lib.cli import UserError, flag
from lib.images import normalize
from lib.metrics import score
from lib.prepared_set import SET_FILES
from lib.records import read_json
from lib.scenes import judge, read_scenes
from model import VisionGPT
from sample import CaptionerConfig, load_model
from tokenizer import pack_captions

DATA = "data/flickr8k"
DRAWN = 24                             # pictures of --grid without --worst, of which it draws 100 at most
WITHOUT_MODEL = {"predictions", "data", "split", "limit", "worst", "grid", "json"}


@dataclass
class EvaluateConfig(CaptionerConfig):
    num_return_sequences: int = 1      # no flag here: each image has one caption to score
    batch_size: int = flag(32, "images captioned at once", min=1, max=4096)
    predictions: str | None = flag(None, "score these captions instead, without a model: a list of {image, "
                                   "caption} or {image_id, caption}", metavar="FILE")
    data: str | None = flag(None, f"prepared set; default: the one the model was trained on, else {DATA}",
                            metavar="DIR")
    split: str = flag("test", "images to caption", choices=["train", "val", "test"])
    limit: int = flag(0, "caption only this many images, the first of the split; 0: all", min=0)
    shuffle_images: bool = flag(False, "control: also caption each image while looking at another one")
    worst: int = flag(0, "list this many captions, those with the lowest CIDEr, and their scores", min=0)
    grid: str | None = flag(None, f"draw the --worst pictures, or the first {DRAWN}, with their captions",
                            metavar="PNG")
    save_predictions: str | None = flag(None, "write the captions as COCO results", metavar="FILE")
    json: str | None = flag(None, "write the results; to stdout, instead of the table, if FILE is left out",
                            metavar="FILE", const="-")

    def __post_init__(self):
        super().__post_init__()
        if self.grid:
            figures.picture_format(self.grid)
        self.check_outputs([self.predictions or ""])

    def check_outputs(self, inputs: Iterable) -> None:
        cli.check_outputs(self, "json", "save_predictions", pictures=["grid"], inputs=inputs)


@dataclass
class Prediction:
    """An entry of a file of --predictions."""
    caption: str
    image: str | None = None           # a name in the set, perhaps with folders before it
    image_id: int | str | None = None  # one of the set's ids, or a name


@torch.inference_mode()
def caption_images(model: VisionGPT, data: CaptionSet, images: np.ndarray, seen: np.ndarray,
                   config: EvaluateConfig, blind: bool = False) -> tuple[list[str], dict[str, float]]:
    """Caption `images` while looking at the pictures `seen`, the same or others; `blind`: at plain grey.

    Returns the texts and a dict: loss and perplexity of all reference captions of `images`, looking at the
    same pictures, the share of captions that came to an end, speed. Raises UserError if the loss overflows.
    """
    vit, prompt = model.config.vit, model.require_tokenizer().encode(config.prompt)
    generator, parts = torch.Generator(model.device), []
    mine = range(0, len(images), config.batch_size)[distributed.rank() :: distributed.world_size()]
    for start in cli.progress(mine, "captioning: batch"):
        part, began = slice(start, start + config.batch_size), time.monotonic()
        generator.manual_seed((config.seed + start) % 2**63)
        pictures = normalize(read_pixels(data, seen[part], vit.image_size), vit).to(model.device)
        visual = model.encode(torch.zeros_like(pictures) if blind else pictures)
        rows, _ = model.generate_tokens(config, prompt, visual=visual, generator=generator)
        seconds = time.monotonic() - began                           # of captioning alone, without the loss
        said = [model.tokenizer.decode(prompt + row).strip() for row in rows]
        ended = sum(len(row) < config.max_length for row in rows)    # rows lack their end token
        packed = pack_captions(data.caption_tokens(images[part]), model.eos_id)
        tokens, targets, positions = (t.to(model.device) for t in packed)
        loss = model.loss(tokens, visual, targets, positions, reduction="sum").item()
        parts.append((start, said, ended, loss, int((targets != -100).sum()), seconds))
    _, said, *numbers = zip(*sorted(distributed.gather(parts)))
    texts, (ended, loss, count, seconds) = sum(said, []), map(sum, numbers)
    if not loss < 500 * count:                                       # NaN, infinite, or e**loss would be
        raise UserError(f"the loss is {loss / count}: use --dtype float32")
    return texts, {"loss": loss / count, "perplexity": math.exp(loss / count),
                   "ended_by_end_token": ended / len(texts),
                   "captions_per_s": len(texts) / seconds * distributed.world_size()}


def run_model(config: EvaluateConfig) -> tuple[CaptionSet, np.ndarray, dict[str, tuple]]:
    """The set, its images, and {"real": (texts, facts) of `caption_images`, "shuffled": a control}."""
    folder = checkpoint.find_checkpoint(config.checkpoint)
    trained = checkpoint.read_config(folder).get("training") or {}
    model = load_model(folder, config)
    data = CaptionSet(config.data or str(trained.get("data") or DATA), model.require_tokenizer())
    config.check_outputs([*(Path(data.folder, name) for name in SET_FILES),
                          Path(folder, "config.json"), Path(folder, "tokenizer.json")])
    images = data.split(config.split)[: config.limit or None]
    data.check_lengths(images, model.config.gpt2.n_positions - 1)
    if config.shuffle_images and len(images) < 2:
        raise UserError("--shuffle-images needs at least two images")
    blind = trained.get("blind", False)
    print(f"{folder} captions {len(images):,} {config.split} images of {data.folder}"
          f"{', blind as it was trained' if blind else ''}", file=sys.stderr)
    written = {"real": caption_images(model, data, images, images, config, blind)}
    if config.save_predictions and distributed.rank() == 0:
        predictions = [{"image_id": data.image_ids[i], "caption": text, "image": data.names[i]}
                       for i, text in zip(images, written["real"][0])]
        cli.write_text(config.save_predictions, json.dumps(predictions, indent=0))
    if config.shuffle_images:
        others = np.roll(images, len(images) // 2)                   # far away: neighbours may look alike
        written["shuffled"] = caption_images(model, data, images, others, config, blind)
    return data, images, written


def read_predictions(config: EvaluateConfig) -> tuple[CaptionSet, np.ndarray, dict[str, tuple]]:
    """The same as `run_model`, from a file of Predictions; only images past --limit may lack a caption."""
    file, data = config.predictions, CaptionSet(config.data or DATA)
    config.check_outputs(Path(data.folder, name) for name in SET_FILES)
    split = data.split(config.split)
    images = split[: config.limit or None]
    names = {name: i for i, name in enumerate(data.names)}
    ids = {str(image_id): i for i, image_id in enumerate(data.image_ids)}
    texts = {}
    for number, entry in enumerate(read_json(list[Prediction], file, foreign=True), 1):
        key = str(entry.image_id if entry.image is None else entry.image)
        image = names.get(key, names.get(Path(key).name, ids.get(key)))
        if image is None:
            raise UserError(f"{file}, entry {number}: {data.folder} has no image {key:.100}; choose the "
                            "right set with --data")
        if image in texts:
            raise UserError(f"{file}, entry {number}: a second caption of {key}; give each image one")
        texts[image] = entry.caption
    foreign = [data.names[i] for i in sorted(texts.keys() - set(split.tolist()))]
    if foreign:
        raise UserError(f"{len(foreign)} of the {len(texts)} images in {file} are outside the {config.split} "
                        f"split of {data.folder}, such as {foreign[0]}; remove them, or choose their --split")
    missing = [data.names[i] for i in images if i not in texts]
    if missing:
        raise UserError(f"{file} has no caption for {len(missing)} of {len(images)} {config.split} images, "
                        f"such as {missing[0]}; --limit N scores only the first N of the split")
    return data, images, {"real": ([texts[i] for i in images], {})}


def measure(texts: list[str], data: CaptionSet, images: np.ndarray) -> tuple[dict, dict[str, list]]:
    """Score one caption for each of `images`: a dict of numbers, and {name: list of a number per image}."""
    references = [data.references(i) for i in images]
    corpus, per_image = score(texts, references)
    column = {"images": len(images), "references": sum(map(len, references)), **corpus,
              "distinct_captions": len(set(texts)),
              "mean_words": sum(len(text.split()) for text in texts) / len(texts)}
    if scenes := read_scenes(data.folder, len(data.names)):
        right = sum(judge(text, scenes[i]) for text, i in zip(texts, images))
        column["right_in_every_word"] = right / len(texts)
    return column, per_image


def table(columns: dict[str, dict]) -> str:
    """{"real": {name: number}, "shuffled": ...} -> a line for each name, the titles above."""
    lines = [f"{'':20}" + "".join(f"{title:>12}" for title in columns)] if len(columns) > 1 else []
    for name in columns["real"]:
        values = [column[name] for column in columns.values()]
        cells = (f"{v:12,}" if isinstance(v, int) else f"{v:12,.4f}" for v in values)
        lines.append(f"{name:20}" + "".join(cells))
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    given = cli.parse(EvaluateConfig, __doc__, args)
    config = EvaluateConfig(**given)
    of_model = sorted(given.keys() - WITHOUT_MODEL)
    if config.predictions and of_model:
        raise UserError(f"--{of_model[0].replace('_', '-')} needs a model, but --predictions uses none: "
                        "leave out one of them")
    with (cli.out_of_memory(f"lower --batch-size ({config.batch_size})"),
          distributed.processes(cli.pick_device(config.device))):
        data, images, written = read_predictions(config) if config.predictions else run_model(config)
    if distributed.rank() > 0:
        return
    measured = {title: measure(texts, data, images) for title, (texts, _) in written.items()}
    columns = {title: measured[title][0] | facts for title, (_, facts) in written.items()}
    texts, per_image = written["real"][0], measured["real"][1]
    order = np.argsort(per_image["CIDEr"], kind="stable")[: config.worst]
    worst = [{"image": data.names[images[k]], "caption": texts[k], "references": data.references(images[k]),
              **{name: values[k] for name, values in per_image.items()}} for k in order]

    if config.json:
        controls = {title: column for title, column in columns.items() if title != "real"}
        cli.write_text(config.json, json.dumps(columns["real"] | controls | {"worst": worst}, indent=1))
    if config.json != "-":
        print(table(columns))
        for w in worst:
            scores = "  ".join(f"{name} {w[name]:.3f}" for name in ("CIDEr", "ROUGE_L", "Bleu_4"))
            line = f"{scores}  {w['image']}: {w['caption']}   (reference: {w['references'][0]})"
            print(cli.printable(line))
    if config.grid:
        drawn = order[:100] if config.worst else range(len(images))[:DRAWN]
        pictures = [Image.fromarray(data.images[images[k]]) for k in drawn]
        below = [f"{texts[k]}\nCIDEr {per_image['CIDEr'][k]:.2f}" for k in drawn]
        figures.save(figures.contact_sheet(pictures, below), config.grid)


if __name__ == "__main__":
    cli.run(main)
