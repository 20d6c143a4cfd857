"""Caption pictures with a trained model.

    python sample.py dog.jpg                                      # prints the caption and nothing else
    python sample.py photos/ "more/*.png" https://host/cat.jpg    # a line for each: path, tab, caption
    python sample.py - < dog.jpg                                  # reads the picture from stdin
    python sample.py dog.jpg --num-beams 5 --num-return-sequences 3
    python sample.py dog.jpg --attention look.png                 # where the model looked, word by word
    python sample.py photos/ --json captions.json --csv captions.csv --save grid.png

Pictures come in natural order, img2 before img10. One that cannot be read is reported on stderr, the others
are captioned, and the exit status is 1.
"""

if __name__ == "__main__":
    import lib.threads  # noqa: F401  before torch

import csv
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import fast
from decoding import DecodingConfig
from lib import checkpoint, cli, figures
from lib.cli import UserError, flag, printable
from lib.images import SUFFIXES, resize
from lib.picture_sources import find_pictures, load_source
from model import VisionGPT
from tokenizer import Tokenizer, pack_captions

EXAMPLES = Path(__file__).parent / "assets/examples"
DRAWN = 50                             # pictures at most on a sheet
MAX_WORDS = 60                         # under which attention is drawn, of one caption


@dataclass
class CaptionerConfig(DecodingConfig):
    """A trained model, and how it captions: what sample.py and evaluate.py share."""
    checkpoint: str | None = flag(None, "checkpoint folder; default: the newest in out/ trained on photos, "
                                  "or weights/vision-gpt, or assets/mini", metavar="DIR")
    weights: str | None = flag(None, "another folder with the frozen backbones", metavar="DIR")
    batch_size: int = flag(16, "pictures captioned at once", min=1, max=4096)
    int8: bool = flag(False, "CPU: bfloat16, and GPT-2's weights in 8 bits: less exact; faster, but not with "
                             "beams or many pictures at once")
    seed: int = flag(0, "for sampling: the same seed, pictures, flags and batch size give the same captions")
    dtype: str = flag("auto", "auto: float32 on a CPU, the checkpoint's own on a GPU", choices=cli.DTYPES)
    device: str = flag("auto", "auto: the GPU if there is one", choices=cli.DEVICES)


def load_model(folder: str | os.PathLike, config: CaptionerConfig) -> VisionGPT:
    dtype = cli.pick_dtype(config.dtype, config.int8)
    model = VisionGPT.from_pretrained(folder, config.device, dtype, config.weights)
    return fast.pack(model.requires_grad_(False), config.int8)


@dataclass
class SampleConfig(CaptionerConfig):
    images: list[str] = flag(list, "files, folders (without subfolders), glob patterns, URLs, - for stdin; "
                             "default: the pictures in assets/examples", metavar="IMAGE", positional=True)
    json: str | None = flag(None, "write a list of {image, caption, score}; to stdout if FILE is left out",
                            metavar="FILE", const="-")
    csv: str | None = flag(None, "write a table with the columns image and caption", metavar="FILE")
    save: str | None = flag(None, f"draw the first {DRAWN} pictures with their captions", metavar="PNG")
    attention: str | None = flag(None, "draw where the model looked for each word of the first caption of "
                                 f"the first {DRAWN} pictures", metavar="PNG")
    attention_layer: int | None = flag(None, "draw cross-attention before this block of GPT-2, not the mean")

    def __post_init__(self):
        super().__post_init__()
        for option, file in (("--json", self.json), ("--csv", self.csv)):
            if Path(file or "").suffix.lower() in SUFFIXES:
                raise UserError(f"{option} {file} is a picture: name the pictures before {option}")
        for file in filter(None, (self.save, self.attention)):
            figures.picture_format(file)


@dataclass
class Picture:
    source: str                        # path, URL or -
    error: str = ""                    # why it could not be read
    pixels: Image.Image | None = None  # as the model sees it, until it is captioned
    shown: Image.Image | None = None   # larger, if it is to be drawn
    captions: list[str] = ()
    scores: list[float] = ()
    sheet: Image.Image | None = None   # where the model looked, if that is to be drawn


# --------------------------------------------------------------------------------------------------
# read and caption pictures


def read_picture(source: str, size: int, draw: bool) -> Picture:
    """Read and resize one picture; if it cannot be read, the Picture has an `error` and nothing else."""
    try:
        image = load_source(source)
    except UserError as error:
        return Picture(source, str(error))
    return Picture(source, "", resize(image, size), figures.fit(image, 448) if draw else None)


