"""Caption pictures with a trained model.

    python sample.py dog.jpg                                      # prints the caption and nothing else
    python sample.py photos/ "more/*.png" https://host/cat.jpg    # a line a picture: path, tab, caption
    python sample.py - < dog.jpg                                  # the picture comes on stdin
    python sample.py dog.jpg --num-beams 5 --num-return-sequences 3
    python sample.py dog.jpg --attention look.png                 # where the model looked, word by word
    python sample.py photos/ --json captions.json --csv captions.csv --save grid.png

Pictures come in natural order, img2 before img10. One that cannot be read is named on stderr, the others
are captioned, and the exit status is 1.
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

from decoding import DecodingConfig
from lib import cli, figures
from lib.cli import UserError, flag

EXAMPLES = Path(__file__).parent / "assets/examples"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
LARGEST = 64 * 2**20                   # bytes of a picture from the network
DRAWN = 50                             # pictures at most on a sheet


@dataclass
class SampleConfig(DecodingConfig):
    images: list[str] = flag(list, "files, folders (not their subfolders), glob patterns, URLs, - for stdin; "
                             "else the pictures in assets/examples", metavar="IMAGE", positional=True)
    checkpoint: str | None = flag(None, "checkpoint folder; else the newest under out/ that saw photographs, "
                                  "weights/vision-gpt or assets/mini", metavar="DIR")
    weights: str | None = flag(None, "one more folder to look for the frozen backbones in", metavar="DIR")
    batch_size: int = flag(16, "pictures captioned at once")
    compile: bool = flag(False, "GPU: decode with CUDA graphs, recorded at first use; pays for many pictures")
    int8: bool = flag(False, "CPU: bfloat16, GPT-2's weights rounded to 8 bits: less exact; faster, but not "
                             "with beams or many pictures at once")
    seed: int = flag(0, "of sampling: same seed, pictures, flags and batch size, same captions")
    dtype: str = flag("auto", "auto: float32 on the CPU, the checkpoint's own on a GPU", choices=cli.DTYPES)
    device: str = flag("auto", "auto: the GPU where there is one", choices=cli.DEVICES)
    json: str | None = flag(None, "write a list of {image, caption, score}; to stdout when FILE is left out",
                            metavar="FILE", const="-")
    csv: str | None = flag(None, "write a table with the columns image and caption", metavar="FILE")
    save: str | None = flag(None, f"draw the first {DRAWN} pictures with their captions", metavar="PNG")
    attention: str | None = flag(None, "draw where the model looked for each word of the first caption of "
                                 f"the first {DRAWN} pictures", metavar="PNG")
    attention_layer: int | None = flag(None, "draw cross-attention before this block of GPT-2; else the mean")

    def __post_init__(self):
        super().__post_init__()
        if self.int8 and self.dtype not in ("auto", "bfloat16", "bf16"):
            raise UserError(f"--int8 computes in bfloat16: leave --dtype {self.dtype} out")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}, but must be at least 1")
        for name in ("json", "csv", "save", "attention"):
            file = getattr(self, name)
            if file is None or (name, file) == ("json", "-"):
                continue
            if file in self.images or name in ("json", "csv") and Path(file).suffix.lower() in SUFFIXES:
                raise UserError(f"--{name} {file} is a picture: name the pictures before --{name}")
            if name in ("save", "attention"):
                figures.picture_format(file)
            if os.path.isdir(file) or not Path(file).parent.is_dir():
                raise UserError(f"--{name} {file} is a folder or in none: name a file in an existing one")


@dataclass
class Picture:
    source: str                        # path, URL or -
    error: str = ""                    # why it could not be read
    pixels: object = None              # PIL image as the model sees it
    shown: object = None               # PIL image to draw with, when it will be drawn
    captions: tuple = ()
    scores: tuple = ()
    tokens: tuple = ()                 # of the first caption, without the prompt's


# --------------------------------------------------------------------------------------------------
# pictures


def find_pictures(args):
    """Files, folders, patterns, URLs, - -> sources in natural order, and a line on each that is not there."""
    found, missing = [], []
    for arg in args:
        if arg == "-" or is_url(arg) or os.path.isfile(arg):
            found.append(arg)
            continue
        folder = os.path.isdir(arg)
        names = glob.glob(os.path.join(glob.escape(arg), "*") if folder else arg, recursive=True)
        names = [name for name in names if Path(name).suffix.lower() in SUFFIXES and os.path.isfile(name)]
        found += names
        if not names:
            missing.append(f"{arg}: {'no pictures in this folder' if folder else 'no such picture'}")
    return sorted(found, key=natural), missing


def natural(name):
    """Sorts img2 before img10."""
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(re.split(r"(\d+)", name))], name


def is_url(source):
    return source.lower().startswith(("http://", "https://"))


def load(source, size, draw):
    """Read a Picture; one that cannot be read has an `error` and nothing else."""
    from lib.images import load_image, resize
    try:
        image = load_image(io.BytesIO(sys.stdin.buffer.read()) if source == "-" else
                           io.BytesIO(fetch(source)) if is_url(source) else source)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = re.sub("<_io.BytesIO.*?>", source, str(error))
        return Picture(source, reason if source in reason else f"cannot read the picture {source}: {reason}")
    return Picture(source, "", resize(image, size), ImageOps.contain(image, (448, 448)) if draw else None)


def fetch(url):
    """The bytes at `url`. Raises UserError when they are too many, and what urlopen raises."""
    request = urllib.request.Request(url, headers={"User-Agent": "vision-gpt"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        content = answer.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise UserError(f"it has more than {LARGEST >> 20} MB")
    return content


# --------------------------------------------------------------------------------------------------
# captions


def caption(model, pictures, config, generator=None):
    """Give each of a batch of Pictures its captions, scores and tokens."""
    images = model.preprocess([p.pixels for p in pictures])
    prompt = model.require_tokenizer().encode(config.prompt)
    tokens, scores = model.generate_tokens(config, prompt, images, generator=generator)
    texts = [model.tokenizer.decode(prompt + row).strip() for row in tokens]
    n = config.num_return_sequences
    for i, p in enumerate(pictures):
        rows = slice(i * n, (i + 1) * n)
        p.captions, p.scores, p.tokens = texts[rows], scores[rows], tokens[i * n]


def attention_sheets(model, pictures, config):
    """Where the model looked: a sheet for each of a batch of captioned Pictures."""
    from attention import attention_maps, words
    from tokenizer import pad_captions
    prompt = model.tokenizer.encode(config.prompt)
    tokens, _ = pad_captions([prompt + p.tokens for p in pictures], model.eos_id)
    images = model.preprocess([p.pixels for p in pictures])
    maps = attention_maps(model, images, tokens, config.attention_layer)[:, len(prompt) :].numpy()
    for p, own in zip(pictures, maps):
        said = words(model.tokenizer, p.tokens)
        yield figures.attention_sheet(p.shown, [w for w, _ in said], [own[at].mean(0) for _, at in said])


def write(pictures, sheets, config):
    """The files that the flags ask for."""
    if config.json:
        if config.num_return_sequences > 1:
            records = [dict(image=p.source, captions=p.captions, scores=p.scores) for p in pictures]
        else:
            records = [dict(image=p.source, caption=p.captions[0], score=p.scores[0]) for p in pictures]
        text = json.dumps(records, indent=1)
        if config.json == "-":
            print(text)
        else:
            with cli.atomic(config.json) as path:
                Path(path).write_text(text + "\n")
    if config.csv:
        rows = [("image", "caption"), *((p.source, text) for p in pictures for text in p.captions)]
        with cli.atomic(config.csv) as path, open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    drawn = [p for p in pictures if p.shown]
    if config.save and drawn:
        texts = ["\n".join(p.captions) for p in drawn]
        figures.save(figures.contact_sheet([p.shown for p in drawn], texts), config.save)
    if config.attention and drawn:
        figures.save(figures.stack(sheets), config.attention)


def main(args=None):
    config = SampleConfig(**cli.parse(SampleConfig, __doc__, args))
    if not config.images and not EXAMPLES.is_dir():
        raise UserError("name a picture, as in python sample.py dog.jpg; see --help")
    sources, missing = find_pictures(config.images or [os.path.relpath(EXAMPLES)])
    if not sources:
        raise UserError("; ".join(missing))
    for line in missing:
        print(line, file=sys.stderr)

    import torch  # slow to import: after what can go wrong without it

    import fast
    from data import load_ahead
    from lib import checkpoint
    from model import VisionGPT
    folder = config.checkpoint or checkpoint.find_checkpoint()
    if not config.checkpoint:
        print(f"checkpoint: {folder}", file=sys.stderr)
    dtype = torch.bfloat16 if config.int8 else cli.pick_dtype(config.dtype)
    model = VisionGPT.from_pretrained(folder, config.device, dtype, config.weights)
    fast.pack(model.requires_grad_(False), config.int8)
    if config.compile:
        fast.record(model)
    generator = torch.Generator(model.device).manual_seed(config.seed % 2**63)
    size, drawn = model.config.vit.image_size, DRAWN if config.save or config.attention else 0
    if len(sources) > drawn > 0:
        print(f"of {len(sources)} pictures the first {drawn} will be drawn", file=sys.stderr)
    prefix = "" if len(sources) == 1 and sources == config.images else "{}\t"
    sys.stdout.reconfigure(errors="backslashreplace")   # a sign that the console lacks must not end the run

    pictures, sheets, failed = [], [], bool(missing)
    with ThreadPoolExecutor(8) as readers:              # reads the next batch while the model works
        def read_batch(start):
            numbers = range(start, min(start + config.batch_size, len(sources)))
            return list(readers.map(lambda n: load(sources[n], size, n < drawn), numbers))

        starts = range(0, len(sources), config.batch_size)
        batches = load_ahead(read_batch, starts)
        if config.json == "-" or not sys.stdout.isatty():     # on a console the captions are the progress
            batches = cli.progress(batches, "captioning", len(starts), " batches")
        try:
            for batch in batches:
                for p in (p for p in batch if p.error):
                    print(p.error, file=sys.stderr)
                    failed = True
                batch = [p for p in batch if not p.error]
                if not batch:
                    continue
                caption(model, batch, config, generator)
                if config.json != "-":
                    for p, text in ((p, text) for p in batch for text in p.captions):
                        print(prefix.format(p.source) + " ".join(text.split()))
                    sys.stdout.flush()
                if config.attention and batch[0].shown:
                    sheets += attention_sheets(model, [p for p in batch if p.shown], config)
                for p in batch:
                    p.pixels = None                         # of 100,000 pictures the words alone are kept
                pictures += batch
        except torch.OutOfMemoryError:
            raise UserError(f"out of memory: lower --batch-size ({config.batch_size})") from None
        finally:                                        # what was captioned is not lost
            write(pictures, sheets, config)
    return int(failed)


if __name__ == "__main__":
    cli.run(main)
