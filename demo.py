"""A web page that captions pictures: drop one, paste one, or take a photo.

    python demo.py --checkpoint out/flickr8k              # then open http://127.0.0.1:8000
    python demo.py --host 0.0.0.0                         # also for phones and everyone else in this network
    curl --data-binary @dog.jpg "http://127.0.0.1:8000/caption?num_beams=5"

/caption takes the bytes of a picture and, in the query, the flags of sample.py that choose words (num_beams,
temperature, prompt ...), `seed`, and `attention=1` for where the model looked. Nothing is stored.
"""

if __name__ == "__main__":
    import lib.startup  # noqa: F401  before torch

import mimetypes
import threading
import time
import typing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import torch
from PIL import Image

from decoding import DecodingConfig
from lib import checkpoint, cli
from lib.cli import UserError, flag, nearest
from lib.images import SUFFIXES, load_image, resize
from lib.local_server import Handler, Server
from model import VisionGPT
from sample import EXAMPLES, caption_words, load_model
from tokenizer import pack_captions

PAGE = Path(__file__).parent / "assets/demo.html"
MAX_WAITING = 16                         # pictures; whoever comes then is told to come back
MOST = dict(num_beams=16, num_return_sequences=16, max_length=200, prompt=500)     # of a request


@dataclass
class DemoConfig:
    checkpoint: str | None = flag(None, "checkpoint folder; default: the one that sample.py would choose",
                                  metavar="DIR")
    weights: str | None = flag(None, "another folder to look for the frozen backbones in", metavar="DIR")
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in, without a password")
    port: int = flag(8000, "port to listen on; 0 picks a free one", min=0, max=65535)
    int8: bool = flag(False, "on a CPU: compute in bfloat16, with GPT-2's weights in 8 bits")
    dtype: str = flag("auto", "auto: bfloat16 or float16 on a CUDA GPU, else float32", choices=cli.DTYPES)
    device: str = flag("auto", "auto: the GPU if there is one", choices=cli.DEVICES)


def read_options(query: str) -> tuple[DecodingConfig, int | None, bool]:
    """A URL's query -> how to choose words (4 beams or samples unless it says more), seed, show attention?"""
    kinds = typing.get_type_hints(DecodingConfig) | dict(seed=int, attention=int)
    given = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in kinds:
            raise UserError(f"unknown option {name}{nearest(name, kinds)}")
        kind = (typing.get_args(kinds[name]) or [kinds[name]])[0]
        try:
            given[name] = bool(int(value)) if kind is bool else kind(value)
        except ValueError:
            raise UserError(f"{name} is {value!r}, but must be a number") from None
        size = len(value) if kind is str else given[name]
        if size > MOST.get(name, size):
            raise UserError(f"{name} is {size}, but this page takes {MOST[name]} at most")
    seed, attention = given.pop("seed", None), bool(given.pop("attention", 0))
    if DecodingConfig(**{k: v for k, v in given.items() if k in ("temperature", "top_k", "top_p")}).samples:
        given = dict(num_return_sequences=4) | given
    else:
        given = dict(num_beams=4) | given
        given.setdefault("num_return_sequences", given["num_beams"])
    return DecodingConfig(**given), seed, attention


def caption(model: VisionGPT, image: Image.Image, query: str = "") -> list[dict]:
    """An RGB picture -> {text, score, words} of each caption, best first; `words` if the query asks for them.

    A word comes with its map (h, w): where the model looked, from 0 to 1. Raises UserError for a wrong query.
    """
    options, seed, attention = read_options(query)
    prompt = model.require_tokenizer().encode(options.prompt)
    options.max_length = max(1, min(options.max_length, model.config.gpt2.n_positions - 1 - len(prompt)))
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed % 2**63)
    images = model.preprocess([image])
    rows, scores = model.generate_tokens(options, prompt, images, generator=generator)
    texts = [model.tokenizer.decode(prompt + row).strip() for row in rows]
    found = [dict(text=text, score=score) for text, score in zip(texts, scores)]
    if attention:
        tokens, _, _ = pack_captions([[prompt + row] for row in rows], model.eos_id)            # (G, T)
        maps = model.attention_maps(images, tokens)                                  # (1, G * T, h, w)
        maps = maps.view(*tokens.shape, *maps.shape[2:])[:, len(prompt) :].float()
        for one, row, of_tokens in zip(found, rows, maps):
            of_words = [(word, of_tokens[at].mean(0)) for word, at in caption_words(model.tokenizer, row)]
            one["words"] = [dict(word=word, map=(m / m.max()).tolist()) for word, m in of_words if word]
    return sorted(found, key=lambda one: -one["score"])


class Page(Handler):
    """The page, its example pictures, and captions; `server` has the model, a lock for it, and the files."""

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if not self.accepts():
            return
        if path == "/info":
            self.reply(200, self.server.info)
        elif file := self.server.files.get(path):        # these and no others
            self.reply(200, file.read_bytes(), mimetypes.guess_type(file)[0])
        else:
            self.reply(404, dict(error="there is no such page"))

    def do_POST(self):
        url, server, places = urlsplit(self.path), self.server, self.server.places
        if not self.accepts():
            return
        if url.path != "/caption":
            return self.reply(404, dict(error="pictures are posted to /caption"))
        if not places.acquire(blocking=False):
            return self.reply(503, dict(error="too many pictures are waiting: try again in a minute"))
        try:
            image = resize(load_image(BytesIO(self.read_body())), server.model.config.vit.image_size)
            with server.lock, cli.out_of_memory("ask for fewer beams"):
                start = time.monotonic()
                captions = caption(server.model, image, url.query)
            self.reply(200, dict(captions=captions, seconds=round(time.monotonic() - start, 3)))
        except UserError as error:
            self.reply(400, dict(error=str(error)))
        finally:
            places.release()


def make_server(config: DemoConfig, model: VisionGPT, name: str) -> Server:
    pictures = sorted(file for file in EXAMPLES.glob("*") if file.suffix in SUFFIXES)
    server = Server(config.host, config.port, Page)
    server.model, server.lock, server.places = model, threading.Lock(), threading.Semaphore(MAX_WAITING)
    server.files = {"/": PAGE} | {f"/examples/{file.name}": file for file in pictures}
    server.info = dict(model=name, parameters=sum(p.numel() for p in model.parameters()),
                       max_bytes=Page.max_bytes, examples=[file.name for file in pictures])
    return server


def main(args: list[str] | None = None) -> None:
    config = DemoConfig(**cli.parse(DemoConfig, __doc__, args))
    folder = checkpoint.find_checkpoint(config.checkpoint)
    server = make_server(config, load_model(folder, config), cli.relative(folder))
    caption(server.model, Image.new("RGB", (64, 64)), "attention=1")           # the first one takes longest
    print(f"open {server.url} to caption pictures with {folder}; Ctrl-C stops the server", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    cli.run(main)
