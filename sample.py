"""Caption pictures with a trained model.

    python sample.py dog.jpg                                      # prints the caption and nothing else
    python sample.py photos/ "more/*.png" https://host/cat.jpg    # a line a picture: path, tab, caption
    python sample.py - < dog.jpg                                  # the picture comes on stdin
    python sample.py dog.jpg --num-beams 5 --num-return-sequences 3
    python sample.py dog.jpg --attention look.png                 # where the model looked, word by word
    python sample.py photos/ --json captions.json --csv captions.csv --save grid.png

Pictures are captioned in natural order, img2 before img10. One that cannot be read is named on stderr, the others are
captioned, and the exit status is 1.
"""

import csv
import glob
import http.client
import io
import json
import os
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageOps

import cli
import figures
from cli import UserError, flag
from decoding import DecodingConfig

EXAMPLES = Path(__file__).parent / "assets/examples"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
LARGEST = 64 * 2**20                   # bytes of a picture from the network
SAVE_LIMIT, ATTENTION_LIMIT = 100, 20  # pictures drawn at most


@dataclass
class SampleConfig(DecodingConfig):
    images: list[str] = flag(list, "files, folders (not their subfolders), glob patterns, URLs, - for stdin; without any, "
                                   "the pictures in assets/examples", metavar="IMAGE", positional=True)
    checkpoint: str | None = flag(None, "checkpoint folder; else the newest under out/ trained on photographs, then "
                                        "weights/vision-gpt, then assets/mini", metavar="DIR")
    weights: str | None = flag(None, "one more folder to look for the frozen backbones in", metavar="DIR")
    batch_size: int = flag(16, "pictures captioned at once")
    seed: int = flag(0, "of sampling: same seed, pictures, flags and batch size, same captions")
    dtype: str = flag("auto", "auto: float32 on the CPU, the checkpoint's own on a GPU", choices=cli.DTYPES)
    device: str = flag("auto", "auto: the GPU where there is one", choices=cli.DEVICES)
    json: str | None = flag(None, "write a list of {image, caption, score}; without FILE to stdout, captions and scores "
                                  "with --num-return-sequences", metavar="FILE", const="-")
    csv: str | None = flag(None, "write a table with the columns image, caption", metavar="FILE")
    save: str | None = flag(None, f"draw the pictures, the first {SAVE_LIMIT} at most, with their captions", metavar="PNG")
    attention: str | None = flag(None, "draw where the model looked for each word of the first caption, for the first "
                                       f"{ATTENTION_LIMIT} pictures at most", metavar="PNG")
    attention_layer: int | None = flag(None, "block of GPT-2 whose cross-attention is drawn; else the mean of all")

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}, but must be at least 1")
        for name in ("json", "csv", "save", "attention"):
            file = getattr(self, name)
            if file is None or (name, file) == ("json", "-"):
                continue
            if file in self.images or name in ("json", "csv") and Path(file).suffix.lower() in SUFFIXES:
                raise UserError(f"--{name} {file} would write over a picture; name the pictures before --{name}")
            if name in ("save", "attention"):
                import figures
                figures.picture_format(file)
            if os.path.isdir(file) or not Path(file).parent.is_dir():
                raise UserError(f"--{name} {file}: {'is a folder' if os.path.isdir(file) else 'its folder does not exist'}")


@dataclass
class Picture:
    source: str                        # path, URL or -
    pixels: object = None              # PIL image (S, S), as the model takes it
    shown: object = None               # PIL image to draw with, if it is going to be drawn
    error: str = ""                    # why it could not be read
    captions: tuple = ()
    scores: tuple = ()
    tokens: tuple = ()                 # of the first caption, without the prompt's


# ----------------------------------------------------------------------------------------------------------------------
# pictures


def find_pictures(args):
    """Files, folders, patterns, URLs and - -> what to caption, in natural order, and a line on each that is not there."""
    found, missing = [], []
    for arg in args:
        if arg == "-" or is_url(arg) or os.path.isfile(arg):
            found.append(arg)
            continue
        folder = os.path.isdir(arg)
        names = [os.path.join(arg, name) for name in os.listdir(arg)] if folder else glob.glob(arg, recursive=True)
        names = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES and os.path.isfile(name)]
        found += names
        if not names:
            missing.append(f"{arg}: {'no pictures in this folder' if folder else 'no such picture'}")
    return sorted(found, key=natural), missing


def natural(name):
    """Sorts img2 before img10."""
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(re.split(r"(\d+)", name))], name


def is_url(source):
    return source.lower().startswith(("http://", "https://"))