def caption_pictures(model: VisionGPT, sources: list[str], config: SampleConfig) -> Iterator[Picture]:
    """A Picture for each source in turn, captioned batch by batch; one that cannot be read has an `error`."""
    generator = torch.Generator(model.device).manual_seed(config.seed % 2**63)
    prompt, n = model.require_tokenizer().encode(config.prompt), config.num_return_sequences
    drawn = DRAWN if config.save or config.attention else 0
    size = model.config.vit.image_size
    pictures = cli.load_ahead(lambda i: read_picture(sources[i], size, i < drawn), range(len(sources)),
                              threads=8, ahead=config.batch_size)
    while batch := list(itertools.islice(pictures, config.batch_size)):
        if readable := [p for p in batch if not p.error]:
            images = model.preprocess([p.pixels for p in readable])
            tokens, scores = model.generate_tokens(config, prompt, images, generator=generator)
            texts = [model.tokenizer.decode(prompt + row).strip() for row in tokens]
            for i, p in enumerate(readable):
                p.captions, p.scores, p.pixels = texts[i * n : (i + 1) * n], scores[i * n : (i + 1) * n], None
            if config.attention and readable[0].shown:
                draw_attention(model, readable, images, prompt, tokens[::n], config.attention_layer)
        yield from batch


def draw_attention(model: VisionGPT, pictures: list[Picture], images: torch.Tensor, prompt: list[int],
                   captions: list[list[int]], layer: int | None) -> None:
    """Give each Picture that is to be drawn a sheet that shows where the model looked for each word."""
    tokens, _, _ = pack_captions([[prompt + caption] for caption in captions], model.eos_id)
    maps = model.attention_maps(images, tokens, layer)[:, len(prompt) :].numpy()
    for p, caption, of_tokens in zip(pictures, captions, maps):
        if p.shown:
            words = caption_words(model.tokenizer, caption)[:MAX_WORDS]
            of_words = [of_tokens[positions].mean(0) for _, positions in words]
            p.sheet = figures.attention_sheet(p.shown, [word for word, _ in words], of_words)


def caption_words(tokenizer: Tokenizer, tokens: list[int]) -> list[tuple[str, list[int]]]:
    """[(word, its positions in `tokens`)]; a word begins with a space or with one of . , ! ? : ;"""
    words = []
    for position, token in enumerate(tokens):
        text = tokenizer.encoding.decode_single_token_bytes(token)
        if not words or text[:1] in b" .,!?:;":
            words.append((b"", []))
        word, positions = words[-1]
        words[-1] = word + text, [*positions, position]
    return [(word.decode(errors="replace").strip(), positions) for word, positions in words]


# --------------------------------------------------------------------------------------------------
# write


def write_outputs(config: SampleConfig, captioned: list[Picture]) -> None:
    """The files that the flags ask for."""
    if config.json:
        if config.num_return_sequences > 1:
            records = [dict(image=p.source, captions=p.captions, scores=p.scores) for p in captioned]
        else:
            records = [dict(image=p.source, caption=p.captions[0], score=p.scores[0]) for p in captioned]
        cli.write_text(config.json, json.dumps(records, indent=1))
    if config.csv:
        with cli.atomic(config.csv) as path, open(path, "w", encoding="utf-8", newline="",
                                                  errors="backslashreplace") as file:
            rows = [(p.source, text) for p in captioned for text in p.captions]
            csv.writer(file).writerows([("image", "caption"), *rows])
    drawn = [p for p in captioned if p.shown]
    if config.save and drawn:
        texts = ["\n".join(p.captions) for p in drawn]
        figures.save(figures.contact_sheet([p.shown for p in drawn], texts), config.save)
    if config.attention and drawn:
        figures.save(figures.stack([p.sheet for p in drawn]), config.attention)


def main(args: list[str] | None = None) -> int:
    config = SampleConfig(**cli.parse(SampleConfig, __doc__, args))
    if not config.images and not EXAMPLES.is_dir():
        raise UserError("name a picture, as in python sample.py dog.jpg; see --help")
    sources, missing = find_pictures(config.images or [os.path.relpath(EXAMPLES)])
    folder = checkpoint.find_checkpoint(config.checkpoint)
    cli.check_outputs(config, "json", "csv", pictures=["save", "attention"],
                      inputs=[*sources, Path(folder, "config.json"), Path(folder, "tokenizer.json")])
    if not sources:
        raise UserError("; ".join(missing))
    for line in missing:
        print(printable(line), file=sys.stderr)
    if not config.checkpoint:
        print(f"checkpoint: {folder}", file=sys.stderr)
    if (config.save or config.attention) and len(sources) > DRAWN:
        print(f"only the first {DRAWN} of {len(sources)} pictures will be drawn", file=sys.stderr)

    pictures = caption_pictures(load_model(folder, config), sources, config)
    if config.json == "-" or not sys.stdout.isatty():       # on a terminal the captions are the progress
        pictures = cli.progress(pictures, "captioning", len(sources), " pictures")
    captioned, failed, alone = [], len(missing), len(sources) == 1 and sources == config.images
    try:
        with cli.out_of_memory(f"lower --batch-size ({config.batch_size})"):
            for p in pictures:
                if p.error:
                    print(printable(p.error), file=sys.stderr)
                    failed += 1
                    continue
                for text in p.captions if config.json != "-" else ():
                    print(("" if alone else printable(p.source) + "\t") + " ".join(text.split()), flush=True)
                if config.json or config.csv or p.shown:
                    captioned.append(p)
    finally:                                                # what has been captioned is not lost
        write_outputs(config, captioned)
    return int(failed > 0)


if __name__ == "__main__":
    cli.run(main)
