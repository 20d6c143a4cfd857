"""Caption pictures with a trained model.

    python sample.py dog.jpg                                      # prints the caption and nothing else
    python sample.py photos/ "more/*.png" https://host/cat.jpg    # a line for each: path, tab, caption
    python sample.py - < dog.jpg                                  # reads the picture from stdin
    python sample.py dog.jpg --num-beams 5 --num-return-sequences 3
    python sample.py dog.jpg --attention look.png                 # where the model looked, word by word
    python sample.py photos/ --json captions.json --csv captions.csv --save grid.png
    python sample.py "shards/*.tar" --out captions                # captions/X.jsonl for each shards/X.tar
    torchrun --nproc-per-node 2 sample.py "shards/*.tar"          # two GPUs share the shards, or the pictures

Pictures come in natural order, img2 before img10. One that cannot be read is reported on stderr, the others
are captioned, and the exit status is 1. A shard whose captions are all written is not captioned again.
"""

if __name__ == "__main__":
    import lib.startup  # noqa: F401  before torch

import csv
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import fast
from decoding import DecodingConfig
from lib import checkpoint, cli, distributed, figures
from lib.cli import UserError, flag, printable
from lib.images import SUFFIXES, resize
from lib.picture_sources import Member, find_pictures, load_source, shard_members
from model import VisionGPT
from tokenizer import Tokenizer, pack_captions

EXAMPLES = Path(__file__).parent / "assets/examples"
DRAWN = 50                             # pictures at most on a sheet
MAX_WORDS = 60                         # under which attention is drawn, of one caption


@dataclass
class CaptionerConfig(DecodingConfig):
    """A trained model, and how it captions: what sample.py and evaluate.py share."""
    checkpoint: str | None = flag(None, "checkpoint folder; default: the newest in out/ trained on photos, "
                                  "else weights/vision-gpt, else assets/mini", metavar="DIR")
    weights: str | None = flag(None, "another folder to look for the frozen backbones in", metavar="DIR")
    batch_size: int = flag(16, "pictures captioned at once", min=1, max=4096)
    int8: bool = flag(False, "on a CPU: compute in bfloat16, with GPT-2's weights in 8 bits; less exact, and "
                             "faster only without beams and for few pictures at once")
    seed: int = flag(0, "for sampling: the same seed, pictures, flags and batch size give the same captions")
    dtype: str = flag("auto", "auto: bfloat16 or float16 on a CUDA GPU, else float32", choices=cli.DTYPES)
    device: str = flag("auto", "auto: the GPU if there is one", choices=cli.DEVICES)


def load_model(folder: str | os.PathLike, config: CaptionerConfig) -> VisionGPT:
    device = cli.pick_device(config.device)
    dtype = cli.pick_dtype(config.dtype, device, config.int8)
    model = VisionGPT.from_pretrained(folder, device, dtype, config.weights)
    return fast.pack(model.requires_grad_(False), config.int8)


@dataclass
class SampleConfig(CaptionerConfig):
    images: list[str] = flag(list, "files, folders (without subfolders), glob patterns, URLs, - for stdin, "
                             "or .tar shards as webdataset writes them; default: the pictures in "
                             "assets/examples", metavar="IMAGE", positional=True)
    out: str | None = flag(None, "folder for the JSON-lines files, one per .tar shard; default: the "
                           "shard's own folder", metavar="DIR")
    json: str | None = flag(None, "write a list of {image, caption, score}; to stdout if FILE is left out",
                            metavar="FILE", const="-")
    csv: str | None = flag(None, "write a table with the columns image and caption", metavar="FILE")
    save: str | None = flag(None, f"draw the first {DRAWN} pictures with their captions", metavar="PNG")
    attention: str | None = flag(None, "draw where the model looked for each word of the first caption of "
                                 f"the first {DRAWN} pictures", metavar="PNG")
    attention_layer: int | None = flag(None, "draw only the cross-attention before this block of GPT-2, not "
                                      "the mean of all")

    def __post_init__(self):
        super().__post_init__()
        for option, file in (("--json", self.json), ("--csv", self.csv)):
            if Path(file or "").suffix.lower() in SUFFIXES:
                raise UserError(f"{option} {file} is a picture: name the pictures before {option}")
        for file in filter(None, (self.save, self.attention)):
            figures.picture_format(file)
        if self.attention_layer is not None and not self.attention:
            raise UserError("--attention-layer needs --attention: add it")


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