def fetch(url):
    """The bytes at `url`. Raises UserError when they do not come or are too many."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "sample.py"}), timeout=20) as answer:
            content = answer.read(LARGEST + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"cannot fetch {url}: {error}") from None
    if len(content) > LARGEST:
        raise UserError(f"cannot fetch {url}: it is larger than {LARGEST >> 20} MB")
    return content


def load(source, size, draw):
    """Read one Picture; if that fails it only has an `error`."""
    from vit import load_image, resize
    try:
        content = sys.stdin.buffer.read() if source == "-" else fetch(source) if is_url(source) else None
        image = load_image(source if content is None else io.BytesIO(content))
    except UserError as error:
        return Picture(source, error=re.sub("<_io.BytesIO[^>]*>", source, str(error)))
    shown = image.copy() if draw else None
    if draw:
        shown.thumbnail((448, 448))
    return Picture(source, resize(image, size), shown)


# ----------------------------------------------------------------------------------------------------------------------
# captions


def caption(model, pictures, config, generator=None):
    """Fill in captions, scores and tokens of a batch of Pictures."""
    import torch
    with torch.inference_mode():
        import torch
    with torch.inference_mode():
        visual = model.encode(model.preprocess([p.pixels for p in pictures]).to(model.device))
    prompt = model._tokenizer().encode(config.prompt)
    tokens, scores = model.generate_tokens(visual, config, prompt, generator)
    texts, n = [model.tokenizer.decode(prompt + row).strip() for row in tokens], config.num_return_sequences
    for i, picture in enumerate(pictures):
        rows = slice(i * n, (i + 1) * n)
        picture.captions, picture.scores, picture.tokens = texts[rows], scores[rows], tokens[i * n]


def draw_attention(model, pictures, config):
    """A sheet for each of a batch of captioned Pictures."""
    import figures
    from attention import attention_maps, words
    from tokenizer import pad_captions
    prompt = model.tokenizer.encode(config.prompt)
    tokens, _ = pad_captions([prompt + p.tokens for p in pictures], model.end_id)
    maps = attention_maps(model, model.preprocess([p.pixels for p in pictures]), tokens, config.attention_layer)
    for picture, own in zip(pictures, maps[:, len(prompt) :].numpy()):
        said = words(model.tokenizer, picture.tokens)
        yield figures.attention_sheet(picture.shown, [word for word, _ in said], [own[at].mean(0) for _, at in said])


def record(picture):
    """What --json says of a Picture."""
    if len(picture.captions) == 1:
        return {"image": picture.source, "caption": picture.captions[0], "score": picture.scores[0]}
    return {"image": picture.source, "captions": picture.captions, "scores": picture.scores}


def write(done, sheets, config):
    """The files that the flags ask for."""
    if config.json == "-":
        print(json.dumps([record(p) for p in done], indent=1))
    elif config.json:
        with cli.atomic(config.json) as path:
            Path(path).write_text(json.dumps([record(p) for p in done], indent=1) + "\n")
    if config.csv:
        with cli.atomic(config.csv) as path, open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
            csv.writer(file).writerows([("image", "caption"), *((p.source, text) for p in done for text in p.captions)])
    if config.save or config.attention:
        import figures
        drawn = [p for p in done if p.shown]
        if config.save and drawn:
            figures.save(figures.contact_sheet([p.shown for p in drawn], ["\n".join(p.captions) for p in drawn]), config.save)
        if config.attention and sheets:
            figures.save(figures.stack(sheets), config.attention)


def main(args=None):
    config = SampleConfig(**cli.parse(SampleConfig, __doc__, args))
    if not config.images and not EXAMPLES.is_dir():
        raise UserError("name a picture, as in python sample.py dog.jpg; see --help")
    sources, missing = find_pictures(config.images or [str(EXAMPLES)])
    if not sources:
        raise UserError("; ".join(missing))
    for line in missing:
        notice(line)

    import torch                                             # slow to import: after all that can go wrong without it
    import checkpoint
    from data import load_ahead
    from model import VisionGPT
    folder = config.checkpoint or checkpoint.find_checkpoint()
    if not config.checkpoint:
        notice(f"checkpoint: {folder}")
    model = VisionGPT.from_pretrained(folder, config.device, cli.pick_dtype(config.dtype), config.weights)
    generator = torch.Generator(model.device).manual_seed(config.seed % 2**63)
    size, drawn = model.config.vit.image_size, DRAWN if config.save or config.attention else 0
    if len(sources) > drawn > 0:
        notice(f"of {len(sources)} pictures the first {drawn} will be drawn")
    prefix = "" if len(sources) == 1 and sources == config.images else "{}\t"
    sys.stdout.reconfigure(errors="backslashreplace")        # a sign that the console lacks must not end the run

    pictures, sheets, failed = [], [], bool(missing)
    with ThreadPoolExecutor(8) as readers:                   # the next batch is read while the model works on this one
        def read_batch(start):
            numbers = range(start, min(start + config.batch_size, len(sources)))
            return list(readers.map(lambda n: load(sources[n], size, n < drawn), numbers))

        starts = range(0, len(sources), config.batch_size)
        batches = load_ahead(read_batch, starts)
        if config.json == "-" or not sys.stdout.isatty():    # on a console the captions are the progress
            batches = cli.progress(batches, "captioning", len(starts), " batches")
        for batch in batches:
            for p in batch:
                if p.error:
                    notice(p.error)
                    failed = True
            batch = [p for p in batch if not p.error]
            if not batch:
                continue
            caption(model, batch, config, generator)
            if config.json != "-":
                print(*(prefix.format(p.source) + " ".join(c.split()) for p in batch for c in p.captions), sep="\n", flush=True)
            if config.attention and batch[0].shown:
                sheets += attention_sheets(model, [p for p in batch if p.shown], config)
            for p in batch:
                p.pixels = None                              # of 100,000 pictures only the words are kept
            pictures += batch
    write(pictures, sheets, config)
    return int(failed)


if __name__ == "__main__":
    cli.run(main)
