"""Random damage to everything that is read: each reader gives a value or a UserError, and nothing else.

    python -m tests.fuzz --minutes 10 [--only NAME]     # a fixed number of minutes for each reader

What is found is kept in tests/corpus/NAME/, which the suite replays (test_fuzz.py).
"""

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import os
import random
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

TESTS = Path(__file__).parent
CORPUS = TESTS / "corpus"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import evaluate  # noqa: E402
from data import CaptionSet  # noqa: E402
from lib import (  # noqa: E402
    caption_formats,
    checkpoint,
    images,
    picture_sources,
    records,
    runs,
    scenes,
    weight_formats,
)
from lib.cli import UserError  # noqa: E402
from lib.prepared_set import read_meta  # noqa: E402
from model import VisionGPT, VisionGPTConfig  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from train import TrainConfig  # noqa: E402

INTERESTING = [
    b"",
    b"\0",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"-1",
    b"1e999",
    b"null",
    b"NaN",
    b"[[[[",
    b'"',
    b"{",
    b"}",
    b"\n",
    b"\r\n",
    b",",
    b"\xed\xa0\x80",
    b"999999999999999999999",
    b"0",
    b"true",
]


def mutate(content, rng):
    """Some bytes changed, cut out, put in, doubled or exchanged."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        size = len(content)
        at, length = rng.randrange(size + 1), rng.choice([1, 1, 2, 4, 8, 64, 512])
        kind = rng.randrange(7)
        if kind == 0 and size:
            content[min(at, size - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            content[min(at, size - 1)] = rng.randrange(256)
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = rng.choice(INTERESTING)
        elif kind == 4:
            word = rng.choice(INTERESTING)
            content[at : at + len(word)] = word
        elif kind == 5:
            content[at:at] = content[at : at + length]
        else:
            other = rng.randrange(size + 1)
            content[at : at + length] = content[other : other + length]
    return bytes(content)


class Readers:
    """{name: (seeds, reader of the path of a damaged file)}, on a few small files that are written first."""

    def __init__(self, folder):
        from bad_input import picture
        from test_convert_weights import FIXTURES
        from test_data import make_set
        from test_model import captioner

        self.folder = folder
        make_set(folder / "data", images=7, size=8, longest=4)
        model = captioner(n_positions=40)
        model.save_pretrained(folder / "complete")
        checkpoint.save_module(model.vit, folder / "vit.safetensors", sha256="0")
        cfg = TrainConfig(preset="shapes", out=str(folder / "run"))
        (folder / "run").mkdir()
        named = {"latents": model.resampler.latents}
        optimizer = torch.optim.AdamW(named.values())
        named["latents"].grad = torch.ones_like(named["latents"])
        optimizer.step()
        state = runs.TrainState(
            named, optimizer, torch.amp.GradScaler("cpu", enabled=False), {"captions": "0"}, 3, 2.0
        )
        state.save(folder / "run", cfg)
        objects = [dict(size="small", colour="red", shape="star", x=0.5, y=0.5)]
        zipped = io.BytesIO()
        with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", picture("PNG"))
            archive.writestr("captions.csv", "image,caption\na.png,a dog\n")
        shard = io.BytesIO()
        with tarfile.open(fileobj=shard, mode="w") as archive:
            for name, content in {"a.png": picture("PNG"), "a.txt": b"a dog", "x" * 120 + ".jpg": b"no"}.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        script = io.BytesIO()
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), script)
        texts = {
            "captions.csv": b'image,caption,split\na.png,"a dog, ""big""",train\nb.png,a cat,dev\n',
            "rows.jsonl": b'{"image": "a.png", "caption": ["a dog", "b"], "split": "val"}\n'
            b'{"image": "b.png"}\n',
            "list.json": b'[{"file_name": "a.png", "captions": ["x", "y"]}, {"image": "b.png", "text": "z"}]',
            "captions_coco.json": b'{"images": [{"id": 1, "file_name": "a.png"}], '
            b'"annotations": [{"image_id": 1, "caption": "a dog"}]}',
            "dataset_flickr8k.json": b'{"images": [{"filename": "a.png", "split": "val", '
            b'"sentences": [{"raw": "a"}]}]}',
            "flickr8k.token.txt": b"a.png#0\ta dog\nb.png#1\ta cat\n",
        }
        read = {
            "meta": (["data/meta.json"], lambda f: read_meta(f.parent)),
            "captions": (["data/captions.json"], lambda f: CaptionSet(str(f.parent))),
            "index": (["data/index.npz"], lambda f: CaptionSet(str(f.parent))),
            "tokenizer": (["data/tokenizer.json"], lambda f: Tokenizer.load(f.parent).encode("a dog runs")),
            "config": (["complete/config.json"], lambda f: VisionGPT.from_pretrained(f.parent, "cpu")),
            "safetensors": (
                ["complete/model.safetensors"],
                lambda f: VisionGPT.from_pretrained(f.parent, "cpu"),
            ),
            "module": (
                ["vit.safetensors"],
                lambda f: (checkpoint.read_metadata(f), checkpoint.read_tensors(f)),
            ),
            "state": (["run/training_state.pt"], lambda f: self.resume(f, state)),
        }
        self.readers = {
            name: ([(folder / file).read_bytes() for file in files], folder / files[0], reader)
            for name, (files, reader) in read.items()
        }
        add = self.readers.__setitem__
        for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
            if form in images.FORMATS:
                add(
                    form.lower(),
                    ([picture(form), picture(form, (3, 2))], folder / f"x.{form.lower()}", images.load_image),
                )
        for name, text in texts.items():
            add(name, ([text], folder / "texts" / name, lambda f: self.captions(f)))
        (folder / "texts").mkdir()
        add("zip", ([zipped.getvalue()], folder / "x.zip", self.archive))
        add("tar", ([shard.getvalue()], folder / "x.tar", self.shard))
        add(
            "log",
            (
                [b'{"step": 1, "loss": 2.0}\n{"step": 2, "val_loss": 1.0}\n'],
                folder / "run/log.jsonl",
                lambda f: runs.Log(f, 9, cfg).file.close(),
            ),
        )
        add(
            "scenes",
            (
                [json.dumps(dict(arrangement="in the middle", objects=objects)).encode()],
                folder / "data/scenes.jsonl",
                lambda f: scenes.read_scenes(str(f.parent), 1),
            ),
        )
        add(
            "predictions",
            (
                [b'[{"image": "6.jpg", "caption": "a dog"}]'],
                folder / "predictions.json",
                lambda f: evaluate.read_predictions(
                    evaluate.EvaluateConfig(predictions=str(f), data=str(folder / "data"))
                ),
            ),
        )
        for name, content in {
            "npz": (FIXTURES / "google.npz").read_bytes(),
            "script": script.getvalue(),
            "pth": (FIXTURES / "timm.pth").read_bytes(),
        }.items():
            add(name, ([content], folder / f"source.{name}", weight_formats.read_weights))
        tensorflow = folder / "tensorflow"
        tensorflow.mkdir()
        for file in (FIXTURES / "tensorflow").iterdir():
            (tensorflow / file.name).write_bytes(file.read_bytes())
        add(
            "tensorflow",
            (
                [(tensorflow / "model.ckpt.index").read_bytes()],
                tensorflow / "model.ckpt.index",
                weight_formats.read_weights,
            ),
        )
        for kind in (VisionGPTConfig, TrainConfig):
            add(
                kind.__name__,
                (
                    [json.dumps(records.dataclasses.asdict(kind())).encode()],
                    folder / "x.json",
                    lambda f, kind=kind: records.read_json(kind, f, foreign=True),
                ),
            )

    def resume(self, file, state):
        saved = runs.read_state(file, TrainConfig)
        state.load(saved, file.parent)

    def captions(self, file):
        captions, *_ = caption_formats.read_captions(caption_formats.list_files(str(file)))
        list(captions)

    def archive(self, file):
        for member in caption_formats.list_files(str(file)):
            with contextlib.suppress(UserError):
                caption_formats.read(member)

    def shard(self, file):
        for member in picture_sources.shard_members(str(file)):
            with contextlib.suppress(UserError):
                picture_sources.load_source(member)

    def problem(self, name, content):
        """What a reader does with `content` besides returning and UserError; None if nothing."""
        seeds, file, reader = self.readers[name]
        file.write_bytes(content)
        began = time.monotonic()
        with (
            open(os.devnull, "w") as quiet,
            contextlib.redirect_stderr(quiet),
            contextlib.redirect_stdout(quiet),
        ):
            try:
                reader(file)
            except UserError as error:
                if any(ord(c) < 32 for c in str(error)):
                    return f"an error of several lines: {str(error)!r}"
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # tiktoken's panics are none of Exception
                return traceback.format_exc()[-1500:]
            finally:
                file.write_bytes(seeds[0])  # whole again, for the others
        if time.monotonic() - began > 10:
            return f"it took {time.monotonic() - began:.0f} s"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=time.time_ns())
    args = parser.parse_args()
    rng, found, total = random.Random(args.seed), 0, 0
    np.random.seed(0)
    torch.set_num_threads(1)
    faulthandler.enable()
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory() as folder:
        readers = Readers(Path(folder))
        for name, (seeds, *_) in readers.readers.items():
            if args.only not in name:
                continue
            end, count, problems = time.monotonic() + 60 * args.minutes, 0, {}
            pool = list(seeds)
            while time.monotonic() < end:
                content = mutate(rng.choice(pool), rng)
                if len(pool) < 64 and rng.random() < 0.02:
                    pool.append(content)
                count += 1
                if problem := readers.problem(name, content):
                    where = problem.strip().splitlines()[-1][:60]
                    if where not in problems:
                        problems[where] = problem
                        (CORPUS / name).mkdir(parents=True, exist_ok=True)
                        file = CORPUS / name / hashlib.sha256(content).hexdigest()[:16]
                        file.write_bytes(content)
                        print(f"{name}: {file}\n{problem}", flush=True)
            print(f"{name:24}{count:12,} executions{len(problems):5} findings", flush=True)
            found, total = found + len(problems), total + count
    print(f"{total:,} executions, {args.minutes:g} minutes a reader, {found} findings")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