def read_picture(source: str | Member, size: int, draw: bool) -> Picture:
    """Read and resize one picture; if it cannot be read, the Picture has an `error` and nothing else."""
    name = getattr(source, "name", source)
    try:
        image = load_source(source)
    except UserError as error:
        return Picture(name, str(error))
    return Picture(name, "", resize(image, size), figures.fit(image, 448) if draw else None)


def caption_pictures(model: VisionGPT, sources: list[str] | list[Member],
                     config: SampleConfig) -> Iterator[Picture]:
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


def record(p: Picture, several: bool) -> dict:
    """What --json and the file of a shard hold of a picture."""
    if p.error:
        return dict(image=p.source, error=p.error)
    if several:
        return dict(image=p.source, captions=p.captions, scores=p.scores)
    return dict(image=p.source, caption=p.captions[0], score=p.scores[0])


def write_outputs(config: SampleConfig, captioned: list[Picture]) -> None:
    """The files that the flags ask for."""
    if config.json:
        several = config.num_return_sequences > 1
        cli.write_text(config.json, json.dumps([record(p, several) for p in captioned], indent=1))
    if config.csv:
        with cli.atomic(config.csv) as path, open(path, "w", encoding="utf-8", newline="",
                                                  errors="backslashreplace") as file:
            rows = [(p.source, text) for p in captioned for text in p.captions]
            csv.writer(file).writerows([("image", "caption"), *rows])
    drawn = [p for p in captioned if p.shown][:DRAWN]
    if config.save and drawn:
        texts = ["\n".join(p.captions) for p in drawn]
        figures.save(figures.contact_sheet([p.shown for p in drawn], texts), config.save)
    if config.attention and drawn:
        figures.save(figures.stack([p.sheet for p in drawn]), config.attention)


def caption_shards(model: VisionGPT, files: dict[str, Path], config: SampleConfig) -> int:
    """Write the captions of {shard: JSON-lines file}, whole files only; returns how much could not be read.

    Processes share the shards. What is written already, or by another run just now, is left alone.
    """
    failed, mine = 0, list(files.items())[distributed.rank() :: distributed.world_size()]
    for number, (shard, file) in enumerate(mine, 1):
        label = f"{printable(shard)}, {number} of {len(mine)}:"
        if file.exists():
            print(f"{label} {printable(str(file))} is there already", file=sys.stderr)
            continue
        partial = Path(f"{file}.partial")
        try:
            if os.path.lexists(partial) and (partial.is_symlink() or not partial.is_file()):
                raise UserError(f"{partial} is a folder, a link or a device: move it away")
            members = shard_members(shard)
            with cli.naming(partial), open(partial, "a", encoding="utf-8") as lines:
                cli.lock(lines, f"{label} another process is writing {partial}")
                lines.truncate(0)
                pictures, bad = caption_pictures(model, members, config), 0
                for p in cli.progress(pictures, label, len(members)):
                    bad += bool(p.error)
                    lines.write(json.dumps(record(p, config.num_return_sequences > 1)) + "\n")
                lines.flush()
                if os.name == "nt":                         # which renames no open file, and has no locks
                    lines.close()
                os.replace(partial, file)
            if bad:
                print(f"{label} unreadable pictures: {bad}, see {printable(str(file))}", file=sys.stderr)
            failed += bad
        except UserError as error:
            print(printable(str(error)), file=sys.stderr)
            failed += 1
    return distributed.total(failed)                        # when all processes are done


def caption_sources(model: VisionGPT, sources: list[str], config: SampleConfig) -> int:
    """Print the captions and write the files that the flags ask for; returns how many cannot be read."""
    processes, quiet = distributed.world_size(), config.json == "-"
    pictures = caption_pictures(model, sources[distributed.rank() :: processes], config)
    if processes > 1 or quiet or not sys.stdout.isatty():   # on a terminal the captions are the progress
        pictures = cli.progress(pictures, "captioning", math.ceil(len(sources) / processes), " pictures")
    if processes > 1:
        place = {source: i for i, source in enumerate(sources)}
        pictures = sorted(distributed.gather(list(pictures)), key=lambda p: place[p.source])
        if distributed.rank() > 0:
            return 0
    captioned, failed, alone = [], 0, len(sources) == 1 and sources == config.images
    try:
        for p in pictures:
            if p.error:
                print(printable(p.error), file=sys.stderr)
                failed += 1
                continue
            for text in () if quiet else p.captions:
                print(("" if alone else printable(p.source) + "\t") + " ".join(text.split()), flush=True)
            if config.json or config.csv or p.shown:
                captioned.append(p)
    finally:                                                # what has been captioned is not lost
        write_outputs(config, captioned)
    return failed


def shard_files(shards: list[str], config: SampleConfig) -> dict[str, Path]:
    """{shard: the file that its captions go to}."""
    for option in ("json", "csv", "save", "attention"):
        if getattr(config, option):
            raise UserError(f"--{option} is for pictures; the captions of a .tar shard go to a file in --out")
    files = {shard: Path(config.out or Path(shard).parent, Path(shard).stem + ".jsonl") for shard in shards}
    if len(set(files.values())) < len(files):
        raise UserError(f"two shards would both be captioned in one file in {config.out}: leave out --out")
    if config.out:
        os.makedirs(config.out, exist_ok=True)
    return files


def main(args: list[str] | None = None) -> int:
    config = SampleConfig(**cli.parse(SampleConfig, __doc__, args))
    if not config.images and not EXAMPLES.is_dir():
        raise UserError("name a picture, as in python sample.py dog.jpg; see --help")
    sources, missing = find_pictures(config.images or [cli.relative(EXAMPLES)])
    folder = checkpoint.find_checkpoint(config.checkpoint)
    cli.check_outputs(config, "json", "csv", pictures=["save", "attention"],
                      inputs=[*sources, Path(folder, "config.json"), Path(folder, "tokenizer.json")])
    if not sources:
        raise UserError("; ".join(missing))
    shards = [source for source in sources if source.lower().endswith(".tar")]
    if shards and len(shards) < len(sources):
        raise UserError(f"{shards[0]} is a shard, {min(set(sources) - set(shards))} is not: caption them in "
                        "two runs")
    if config.out and not shards:
        raise UserError("--out is for .tar shards; the captions of pictures go to --json or --csv")
    files = shard_files(shards, config) if shards else {}
    if distributed.rank() == 0:
        for line in missing:
            print(printable(line), file=sys.stderr)
        if not config.checkpoint:
            print(f"checkpoint: {folder}", file=sys.stderr)
        if (config.save or config.attention) and len(sources) > DRAWN:
            print(f"only the first {DRAWN} of {len(sources)} pictures will be drawn", file=sys.stderr)
    with (cli.out_of_memory(f"lower --batch-size ({config.batch_size})"),
          distributed.processes(cli.pick_device(config.device))):
        model = load_model(folder, config)
        failed = caption_shards(model, files, config) if files else caption_sources(model, sources, config)
    # torchrun ends all processes when one fails, and process 0 may still be writing
    return int(distributed.rank() == 0 and (failed > 0 or len(missing) > 0))


if __name__ == "__main__":
    cli.run(main)
