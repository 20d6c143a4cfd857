"""Bad input of every kind against every script: the cases, the world they happen in and the judge.

    python tests/bad_input.py [-v] [--every=N] [WORD ...]      # all, or each N-th, whose names hold a word

A case runs one script in a fresh copy of a part of a tiny world after something in it was damaged. It must end
as expected, with one clean line where it is refused, and change nothing on disk but the outputs it named. One
process imports everything once and forks for each case.
"""

import base64
import collections
import contextlib
import copy
import dataclasses
import faulthandler
import gc
import hashlib
import http.server
import importlib
import io
import json
import math
import os
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SECONDS = 20                           # no case may take longer
MEMORY = 1.5e9                         # bytes beyond what the imports need
SCRIPTS = "sample evaluate prepare_flickr8k prepare_shapes convert_weights train bench".split()
ANY, ERROR, OK = "any", "error", "ok"  # of `Case.want`; any: refused cleanly or accepted


@dataclasses.dataclass
class Case:
    name: str
    args: list                         # script, then its arguments
    parts: tuple                       # what of the world is copied
    damage: Callable = None            # called with the folder
    want: str = ERROR
    outputs: tuple = ()                # patterns of files that may be new or changed
    stdin: bytes = b""
    lines: int = 1                     # of stderr, at most, besides notes


# --------------------------------------------------------------------------------------------------
# the process that forks


def serve():
    """Read requests from stdin, fork a child for each, answer with its exit status, seconds and memory."""
    os.environ["PATH"] = f"{sys.argv[2]}/bin:{os.environ['PATH']}"
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{sys.argv[3]}"
    sys.path[:0] = [str(ROOT), str(TESTS)]
    import torch
    torch.set_num_threads(1)
    import PIL.AvifImagePlugin
    import PIL.Image
    import PIL.WebPImagePlugin
    PIL.Image.init()
    for name in (*SCRIPTS, "lib.download", "test_convert_weights", "test_data", "test_model", "test_checkpoint"):
        importlib.import_module(name)
    download = sys.modules["lib.download"]
    download.PAUSE, download.TIMEOUT, download.STALL = 0.01, 0.5, 0.5
    sys.modules["lib.picture_sources"].DEADLINE = 1.0
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(f"{sys.argv[2]}/build", "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        build_world(Path(sys.argv[2], "world"))      # here and not in a child: what is first used is slow
    gc.collect()
    gc.freeze()                                      # children share more memory so
    answers.write("ready\n")
    answers.flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for line in requests:
        request, started = json.loads(line), time.monotonic()
        pid = os.fork()
        if not pid:
            child(**request)
        handle = os.pidfd_open(pid)
        if not select.select([handle], [], [], request["seconds"])[0]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        os.close(handle)
        _, status, usage = os.wait4(pid, 0)
        answers.write(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - started,
                                  usage.ru_maxrss * 1024 - before]) + "\n")
        answers.flush()


def child(cwd, args, files, seconds):
    os.setsid()
    try:
        for number, file in enumerate(files):
            os.dup2(os.open(file, os.O_RDWR), number)
        os.chdir(cwd)
        sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace")
        sys.argv = [os.fsdecode(base64.b64decode(arg)) for arg in args]
        faulthandler.dump_traceback_later(seconds - 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))
        from lib import cli
        cli.run(sys.modules[sys.argv[0].removesuffix(".py")].main)
    except SystemExit as error:
        code = 1 if isinstance(error.code, str) else error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    else:
        code = 0
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Harness:
    """The forking process, a folder for the world and one for the case at hand."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="bad_input_"))
        self.world, self.cwd = self.folder / "world", self.folder / "case"
        self.files = [self.folder / name for name in ("stdin", "stdout", "stderr")]
        (self.folder / "bin").mkdir()
        self.world.mkdir()
        (self.folder / "bin/gs").write_text("#!/bin/sh\necho > pwned\n")       # Pillow must not start it
        (self.folder / "bin/gs").chmod(0o755)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(self.folder), str(PORT)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "CUDA_VISIBLE_DEVICES": ""})
        assert self.process.stdout.readline() == "ready\n", "the world cannot be built"

    def run(self, cwd, args, stdin, seconds=SECONDS):
        for file in self.files:
            file.write_bytes(b"")
        self.files[0].write_bytes(stdin)
        args = [base64.b64encode(os.fsencode(arg)).decode() for arg in args]
        request = dict(cwd=str(cwd), args=args, files=list(map(str, self.files)), seconds=seconds)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def try_case(self, case):
        """(how it ended, what is wrong with that or None, stderr)."""
        if self.cwd.exists():
            shutil.rmtree(self.cwd)
        self.cwd.mkdir()
        for part in case.parts:
            source = self.world / part
            if source.is_dir():
                shutil.copytree(source, self.cwd / part)
            else:
                (self.cwd / part).parent.mkdir(exist_ok=True, parents=True)
                shutil.copy2(source, self.cwd / part)
        if case.damage:
            case.damage(self.cwd)
        before = snapshot(self.cwd)
        status, seconds, memory = self.run(self.cwd, case.args, case.stdin)
        out, err = (file.read_bytes().decode("utf-8", "backslashreplace") for file in self.files[1:])
        return judge(case, status, seconds, memory, out, err, before, snapshot(self.cwd)), out, err

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()
        shutil.rmtree(self.folder)


def snapshot(folder):
    """{path: what lies there}, of files their content."""
    found = {}
    for path, folders, files in os.walk(os.fsencode(folder)):
        for name in folders + files:
            file = os.path.join(path, name)
            mode = os.lstat(file).st_mode
            content = str(stat.S_IFMT(mode))
            if stat.S_ISREG(mode) and os.path.getsize(file) > 2**30:
                content = str(os.path.getsize(file))
            elif stat.S_ISREG(mode):
                with open(file, "rb") as opened:
                    content = hashlib.sha256(opened.read()).hexdigest()
            found[os.fsdecode(os.path.relpath(file, os.fsencode(folder)))] = content
    return found


NOTES = re.compile(r"(checkpoint: |note: |warning: |WARNING: |interrupted|\S+ does not exist: starting"
                   r"|(complete|fusion|run) captions \d|.* captioning|of \d+ pictures|.*, trying again)")


def judge(case, status, seconds, memory, out, err, before, after):
    """(how it ended, what is wrong about that or '')."""
    lines = [line for line in err.splitlines() if line and not NOTES.match(line)]
    ended = {0: "accepted", 1: "refused", 2: "refused"}.get(status, f"exit {status}")
    if status == -signal.SIGKILL and seconds > SECONDS - 1:
        frames = re.findall(r'File "(?:.*/)?(\S+)", line (\d+) in (\S+)', err)
        return "hang", f"took over {seconds:.0f} s in {' < '.join(' '.join(f) for f in frames[:6])}"
    if "Traceback (most" in err or status not in (0, 1, 2):
        last = lines[-1] if lines else ""
        return "traceback" if "Traceback (most" in err else ended, f"{ended}: {last[:150]}"
    if memory > MEMORY:
        return "memory", f"{memory / 1e9:.1f} GB"
    if status and not lines and not out.strip():
        return ended, "refused without a word"
    if len(lines) > case.lines:
        return "chatter", f"{len(lines)} lines: {err.strip()[:200]!r}"
    if bad := re.search(r" at 0x|Warning: |\bwarnings\.warn|[\x00-\x08\x0b-\x1f\x7f]|<_io|object has no attribute"
                        r"|not iterable|unsupported operand|\[Errno", err):
        return "unclean", f"{bad[0]!r} in {err.strip()[:200]!r}"
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
               and not any(Path(path).match(pattern) or path.startswith(pattern + "/") for pattern in case.outputs)]
    if changed:
        return "changed files", f"{sorted(changed)[:4]}"
    if case.want == ERROR and ended == "accepted":
        return "accepted", f"accepted, but is wrong: {out[:80]!r}"
    if case.want == OK and ended == "refused":
        return "refused", f"refused, but is right: {lines[-1] if lines else ''}"
    return ended, ""


# --------------------------------------------------------------------------------------------------
# the world


def build_world(world):
    """Everything the scripts read and write, tiny; they are all used once."""
    import numpy as np
    import torch
    from PIL import Image
    from test_checkpoint import save_backbones
    from test_convert_weights import FIXTURES, published_state, randomize
    from test_data import make_set
    from test_model import captioner

    import evaluate
    import prepare_shapes
    import train
    from gpt2 import GPT2, GPT2Config
    from lib import checkpoint

    make_set(world / "data", images=9, size=16, longest=5)
    model = captioner(n_positions=40)
    files = save_backbones(model, world / "weights")
    model.tokenizer.save(world / "weights")
    tables = world / "weights/tokenizer.json"            # prepare_flickr8k.py asks for GPT-2's, by name
    tables.write_text(tables.read_text().replace('"name": "bpe"', '"name": "gpt2"'))
    model.save_pretrained(world / "complete", training=dict(photographs=True, data="data"))
    os.chdir(world)
    prepare_shapes.prepare(prepare_shapes.ShapesConfig(out="shapes", train_scenes=4, eval_scenes=2, image_size=32))
    train.train(train.TrainConfig(**RUN, max_steps=2))
    model.save_pretrained("fusion", backbones=files)
    with open(world / "shapes.json", "w") as file:
        data = evaluate.CaptionSet("shapes")
        json.dump([dict(image=data.names[i], caption=data.references(i)[0]) for i in data.splits["test"]], file)
    rng = np.random.default_rng(0)
    (world / "photos").mkdir()
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(world / "photos" / name)

    captions = [(name, f"a dog {i} runs") for i, name in enumerate(("a.png", "b.jpg", "c.webp"))]
    (world / "captions").mkdir()
    write = lambda name, text: (world / "captions" / name).write_text(text)
    write("captions.csv", "image,caption,split\n" + "".join(f"{n},{t},train\n" for n, t in captions))
    write("rows.jsonl", "".join(json.dumps(dict(image=n, caption=t, split="train")) + "\n" for n, t in captions))
    write("list.json", json.dumps([dict(image=n, caption=t, split="train") for n, t in captions]))
    write("coco_train.json", json.dumps(dict(images=[dict(id=i, file_name=n) for i, (n, _) in enumerate(captions)],
                                             annotations=[dict(image_id=i, id=i, caption=t)
                                                          for i, (_, t) in enumerate(captions)])))
    write("karpathy.json", json.dumps(dict(images=[dict(filename=n, split="train", sentences=[dict(raw=t)], cocoid=i)
                                                   for i, (n, t) in enumerate(captions)])))
    write("flickr.txt", "".join(f"{n}#0\t{t}\n" for n, t in captions))
    write("Flickr_8k.trainImages.txt", "a.png\nb.jpg\nc.webp\n")
    with zipfile.ZipFile(world / "photos.zip", "w") as archive:
        for file in sorted((world / "photos").iterdir()):
            archive.write(file, file.name)
        archive.writestr("captions.csv", (world / "captions/captions.csv").read_text())
    with open(world / "predictions.json", "w") as file:
        json.dump([dict(image="8.jpg", caption="a dog")], file)

    source = world / "source"
    for name in ("gpt2", "vit", "timm", "sharded"):
        (source / name).mkdir(parents=True)
    gpt2 = randomize(GPT2(GPT2Config(300, 32, 1, 2, 8)))
    tensors = {n: t.T if "c_" in n and t.ndim > 1 else t for n, t in gpt2.state_dict().items()}
    checkpoint.write_tensors(source / "gpt2/model.safetensors", tensors)
    (source / "gpt2/config.json").write_text(json.dumps(dict(
        n_head=2, layer_norm_epsilon=1e-5, activation_function="gelu_new", scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False, model_type="gpt2", vocab_size=300)))
    timm = torch.load(FIXTURES / "timm.pth", weights_only=True)
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "cls_token": "embeddings.cls_token",
             "pos_embed": "embeddings.position_embeddings", "norm": "layernorm", "head": "classifier"}
    inside = {"norm1": "layernorm_before", "attn.proj": "attention.output.dense", "norm2": "layernorm_after",
              "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    names |= {f"blocks.{i}.{a}": f"encoder.layer.{i}.{b}" for i in range(4) for a, b in inside.items()}
    tensors = {}
    for name, tensor in timm.items():
        stem, _, end = name.rpartition(".")
        if "qkv" in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3)):
                tensors[f"encoder.layer.{name.split('.')[1]}.attention.attention.{part}.{end}"] = piece.clone()
        else:
            tensors[names.get(name) or f"{names[stem]}.{end}"] = tensor
    checkpoint.write_tensors(source / "vit/model.safetensors", tensors)
    (source / "vit/config.json").write_text(json.dumps(dict(
        num_attention_heads=3, layer_norm_eps=1e-12, hidden_act="gelu", model_type="vit", image_size=8)))
    (source / "vit/preprocessor_config.json").write_text(json.dumps(dict(
        image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], size=dict(height=8, width=8), resample=2,
        do_center_crop=False)))
    shutil.copy(FIXTURES / "timm.pth", source / "timm/pytorch_model.bin")
    (source / "timm/config.json").write_text(json.dumps(dict(pretrained_cfg=dict(
        mean=[0.5] * 3, std=[0.5] * 3, crop_pct=0.9, interpolation="bicubic", input_size=[3, 8, 8]))))
    halves = list(tensors.items())
    for number, half in enumerate((halves[::2], halves[1::2])):
        checkpoint.write_tensors(source / f"sharded/{number}.safetensors", dict(half))
    (source / "sharded/model.safetensors.index.json").write_text(json.dumps(dict(
        metadata=dict(total_size=1), weight_map={n: f"{i % 2}.safetensors" for i, (n, _) in enumerate(halves)})))
    (source / "sharded/config.json").write_text((source / "vit/config.json").read_text())
    shutil.copy(FIXTURES / "google.npz", source / "google.npz")
    shutil.copy(FIXTURES / "torchvision.pth", source / "torchvision.pth")
    shutil.copytree(FIXTURES / "tensorflow", source / "tensorflow")
    torch.save(published_state(), source / "published.pth")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), "source/script.pt")
    for script, *args in ([*SAMPLE, "complete", "--attention", "../look.png", "--json", "../json"],
                          [*EVALUATE, "--checkpoint", "complete", "--data", "data"],
                          [*CONVERT[:-1], "../new", "--gpt2", "source/gpt2"], [*CONVERT[:-1], "../new", "--vit", "source/vit"],
                          [*PREPARE[:-2], "../set", "--captions", "captions/captions.csv"]):
        sys.argv = [script, *args]
        sys.modules[script.removesuffix(".py")].main()
    os.chdir(TESTS)


RUN = dict(data="data", weights="weights", out="run", device="cpu", batch_size=3, epochs=50, warmup_steps=2,
           eval_interval=2, save_interval=1, log_interval=1, num_samples=1, eval_images=2)
SAMPLE = ["sample.py", "photos/a.png", "--max-length", "4", "--checkpoint"]
EVALUATE = ["evaluate.py", "--max-length", "4", "--limit", "1"]
TRAIN = ["train.py", *(f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()), "--max-steps=1"]
RESUME = ["train.py", "--resume", "--out=run", "--max-steps=3"]
PREPARE = ["prepare_flickr8k.py", "--images", "photos", "--image-size", "16", "--out", "set", "--captions"]
CONVERT = ["convert_weights.py", "--out", "new"]
RUN_OUTPUTS = ("run", "data/features-*")


# --------------------------------------------------------------------------------------------------
# cases: JSON

DEEP = object()
VALUES = {"null": None, "text": "text", "list": [], "object": {}, "negative": -1, "fraction": 1.5, "huge": 1e30,
          "true": True, "deep": DEEP, "nan": float("nan"), "gone": ...}


def mutations(value, path=()):
    """(path, label, function that makes the change in place) for everything in a JSON value.

    Of a list only the first element is looked into.
    """
    if path:
        for label, new in VALUES.items():
            yield path, label, new
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, held in inner:
        yield from mutations(held, (*path, key))


def changed(content, path, new):
    """A copy of a JSON value with `new` at `path`; as text, since some of it is too deep for json.dumps."""
    content = copy.deepcopy(content)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    if new is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = "DEEP" if new is DEEP else new
    return json.dumps(content).replace('"DEEP"', "[" * 100_000 + "]" * 100_000)


# what a field may be besides what it is: {name of the field: labels}; anything else has to be refused
FREE_TEXT = {"text"}
ACCEPTED = {
    # config.json
    "training": {"null", "object"}, "cross_attention": {"null"}, "model.vit.dropout": {"gone?"},
    "mean.0": {"negative", "fraction"}, "std.0": {"fraction"}, "eps": {"fraction?"}, "cross_attention.0": set(),
    "backbones": {"object?"}, "backbones.vit.file": {"text"}, "backbones.gpt2.file": {"text"}, "conv_stem": {"gone?"},
    "resize": {"text", "negative", "gone"}, "crop": {"text", "negative", "gone"},
    "filter": {"text", "negative", "gone"}, "transform": {"object"}, "path": {"text"},
    **{name: {"true"} for name in ("final_norm", "clean_captions", "scale_attn_weights")},
    **{f"training.{name}": {f"{label}?" for label in VALUES} for name in
       ("step", "val_loss", "val_loss_shuffled", "preset", "data", "photographs", "blind", "source", "note")},
}


def json_cases(part, args, parts, outputs=(), accepted=ACCEPTED, rewrite=None, lines=1):
    """Every field of the JSON file `part` replaced by everything in VALUES, and the file as a whole damaged."""
    content = None

    def load(folder):
        nonlocal content
        text = (folder / part).read_text()
        content = json.loads(text.splitlines()[0] if part.endswith(".jsonl") else text)
        return content

    def write(folder, text):
        rest = (folder / part).read_text().split("\n", 1)[1] if part.endswith(".jsonl") else ""
        (folder / part).write_text(text + "\n" + rest if rest else text)

    for path, label, new in mutations(load(WORLD)):
        name = next((str(step) for step in reversed(path) if isinstance(step, str)), "")
        name += ".0" * isinstance(path[-1], int)
        full = ".".join(map(str, path))
        want = OK if label in accepted.get(full, accepted.get(name, ())) else ERROR
        want = ANY if f"{label}?" in accepted.get(full, accepted.get(name, ())) else want
        text = changed(content, path, new)
        yield Case(f"{args[0]} {part}: {full} {label}", args, parts, lambda f, text=text: write(f, text), want,
                   outputs, lines=lines)
    whole = {"empty": "", "no json": "{", "deep": "[" * 100_000, "null": "null", "list": "[]", "number": "1",
             "text": '"x"', "object": "{}", "digits": "1" * 5000, "binary": None}
    for label, text in whole.items():
        yield Case(f"{args[0]} {part}: {label}", args, parts,
                   lambda f, text=text: (f / part).write_bytes(os.urandom(99)) if text is None else
                   (f / part).write_text(text), ANY if f"{label}?" in accepted.get("", ()) else ERROR, outputs,
                   lines=lines)


# --------------------------------------------------------------------------------------------------
# cases: any file


def replace(file, make):
    """A damage: `file` becomes what make(path) leaves there."""
    def damage(folder):
        path = folder / file
        content = path.read_bytes() if path.is_file() else b""
        if path.exists():
            path.unlink()
        make(path, content)
    return damage


def flip(content, at, bit=0x40):
    changed = bytearray(content)
    changed[at % len(changed)] ^= bit
    return bytes(changed)


DAMAGES = {
    "empty": lambda p, c: p.write_bytes(b""),
    "halved": lambda p, c: p.write_bytes(c[: len(c) // 2]),
    "one byte shorter": lambda p, c: p.write_bytes(c[:-1]),
    "one byte longer": lambda p, c: p.write_bytes(c + b"\0"),
    "zeros": lambda p, c: p.write_bytes(bytes(len(c))),
    "random": lambda p, c: p.write_bytes(b"\x9b" + hashlib.sha512(c).digest() * (len(c) // 64 + 1)),
    "pipe": lambda p, c: os.mkfifo(p),
    "zero device": lambda p, c: p.symlink_to("/dev/zero"),
    "folder": lambda p, c: p.mkdir(),
    "loop": lambda p, c: p.symlink_to(p),
    "html": lambda p, c: p.write_bytes(b"<html><body>404</body></html>"),
    "lfs": lambda p, c: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "pickle": lambda p, c: p.write_bytes(PICKLE),
}
PICKLE = b"cos\nsystem\n(S'touch pwned'\ntR."


def file_cases(part, args, parts, outputs=(), fine=(), skip=(), lines=1):
    for label, make in DAMAGES.items():
        if label not in skip:
            fine_here = {*fine, *(["one byte shorter?"] if part.endswith(".json") else [])}
            want = OK if label in fine_here else ANY if f"{label}?" in fine_here else ERROR
            yield Case(f"{args[0]} {part}: {label}", args, parts, replace(part, make), want, outputs, lines=lines)


# --------------------------------------------------------------------------------------------------
# cases: pictures


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *more, rows=b""):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + png_chunk(b"IDAT", zlib.compress(rows)) + \
        png_chunk(b"IEND", b"")


def picture(form, size=(20, 30), **options):
    from PIL import Image
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, form, **options)
    return file.getvalue()


def pictures():
    """{name: (content, how captioning it should end)}"""
    jpeg, small = picture("JPEG"), picture("PNG")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n1 1 moveto showpage\n%%EOF\n"
    long_exif = b"\xff\xe1" + struct.pack(">H", 2 + 6 + 60) + b"Exif\0\0" + b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 50
    from PIL import Image
    exif = Image.Exif()
    exif[0x0112] = 99
    found = {
        "postscript.jpg": (postscript, ERROR), "postscript.png": (postscript, ERROR),
        "empty.jpg": (b"", ERROR), "text.jpg": (b"hello\n", ERROR), "html.jpg": (b"<html></html>", ERROR),
        "halved.jpg": (jpeg[: len(jpeg) // 2], ERROR), "halved.png": (small[: len(small) // 2], ERROR),
        "header.jpg": (jpeg[:4], ERROR), "header.png": (small[:20], ERROR),
        "zeros.jpg": (bytes(5000), ERROR), "pdf.jpg": (b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n", ERROR),
        "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', ERROR),
        "huge.png": (png(60_000, 60_000), ERROR), "wide.png": (png(2**31 - 1, 1), ERROR),
        "large.png": (png(13_500, 13_500), ERROR), "flat.png": (png(0, 5), ERROR),
        "checksum.png": (flip(small, -20), ERROR), "no_rows.png": (png(20, 20), ERROR),
        "long_text.png": (png(1, 1, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))), rows=bytes(4)), ANY),
        "exif.jpg": (jpeg[:2] + long_exif + jpeg[2:], OK),
        "orientation.jpg": (picture("JPEG", exif=exif), OK),
        "icc.jpg": (picture("JPEG", icc_profile=os.urandom(300)), OK),
        "icc.png": (picture("PNG", icc_profile=b"garbage"), OK),
        "one.png": (picture("PNG", (1, 1)), OK), "thin.png": (picture("PNG", (3000, 1)), OK),
        "disguised.jpg": (small, OK), "gif.png": (picture("GIF"), OK), "tiff.jpg": (picture("TIFF"), OK),
        "halved.webp": (picture("WEBP")[:60], ERROR), "avif.jpg": (picture("AVIF"), OK),
        "halved.avif.jpg": (picture("AVIF")[:200], ERROR), "halved.gif": (picture("GIF")[:300], ERROR),
        "halved.bmp": (picture("BMP")[:300], ERROR), "halved.tif": (picture("TIFF")[:200], ERROR),
        "bmp_size.bmp": (picture("BMP")[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + picture("BMP")[26:], ERROR),
        "icns.png": (b"icns" + struct.pack(">I", 40) + bytes(32), ERROR),
        "psd.png": (b"8BPS\0\1" + bytes(40), ERROR), "ppm.jpg": (b"P6 2 2 255 " + bytes(12), ERROR),
        "tga.jpg": (bytes([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2, 0, 24, 0]) + bytes(12), ERROR),
        "fits.jpg": (b"SIMPLE  =                    T" + bytes(3000), ERROR),
        "wmf.jpg": (b"\xd7\xcd\xc6\x9a" + bytes(60), ERROR), "xbm.jpg": (b"#define a_width 8\n#define a_height 8\n"
                                                                          b"static char a[]={0};\n", ERROR),
        "mpo.jpg": (picture("MPO"), OK), "ico.png": (picture("ICO"), ERROR),
    }
    for number in range(24):                         # one byte changed, anywhere: whatever it is, no more than a line
        content, suffix = (jpeg, "jpg") if number % 2 else (picture("TIFF" if number % 4 else "WEBP"), "tif")
        found[f"flipped_{number}.{suffix}"] = (flip(content, number * 997 % min(len(content), 700), 0xFF), ANY)
    return found


def picture_cases():
    checkpoint = ["--checkpoint", "complete", "--max-length", "3"]
    for name, (content, want) in pictures().items():
        def put(folder, name=name, content=content):
            (folder / "x").mkdir()
            (folder / "x" / name).write_bytes(content)

        def pack(folder, name=name, content=content):
            with zipfile.ZipFile(folder / "photos.zip", "a") as archive:
                archive.writestr(f"x/{name}", content)
            text = (folder / "captions/captions.csv").read_text()
            (folder / "captions/captions.csv").write_text(text + f"x/{name},a cat,train\n")

        yield Case(f"sample.py {name}", ["sample.py", f"x/{name}", *checkpoint], ("complete",), put, want)
        yield Case(f"sample.py - {name}", ["sample.py", "-", *checkpoint], ("complete",), None, want, stdin=content)
        yield Case(f"sample.py folder of {name}", ["sample.py", "x", *checkpoint, "--json", "out.json", "--save",
                                                   "out.png"], ("complete",), put, want, ("out.json", "out.png"))
        yield Case(f"convert_weights.py --check {name}",
                   [*CONVERT, "--vit", "source/torchvision.pth", "--heads", "3", "--check", f"x/{name}"],
                   ("source/torchvision.pth",), put, want, () if want == ERROR else ("new",))
        yield Case(f"prepare_flickr8k.py zip with {name}",
                   [word.replace("photos", "photos.zip") for word in PREPARE] + ["captions/captions.csv"],
                   ("photos.zip", "captions/captions.csv", "weights/tokenizer.json"), pack, OK, ("set",))


# --------------------------------------------------------------------------------------------------
# cases: names, and what is no picture at all

NEWLINE, BYTES, ESCAPE = "a\nb.png", os.fsdecode(b"\xff\xfe.png"), "\x1b[31mred.png"


def name_cases():
    checkpoint = ["--checkpoint", "complete", "--max-length", "3"]

    def put(name, content=None):
        def damage(folder):
            (folder / "x").mkdir()
            (folder / "x" / name).write_bytes(picture("PNG") if content is None else content)
        return damage

    outputs = ["--json", "out.json", "--csv", "out.csv", "--save", "out.png", "--attention", "look.png"]
    made = ("out.json", "out.csv", "out.png", "look.png")
    for label, name in dict(newline=NEWLINE, bytes=BYTES, escape=ESCAPE, tab="a\tb.png", dash="-.png",
                            long="x" * 250 + ".png", bracket="[a].png", star="*.png", percent="%s{}.png").items():
        yield Case(f"sample.py name {label}", ["sample.py", "x", *checkpoint, *outputs], ("complete",), put(name), OK, made)
        yield Case(f"sample.py name {label} given", ["sample.py", f"x/{name}", *checkpoint, *outputs],
                   ("complete",), put(name), OK, made)
        yield Case(f"sample.py bad picture {label}", ["sample.py", f"x/{name}", *checkpoint], ("complete",),
                   put(name, b"no picture"))
        yield Case(f"sample.py missing {label}", ["sample.py", f"x/no{name}", *checkpoint], ("complete",))
        yield Case(f"prepare_flickr8k.py name {label}", [*PREPARE[:2], "x", *PREPARE[3:], "captions/list.json"],
                   ("weights/tokenizer.json", "captions/list.json"),
                   lambda f, name=name: (put(name)(f), (f / "captions/list.json").write_text(
                       json.dumps([dict(image=name, caption="a dog", split="train")]))), OK, ("set",))
    special = {"pipe": lambda p: os.mkfifo(p), "zero": lambda p: p.symlink_to("/dev/zero"),
               "random": lambda p: p.symlink_to("/dev/urandom"), "folder": lambda p: p.mkdir(),
               "loop": lambda p: p.symlink_to(p), "dangling": lambda p: p.symlink_to("/nowhere"),
               "socket": lambda p: bind(p), "tty": lambda p: p.symlink_to("/dev/tty"),
               "memory": lambda p: p.symlink_to("/proc/self/mem"), "large": lambda p: os.truncate(
                   os.open(p, os.O_CREAT | os.O_RDWR), 2**40)}
    for label, make in special.items():
        def damage(folder, make=make):
            make(folder / "x.jpg")

        yield Case(f"sample.py picture is {label}", ["sample.py", "x.jpg", *checkpoint], ("complete",), damage)
        yield Case(f"sample.py folder with {label}", ["sample.py", ".", *checkpoint], ("complete",), damage)
        yield Case(f"convert_weights.py --check is {label}",
                   [*CONVERT, "--vit", "source/torchvision.pth", "--heads", "3", "--check", "x.jpg"],
                   ("source/torchvision.pth",), damage)
        yield Case(f"prepare_flickr8k.py folder with {label}", [*PREPARE, "captions/captions.csv"],
                   ("photos", "captions/captions.csv", "weights/tokenizer.json"),
                   lambda f, make=make: (make(f / "photos/x.jpg"), (f / "captions/captions.csv").write_text(
                       "image,caption,split\na.png,a dog,train\nx.jpg,a dog,train\n")), OK, ("set",))
        for part, args, parts in (("x.csv", [*PREPARE, "x.csv"], ("photos", "weights/tokenizer.json")),
                                  ("x.json", [*PREPARE, "x.json"], ("photos", "weights/tokenizer.json")),
                                  ("x.zip", [*PREPARE, "x.zip"], ("photos", "weights/tokenizer.json")),
                                  ("x.zip", ["prepare_flickr8k.py", "--images", "x.zip", "--out", "set"],
                                   ("weights/tokenizer.json",)),
                                  ("x.json", [*EVALUATE[:1], "--data", "data", "--predictions", "x.json"], ("data",)),
                                  ("x.safetensors", [*CONVERT, "--vit", "x.safetensors"], ()),
                                  ("x.npz", [*CONVERT, "--vit", "x.npz"], ()), ("x.pth", [*CONVERT, "--gpt2", "x.pth"], ()),
                                  ("x.bin", [*CONVERT, "--vision-gpt", "x.bin"], ()),
                                  ("x", [*CONVERT, "--checkpoint", "x"], ()),
                                  ("x", ["sample.py", "photos/a.png", "--checkpoint", "x"], ("photos",)),
                                  ("x", [*SAMPLE, "fusion", "--weights", "x"], ("photos", "fusion")),
                                  ("x", [*EVALUATE, "--checkpoint", "x", "--data", "data"], ("data",)),
                                  ("x", [*EVALUATE, "--checkpoint", "complete", "--data", "x"], ("complete",)),
                                  ("x", [*TRAIN, "--data=x", "--out=new"], ("weights",)),
                                  ("x", [*TRAIN, "--init-from=x", "--out=new"], ("data",)),
                                  ("x", [*TRAIN, "--vit=x", "--out=new"], ("data", "weights")),
                                  ("x", [*TRAIN, "--gpt2=x", "--out=new"], ("data", "weights")),
                                  ("x", [*TRAIN, "--weights=x", "--out=new"], ("data",)),
                                  ("x", [*TRAIN, "--out=x"], ("data", "weights")),
                                  ("x", [*CONVERT[:1], "--vit", "source/torchvision.pth", "--heads", "3", "--out", "x"],
                                   ("source/torchvision.pth",)),
                                  ("x", ["prepare_shapes.py", "--train-scenes", "2", "--eval-scenes", "1", "--out", "x"], ())):
            if label == "folder" and args[-1].endswith(("--out", "=x", "x")) and ("--out" in args[-2:] or args[-1] == "--out=x"):
                continue                             # an empty folder is a fine place
            option = next((a for a in args if a.startswith("--") and (a.endswith("=x") or args[-1].startswith("x"))), "")
            yield Case(f"{args[0]} {option} {part} is {label}: {args[-2]}", args, parts,
                       lambda f, make=make, part=part: make(f / part), ERROR, ("new/.lock", "new"))


def bind(path):
    with socket.socket(socket.AF_UNIX) as opened, contextlib.chdir(path.parent):
        opened.bind(path.name)


# --------------------------------------------------------------------------------------------------
# cases: outputs


def output_cases():
    """An output that names an input or somebody's file is refused, and the file stays."""
    model = ["--checkpoint", "complete", "--max-length", "3"]

    def mine(*names, content=b"mine"):
        def damage(folder):
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        return damage

    def bare(folder):
        shutil.copy(folder / "photos/a.png", folder / "photos/bare")

    def linked(folder):
        (folder / "link.png").symlink_to("photos/a.png")
        os.link(folder / "photos/a.png", folder / "hard.png")

    for flag in ("--save", "--attention", "--json", "--csv"):
        for spelled in ("photos/a.png", "./photos/a.png", "photos/../photos/a.png", "photos//a.png"):
            for source in ("photos/a.png", "photos", "photos/*.png"):
                yield Case(f"sample.py {flag} {spelled} of {source}", ["sample.py", source, flag, spelled, *model],
                           ("photos", "complete"))
        for spelled in ("link.png", "hard.png"):
            yield Case(f"sample.py {flag} {spelled}", ["sample.py", "photos/a.png", flag, spelled, *model],
                       ("photos", "complete"), linked)
        yield Case(f"sample.py {flag} of link", ["sample.py", "link.png", flag, "photos/a.png", *model],
                   ("photos", "complete"), linked)
        yield Case(f"sample.py {flag} bare", ["sample.py", "photos/bare", flag, "photos/bare", *model],
                   ("photos", "complete"), bare)
        for target in ("complete/config.json", "complete/model.safetensors", "complete/tokenizer.json"):
            yield Case(f"sample.py {flag} {target}", ["sample.py", "photos/a.png", flag, target, *model],
                       ("photos", "complete"))
        for other in ("--save", "--attention", "--json", "--csv"):
            if other < flag:
                for twice in ("out.png", "./out.png"):
                    yield Case(f"sample.py {flag} and {other} {twice}",
                               ["sample.py", "photos/a.png", flag, "out.png", other, twice, *model],
                               ("photos", "complete"))
        for target in ("none/out.png", "photos", "", "out.png/", "/dev/null/x.png"):
            yield Case(f"sample.py {flag} {target!r}", ["sample.py", "photos/a.png", flag, target, *model],
                       ("photos", "complete"))
        yield Case(f"sample.py {flag} pipe", ["sample.py", "photos/a.png", flag, "x.png", *model],
                   ("photos", "complete"), lambda f: os.mkfifo(f / "x.png"))
    evaluated = [*EVALUATE, "--checkpoint", "complete", "--data", "data"]
    inputs = ("complete/config.json", "data/meta.json", "data/images.bin", "data/captions.json")
    for flag in ("--json", "--grid", "--save-predictions"):
        for target in inputs:
            yield Case(f"evaluate.py {flag} {target}", [*evaluated, flag, target], ("complete", "data"))
        yield Case(f"evaluate.py {flag} predictions", ["evaluate.py", "--predictions", "predictions.json", "--data",
                                                       "data", flag, "./predictions.json"], ("predictions.json", "data"))
        for other in ("--json", "--grid", "--save-predictions"):
            if other < flag:
                yield Case(f"evaluate.py {flag} and {other}", [*evaluated, flag, "out.png", other, "./out.png"],
                           ("complete", "data"))
    set_files = ("captions.json", "images.bin", "meta.json", "tokens.bin", "index.npz", "tokenizer.json")
    for name in set_files:
        parts = ("photos", "captions/captions.csv", "weights/tokenizer.json")
        yield Case(f"prepare_flickr8k.py --out with {name}", [*PREPARE, "captions/captions.csv"], parts, mine(f"set/{name}"))
        shapes = ["prepare_shapes.py", "--train-scenes", "2", "--eval-scenes", "1", "--out", "set"]
        yield Case(f"prepare_shapes.py --out with {name}", shapes, (), mine(f"set/{name}"))
        yield Case(f"train.py --preset shapes with {name}",
                   ["train.py", "--preset", "shapes", "--data", "set", "--max-steps", "1", "--out", "run"], (),
                   mine(f"set/{name}"), ERROR, ("run",))
    yield Case("prepare_shapes.py --out with scenes.jsonl", shapes, (), mine("set/scenes.jsonl"))
    yield Case("prepare_flickr8k.py --out is the captions' folder",
               [*PREPARE[:-2], "captions", "--captions", "captions/captions.json"], ("photos", "weights/tokenizer.json"),
               mine("captions/captions.json", content=b'[{"image": "a.png", "caption": "a dog", "split": "train"}]'))
    yield Case("prepare_flickr8k.py --out beside other files", [*PREPARE, "captions/captions.csv"],
               ("photos", "captions/captions.csv", "weights/tokenizer.json"), mine("set/thesis.tmp", "set/notes.txt"), OK,
               ("set/[ctim]*.[jbn]*",))
    for name in ("vit.safetensors", "gpt2.safetensors", "model.safetensors", "config.json", "tokenizer.json",
                 "README.md"):
        yield Case(f"convert_weights.py --out with {name}",
                   ["convert_weights.py", "--vit", "source/vit", "--gpt2", "source/gpt2", "--out", "set"],
                   ("source/vit", "source/gpt2"), mine(f"set/{name}"),
                   ERROR if name[0] in "vg" else ANY if name[0] == "t" else OK,
                   {"v": (), "g": ("set/vit*",)}.get(name[0], ("set/vit*", "set/gpt2*")))
        yield Case(f"convert_weights.py --checkpoint --out with {name}",
                   ["convert_weights.py", "--checkpoint", "complete", "--out", "set"], ("complete",), mine(f"set/{name}"),
                   OK if name[0] in "vg" else ERROR,
                   ("set/model*", "set/config*", "set/tokenizer*", "set/README.md") if name[0] in "vg" else ())
        yield Case(f"convert_weights.py --vision-gpt --out with {name}",
                   ["convert_weights.py", "--vision-gpt", "source/published.pth", "--heads", "3", "--out", "set"],
                   ("source/published.pth",), mine(f"set/{name}"),
                   OK if name[0] in "vg" else ANY if name[0] == "t" else ERROR,
                   ("set/model*", "set/config*", "set/README.md") if name[0] in "vgt" else ())
    for out in ("complete", "./complete", "complete/../complete"):
        yield Case(f"convert_weights.py --checkpoint --out {out}",
                   ["convert_weights.py", "--checkpoint", "complete", "--out", out], ("complete",))
    yield Case("convert_weights.py --gpt2 --out where it is", ["convert_weights.py", "--gpt2", "source/gpt2", "--out",
                                                               "source/gpt2"], ("source/gpt2",), None, OK,
               ("source/gpt2/gpt2.safetensors", "source/gpt2/tokenizer.json"))
    yield Case("convert_weights.py --out over another checkpoint",
               ["convert_weights.py", "--vision-gpt", "source/published.pth", "--heads", "3", "--out", "complete"],
               ("source/published.pth", "complete"))
    yield Case("convert_weights.py --out over a run",
               ["convert_weights.py", "--vision-gpt", "source/published.pth", "--heads", "3", "--out", "run"],
               ("source/published.pth", "run"))
    fresh = ("data", "weights")
    yield Case("train.py --out with *.tmp", [*TRAIN, "--out=new"], fresh, mine("new/thesis.tmp", "new/a.1.tmp"), OK,
               ("new/[.cflst]*[!p]", "new/[cfls]*", "data/features-*", "new/tr*", "new/to*", "new/drafts*"))
    for name in ("tokenizer.json", "log.jsonl", "samples.png", "loss.png", "config.json", "fusion.safetensors",
                 "model.safetensors", "training_state.pt"):
        yield Case(f"train.py --out with {name}", [*TRAIN, "--out=new"], fresh, mine(f"new/{name}"), ERROR, ("new/.lock",))
    yield Case("train.py --out is the data", [*TRAIN, "--out=data"], fresh, None, ERROR, ("data/.lock",))
    yield Case("train.py --out is the weights", [*TRAIN, "--out=weights"], fresh, None, ERROR, ("weights/.lock",))
    yield Case("train.py --out is --init-from", [*TRAIN, "--init-from=complete", "--out=complete"],
               (*fresh, "complete"), None, ERROR, ("complete/.lock",))
    yield Case("train.py --out is --init-from, overwritten", [*TRAIN, "--init-from=complete", "--out=complete",
                                                              "--overwrite"], (*fresh, "complete"), None, ERROR,
               ("complete/.lock",))
    yield Case("bench.py --json folder", ["bench.py", "--json", "photos"], ("photos",))
    yield Case("bench.py --json nowhere", ["bench.py", "--json", "none/x.json"], ())


# --------------------------------------------------------------------------------------------------
# cases: numbers and words on the command line


def number_cases():
    import dataclasses
    import typing

    import convert_weights
    import evaluate
    import prepare_flickr8k
    import prepare_shapes
    import sample
    import train

    picture_, model, data = ("photos/a.png",), ("complete",), ("data",)
    commands = [
        (sample.SampleConfig, ["sample.py", "photos/a.png", "--checkpoint", "complete", "--max-length", "3"],
         picture_ + model, ()),
        (evaluate.EvaluateConfig, [*EVALUATE, "--checkpoint", "complete", "--data", "data"], model + data, ()),
        (prepare_flickr8k.PrepareConfig, [*PREPARE, "captions/captions.csv"],
         ("photos", "captions/captions.csv", "weights/tokenizer.json"), ("set",)),
        (prepare_shapes.ShapesConfig, ["prepare_shapes.py", "--train-scenes", "2", "--eval-scenes", "1", "--out", "set"],
         (), ("set",)),
        (convert_weights.ConvertConfig, [*CONVERT, "--vit", "source/torchvision.pth"], ("source/torchvision.pth",),
         ("new",)),
        (train.TrainConfig, [*TRAIN, "--out=new"], ("data", "weights"), ("new", "data/features-*")),
    ]
    values = ["-1", "0", "1000000", "1e9", "nan", "inf", "-inf", "1e-300", "1e300", "9" * 30, "x", "", "½", "1_0", " 1",
              "9223372036854775807"]
    for config, args, parts, outputs in commands:
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            kinds = {hints[field.name], *typing.get_args(hints[field.name])}
            if "help" not in field.metadata or not kinds & {int, float}:
                continue
            for value in values:
                yield Case(f"{args[0]} --{field.name}={value}", [*args, f"--{field.name}={value}"], parts, None,
                           ANY if re.match(r"\d|-1|½|inf| ", value) else ERROR, outputs)
    for text in ("\udcff", "\x00"[:0], "é" * 5000, "a\nb", "<|endoftext|>", "\x1b[2J"):
        yield Case(f"sample.py --prompt {text[:9]!r}", [*SAMPLE, "complete", "--prompt", text], picture_ + model, None, ANY)
    for name in ("sample", "evaluate", "prepare_flickr8k", "prepare_shapes", "convert_weights", "train", "bench"):
        yield Case(f"{name}.py --no-such", [f"{name}.py", "--no-such"], ())
        yield Case(f"{name}.py --help", [f"{name}.py", "--help"], (), None, OK)
        yield Case(f"{name}.py unknown with newline", [f"{name}.py", "--no\nsuch"], ())
    for value in ("", "cuda", "xpu", "a\nb"):
        yield Case(f"sample.py --device {value!r}", [*SAMPLE, "complete", "--device", value], picture_ + model)
        yield Case(f"sample.py --dtype {value!r}", [*SAMPLE, "complete", "--dtype", value], picture_ + model)


# --------------------------------------------------------------------------------------------------
# cases: archives


def archive_cases():
    parts = ("photos", "captions", "photos.zip", "weights/tokenizer.json")
    unzip = ["prepare_flickr8k.py", "--images", "x.zip", "--image-size", "16", "--out", "set"]

    def archive(write):
        def damage(folder):
            with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as opened:
                write(opened, folder)
        return damage

    def good(opened, folder):
        for name in ("a.png", "b.jpg", "c.webp"):
            opened.write(folder / "photos" / name, name)
        opened.write(folder / "captions/captions.csv", "captions.csv")

    def bomb(name, size):
        def write(opened, folder):
            good(opened, folder)
            with opened.open(name, "w", force_zip64=True) as member:
                for _ in range(size >> 24):
                    member.write(bytes(1 << 24))
        return write

    def many(opened, folder):
        good(opened, folder)
        for number in range(20_000):
            opened.writestr(zipfile.ZipInfo(f"x/{number}.jpg"), b"")

    def paths(opened, folder):
        good(opened, folder)
        for name in ("../evil.jpg", "/etc/evil.jpg", "C:\\evil.jpg", "a\nb.jpg", "con.jpg"):
            opened.writestr(name, picture("JPEG"))

    def patched(at, new):
        def damage(folder):
            archive(good)(folder)
            content = bytearray((folder / "x.zip").read_bytes())
            where = content.index(b"PK\1\2") + at if at >= 0 else len(content) + at
            content[where : where + len(new)] = new
            (folder / "x.zip").write_bytes(content)
        return damage

    yield Case("zip good", unzip, parts, archive(good), OK, ("set",))
    yield Case("zip picture bomb", unzip, parts, archive(bomb("a.jpg", 2**28)), OK, ("set",))
    yield Case("zip captions bomb", unzip, parts, archive(lambda o, f: (
        [o.write(f / "photos" / n, n) for n in ("a.png", "b.jpg")], bomb("captions.csv", 9 << 26)(o, f))), ERROR, (), lines=3)
    yield Case("zip json bomb", unzip, parts, archive(lambda o, f: bomb("captions_x.json", 9 << 26)(o, f)), ANY, ("set",))
    yield Case("zip of 20,000", unzip, parts, archive(many), ANY, ("set",))
    yield Case("zip with paths", unzip, parts, archive(paths), OK, ("set",))
    yield Case("zip in zip", unzip, parts, archive(lambda o, f: o.write(f / "photos.zip", "photos.zip")))
    yield Case("zip empty", unzip, parts, archive(lambda o, f: None))
    for label, at, new in (("version", 6, b"\xff\x00"), ("method 99", 10, b"\x63\x00"), ("lzma", 10, b"\x0e\x00"),
                           ("bzip2", 10, b"\x0c\x00"), ("encrypted", 8, b"\x01\x00"), ("crc", 16, b"\0\0\0\0"),
                           ("size", 24, b"\xff\xff\xff\x7f"), ("offset", 42, b"\xff\xff\xff\x7f"),
                           ("name length", 28, b"\xff\xff"), ("end", -10, b"\xff\xff\xff\xff"),
                           ("comment", -2, b"\xff\xff")):
        yield Case(f"zip {label}", unzip, parts, patched(at, new), ANY, ("set",), lines=2)
    yield from file_cases("photos.zip", [word.replace("photos", "photos.zip") for word in PREPARE] +
                          ["captions/captions.csv"], parts, ("set",), fine=("one byte longer?",))


def shard_cases():
    caption, parts = ["sample.py", "x.tar", "--checkpoint", "complete", "--max-length", "3"], ("complete", "photos/a.png")

    def shard(write, mode="w", **settings):
        def damage(folder):
            with tarfile.open(folder / "x.tar", mode, **settings) as opened:
                write(opened, folder)
        return damage

    def good(opened, folder):
        opened.add(folder / "photos/a.png", "a.png")

    def member(name="b.png", kind=tarfile.REGTYPE):
        def write(opened, folder):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            opened.addfile(info)
            good(opened, folder)
        return write

    def block(kind, size, claimed, name=b"x"):
        """A header of `kind` that claims a length, and what follows it."""
        info = tarfile.TarInfo(name.decode())
        info.type, info.size = kind, claimed
        return info.tobuf(tarfile.GNU_FORMAT)[-512:] + bytes(size)

    def raw(content):
        return lambda folder: (folder / "x.tar").write_bytes(content() if callable(content) else content)

    def cut(at):
        def damage(folder):
            shard(good)(folder)
            (folder / "x.tar").write_bytes((folder / "x.tar").read_bytes()[:at])
        return damage

    done = ("x.jsonl",)
    yield Case("tar good", caption, parts, shard(good), OK, done)
    for kind in ("SYMTYPE", "LNKTYPE", "CHRTYPE", "FIFOTYPE", "DIRTYPE"):
        yield Case(f"tar with {kind}", caption, parts,
                   shard(member(kind=getattr(tarfile, kind))), OK, done)
    for name in ("../evil.png", "/etc/evil.png", "a\nb.png", "\udcff.png", "x" * 5000 + ".png", ".png"):
        yield Case(f"tar with name {name[:12]!r}", caption, parts, shard(member(name)), ANY, done, lines=2)
    for mode in ("w:gz", "w:bz2", "w:xz"):
        yield Case(f"tar {mode}", caption, parts, shard(good, mode))
    for at in (0, 1, 100, 511, 512, 700):
        yield Case(f"tar cut at {at}", caption, parts, cut(at), ANY if at == 512 else ERROR, done if at == 512 else ())
    for label, content in {
            "is text": b"no archive" * 99, "is a picture": picture("PNG"),
            "empty picture": lambda: block(tarfile.REGTYPE, 0, 0, b"b.png") + bytes(1024),
            "size beyond the end": lambda: block(tarfile.REGTYPE, 0, 10**9, b"b.png") + bytes(1024),
            "size beyond any": lambda: block(tarfile.REGTYPE, 0, 2**62, b"b.png") + bytes(1024),
            "long name bomb": lambda: block(tarfile.GNUTYPE_LONGNAME, 0, 10**10) + bytes(1024),
            "pax bomb": lambda: block(tarfile.XHDTYPE, 0, 10**10) + bytes(1024),
            "names without end": lambda: block(tarfile.GNUTYPE_LONGNAME, 512, 5) * 3000}.items():
        yield Case(f"tar {label}", caption, parts, raw(content), ANY, done, lines=2)
    for label, prepare in {
            "pipe": lambda f: os.mkfifo(f / "x.jsonl.partial"), "folder": lambda f: (f / "x.jsonl.partial").mkdir(),
            "link": lambda f: os.symlink("photos/a.png", f / "x.jsonl.partial")}.items():
        yield Case(f"tar, its output is a {label}", caption, parts,
                   lambda folder, prepare=prepare: (shard(good)(folder), prepare(folder)))
    yield Case("tar, captioned by somebody else", caption, parts, lambda folder: (
        shard(good)(folder), (folder / "x.jsonl").write_text("mine")), OK)
    yield Case("tar is a folder", caption, parts, lambda folder: (folder / "x.tar").mkdir())
    yield Case("tar is a pipe", caption, parts, lambda folder: os.mkfifo(folder / "x.tar"))
    yield Case("tar, its folder is a file", [*caption, "--out", "photos/a.png"], parts, shard(good))


# --------------------------------------------------------------------------------------------------
# cases: the network


class Web(http.server.BaseHTTPRequestHandler):
    """A server whose every path is a way to misbehave."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        kind, content = self.path.strip("/").split(".")[0], picture("PNG")
        send = self.wfile.write
        with contextlib.suppress(OSError):
            if kind == "good":
                send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
            elif kind == "drip":
                send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not STOP.wait(0.3):
                    send(b"x")
            elif kind == "drip_headers":
                send(b"HTTP/1.1 200 OK\r\n")
                while not STOP.wait(0.3):
                    send(b"X-a: b\r\n")
            elif kind == "endless_headers":
                send(b"HTTP/1.1 200 OK\r\n")
                while not STOP.is_set():
                    send(b"X-a: " + b"b" * 60_000 + b"\r\n")
            elif kind == "endless_body":
                send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
                while not STOP.is_set():
                    send(bytes(1 << 20))
            elif kind == "endless_chunks":
                send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                while not STOP.is_set():
                    send(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            elif kind == "silent":
                STOP.wait(60)
            elif kind == "loop":
                send(b"HTTP/1.1 302 Found\r\nLocation: /loop.png\r\nContent-Length: 0\r\n\r\n")
            elif kind == "file":
                send(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n")
            elif kind == "newline":
                send(b"HTTP/1.1 404 No\x1b[31m such\r\nContent-Length: 0\r\n\r\n")
            else:
                lengths = {"short": b"99999", "negative": b"-5", "word": b"many", "huge": b"9" * 30, "empty": b"0"}
                if kind in lengths:
                    send(b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\nConnection: close\r\n\r\n" % lengths[kind] + content)
                elif kind == "gzip":
                    body = zlib.compress(bytes(10**8), 9)
                    send(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                elif kind == "garbage":
                    send(os.urandom(5000))
                elif kind == "code":
                    send(b"HTTP/1.1 99999 ?\r\n\r\n")
                elif kind == "postscript":
                    send(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 30\r\n\r\n%!PS-Adobe-3.0 EPSF"
                         + b" " * 11)
        self.close_connection = True


STOP = threading.Event()


def url_cases():
    for kind in ("good", "drip", "drip_headers", "endless_headers", "endless_body", "endless_chunks", "silent", "loop",
                 "file", "newline", "short", "negative", "word", "huge", "empty", "gzip", "garbage", "code",
                 "postscript", "missing"):
        yield Case(f"sample.py URL {kind}", ["sample.py", f"http://127.0.0.1:{PORT}/{kind}.png", "--checkpoint",
                                            "complete", "--max-length", "3"], ("complete",), None,
                   OK if kind == "good" else ANY if kind in ("huge", "negative", "word", "short") else ERROR)
        yield Case(f"convert_weights.py hub {kind}", [*CONVERT, "--vision-gpt", f"{kind}.x/y"], (), None, ERROR,
                   ("downloads",), lines=1)
    for url in ("http://", "http://[", "http://127.0.0.1:99999/", "http://a b/", "http://\x00/"[:8], "https://127.0.0.1:1/x",
                "http://user:pw@127.0.0.1:1/", "http://" + "a" * 70_000, "http://ü.invalid/", "HTTP://127.0.0.1:1/",
                "file:///etc/passwd", "ftp://127.0.0.1/x.png", "data:image/png;base64,xx", "http://127.0.0.1:1/a\nb"):
        yield Case(f"sample.py URL {url[:24]!r}", ["sample.py", url, "--checkpoint", "complete"], ("complete",))


# --------------------------------------------------------------------------------------------------
# cases: values that are none, in files that are whole


def with_tensors(file, change, metadata=None):
    """A damage: the tensors of a safetensors file changed by change(dict of numpy arrays), metadata by `metadata`.

    Without the checksum, by which the change would be noticed: files from before there was one have none.
    """
    def damage(folder):
        import numpy as np
        content = (folder / file).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        held = header.pop("__metadata__", {})
        held.pop("checksum", None)                   # by which all this would be noticed; old files have none
        arrays = {name: np.frombuffer(content[8 + length :][slice(*info["data_offsets"])], np.float32).reshape(
            info["shape"]).copy() for name, info in header.items()}
        arrays = change(arrays) or arrays
        if metadata:
            held = metadata(held)
        (folder / file).write_bytes(safetensors(arrays, held))
    return damage


def safetensors(arrays, metadata):
    kinds, header, at = {"float32": "F32", "float16": "F16", "int64": "I64", "float64": "F64", "uint8": "U8"}, {}, 0
    for name, array in arrays.items():
        header[name] = dict(dtype=kinds[str(array.dtype)], shape=list(array.shape), data_offsets=[at, at + array.nbytes])
        at += array.nbytes
    head = json.dumps({"__metadata__": metadata, **header}).encode()
    return struct.pack("<Q", len(head)) + head + b"".join(array.tobytes() for array in arrays.values())


def fill(value, which=0):
    def change(arrays):
        list(arrays.values())[which].reshape(-1)[0] = value
    return change


def weight_cases():
    import numpy as np
    loads = {
        "complete/model.safetensors": ([*SAMPLE, "complete"], ("photos/a.png", "complete"), ()),
        "fusion/fusion.safetensors": ([*SAMPLE, "fusion"], ("photos/a.png", "fusion", "weights"), ()),
        "weights/vit.safetensors": ([*TRAIN, "--out=new"], ("data/meta.json", "data", "weights"), ("new", "data/features-*")),
        "weights/gpt2.safetensors": ([*TRAIN, "--out=new"], ("data", "weights"), ("new", "data/features-*")),
        "source/gpt2/model.safetensors": ([*CONVERT, "--gpt2", "source/gpt2"], ("source/gpt2",), ("new",)),
        "source/vit/model.safetensors": ([*CONVERT, "--vit", "source/vit"], ("source/vit",), ("new",)),
    }
    for file, (args, parts, outputs) in loads.items():
        parts = tuple(part for part in parts if part != "data/meta.json")
        for label, value in dict(nan=float("nan"), infinite=float("inf"), minus=-float("inf"), huge=3e38).items():
            for which in (0, -1):
                yield Case(f"{args[0]} {file}: {label} {which}", args, parts, with_tensors(file, fill(value, which)),
                           ERROR, outputs)

        def renamed(arrays):
            return {f"{name}x": array for name, array in arrays.items()}

        def beyond(arrays):                          # the last block's names, with a number of 10^9
            return arrays | {re.sub(r"\.\d+\.", ".999999999.", name, count=1): array for name, array in arrays.items()}

        def wide(arrays):
            return {name: np.concatenate([array, array]) if array.ndim else array for name, array in arrays.items()}

        changes = dict(renamed=renamed, beyond=beyond, wide=wide, none=lambda a: {"x": np.zeros(1, np.float32)},
                       integers=lambda a: {n: t.astype(np.int64) for n, t in a.items()},
                       double=lambda a: {n: t.astype(np.float64) for n, t in a.items()},
                       empty=lambda a: {n: t[:0] if t.ndim else t for n, t in a.items()},
                       flat=lambda a: {n: t.reshape(-1) for n, t in a.items()},
                       fewer=lambda a: dict(list(a.items())[:-1]))
        for label, change in changes.items():
            fine = label in ("double", "integers") or (label == "beyond" and "none")
            yield Case(f"{args[0]} {file}: {label}", args, parts, with_tensors(file, change),
                       ANY if label in ("double", "integers") else ERROR, outputs)
        del fine
        for number in range(8):                      # a flipped byte: in the header refused; in the data found by its hash
            yield Case(f"{args[0]} {file}: flipped {number}", args, parts,
                       replace(file, lambda p, c, n=number: p.write_bytes(flip(c, (n * 131) if n < 4 else -n * 1013))),
                       ANY, outputs)
        yield from file_cases(file, args, parts, outputs)
        for label, header in {"long": struct.pack("<Q", 2**62), "zero": bytes(8), "negative": b"\xff" * 8}.items():
            yield Case(f"{args[0]} {file}: header {label}", args, parts,
                       replace(file, lambda p, c, h=header: p.write_bytes(h + c[8:])), ERROR, outputs)
    for file, args, parts, outputs in (
            ("weights/vit.safetensors", [*TRAIN, "--out=new"], ("data", "weights"), ("new", "data/features-*")),
            ("weights/gpt2.safetensors", [*SAMPLE, "fusion"], ("photos/a.png", "fusion", "weights"), ())):
        content = (WORLD / file).read_bytes()
        held = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]
        for key in held:
            for path, label, new in mutations({key: json.loads(held[key])}):
                if new is DEEP:
                    continue
                text = json.loads(changed({key: json.loads(held[key])}, path, new))
                # sample.py takes the config from config.json, and a hash is a label
                accept = (path[-1], label) in (("dropout", "gone"), ("conv_stem", "gone"), ("activation", "x")) or path[-1] == "transform"
                accept = accept or key in ("sha256", "checksum") or args[0] == "sample.py" or (
                    path[1:2] in (("mean",), ("std",), ("transform",), ("final_norm",)))
                yield Case(f"{args[0]} {file} metadata: {'.'.join(map(str, path))} {label}", args, parts,
                           with_tensors(file, lambda a: None, lambda m, k=key, t=text: {
                               **{n: v for n, v in m.items() if n != k}, **({k: json.dumps(t[k])} if k in t else {})}),
                           ANY if accept else ERROR, outputs)
            for label, text in {"no JSON": "{", "deep": "[" * 100_000, "empty": ""}.items():
                yield Case(f"{args[0]} {file} metadata: {key} {label}", args, parts, with_tensors(
                    file, lambda a: None, lambda m, k=key, t=text: m | {k: t}), ERROR, outputs)


def other_weight_cases():
    """Containers other than safetensors."""
    heads = ["--heads", "3"]
    files = {"source/google.npz": [*CONVERT, "--vit", "source/google.npz"],
             "source/torchvision.pth": [*CONVERT, "--vit", "source/torchvision.pth", *heads],
             "source/published.pth": [*CONVERT, "--vision-gpt", "source/published.pth", *heads],
             "source/script.pt": [*CONVERT, "--vit", "source/script.pt"],
             "source/tensorflow/model.ckpt.index": [*CONVERT, "--gpt2", "source/tensorflow/model.ckpt", *heads],
             "source/tensorflow/model.ckpt.data-00000-of-00001":
                 [*CONVERT, "--gpt2", "source/tensorflow/model.ckpt", *heads]}
    for file, args in files.items():
        parts = ("source/tensorflow",) if "tensorflow" in file else (file,)
        yield from file_cases(file, args, parts, ("new",), fine=("one byte longer?", "zeros?") if "data" in file else
                              ("one byte longer?",))
        for number in range(16):
            yield Case(f"convert_weights.py {file}: flipped {number}", args, parts,
                       replace(file, lambda p, c, n=number: p.write_bytes(flip(c, n * len(c) // 16 + n, 0xFF))),
                       ANY, ("new",))

    def arrays(**held):
        def damage(folder):
            import numpy as np
            with np.load(folder / "source/google.npz") as source:
                content = {name: source[name] for name in source.files}
            with open(folder / "source/google.npz", "wb") as file:
                np.savez(file, **{n: t for n, t in (content | {k: v(content) for k, v in held.items()}).items()
                                  if t is not None})
        return damage

    import numpy as np
    kernel = "embedding/kernel"
    for label, make in {
        "nan": lambda c: c[kernel] * np.nan, "infinite": lambda c: c[kernel] + np.inf, "text": lambda c: np.array("x"),
        "objects": lambda c: np.array([{}], object), "complex": lambda c: c[kernel] * 1j, "scalar": lambda c: np.float32(1),
        "times": lambda c: np.array(["2020-01-01"], "datetime64[D]"), "integers": lambda c: c[kernel].astype(np.int8),
        "none": lambda c: None, "empty": lambda c: c[kernel][:0], "big endian": lambda c: c[kernel].astype(">f4"),
        "unsigned": lambda c: c[kernel].astype(np.uint32), "structured": lambda c: np.zeros(3, [("a", "f4")]),
    }.items():
        yield Case(f"convert_weights.py npz {label}", files["source/google.npz"], ("source/google.npz",),
                   arrays(**{kernel: make}), ANY if label in ("integers", "big endian", "unsigned") else ERROR, ("new",))

    def bomb(folder):
        with zipfile.ZipFile(folder / "source/google.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1073741824,), }".ljust(117) + b"\n"
            with archive.open("embedding/kernel.npy", "w", force_zip64=True) as member:
                member.write(b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head)
                for _ in range(256):
                    member.write(bytes(1 << 24))

    def shape(text):
        def damage(folder):
            with zipfile.ZipFile(folder / "source/google.npz", "w") as archive:
                head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {text}, }}".encode().ljust(117) + b"\n"
                archive.writestr("embedding/kernel.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head)
        return damage

    yield Case("convert_weights.py npz bomb", files["source/google.npz"], ("source/google.npz",), bomb)
    for text in ("(10**9,)", "(99999999999,)", "(-1,)", "(4, 4, 3, 9999999)", "()", "None", "(1.5,)"):
        yield Case(f"convert_weights.py npz of shape {text}", files["source/google.npz"], ("source/google.npz",), shape(text))

    def saved(make, name="source/torchvision.pth"):
        def damage(folder):
            import torch
            torch.save(make(torch.load(folder / name, weights_only=True)), folder / name)
        return damage

    import torch
    for label, make in {
        "list": lambda c: [1, 2], "tensor": lambda c: torch.zeros(2), "text": lambda c: "x", "numbers": lambda c: {1: 2},
        "nan": lambda c: {n: t * torch.nan for n, t in c.items()}, "none": lambda c: None, "keys": lambda c: {
            i: t for i, t in enumerate(c.values())}, "sparse": lambda c: {n: t.to_sparse() for n, t in c.items()},
        "half": lambda c: {n: t.half() for n, t in c.items()}, "complex": lambda c: {n: t * 1j for n, t in c.items()},
        "quantized": lambda c: {n: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) for n, t in c.items()},
        "meta": lambda c: {n: t.to("meta") for n, t in c.items()}, "nested": lambda c: {"model": {"model": c}},
        "config text": lambda c: {"model": c, "config": "x"}, "bool": lambda c: {n: t > 0 for n, t in c.items()},
        "huge stride": lambda c: {n: t.new_zeros(1).expand(2**33) for n, t in c.items()},
        "config": lambda c: {"model": c, "config": {"n_head": "x", "vision_config": 3, "pretrained_cfg": [1]}},
        "args": lambda c: {"model": c, "model_args": {"n_head": -1}},
        "layers": lambda c: c | {"encoder.layers.encoder_layer_999999999.ln_1.weight": torch.zeros(12)},
        "digits": lambda c: c | {f"encoder.layers.encoder_layer_{'9' * 5000}.ln_1.weight": torch.zeros(12)},
    }.items():
        yield Case(f"convert_weights.py torch {label}", files["source/torchvision.pth"], ("source/torchvision.pth",),
                   saved(make), ANY if label in ("half", "bool", "args", "config", "config text") else ERROR, ("new",))
        yield Case(f"convert_weights.py published {label}", files["source/published.pth"], ("source/published.pth",),
                   saved(make, "source/published.pth"),
                   ANY if label in ("half", "bool", "args", "config", "config text") else ERROR, ("new",))


def set_cases():
    """Prepared sets, feature caches and runs."""
    import numpy as np
    evaluated, parts = [*EVALUATE, "--checkpoint", "complete", "--data", "data"], ("complete", "data")
    for name in ("images.bin", "tokens.bin", "index.npz", "meta.json", "captions.json", "tokenizer.json"):
        fine = ("zeros", "random?") if name == "images.bin" else ("zeros",) if name == "tokens.bin" else ()
        fine += ("one byte longer?", "flipped") if name == "index.npz" else ()
        yield from file_cases(f"data/{name}", evaluated, parts, (), fine + (("html?",) if name == "none" else ()))
        yield from file_cases(f"data/{name}", [*TRAIN, "--out=new"], ("data", "weights"), ("new", "data/features-*"),
                              fine)

    def index(**held):
        def damage(folder):
            with np.load(folder / "data/index.npz") as source:
                content = {name: source[name].copy() for name in source.files}
            for name, change in held.items():
                content[name] = change(content[name])
            with open(folder / "data/index.npz", "wb") as file:
                np.savez(file, **{name: array for name, array in content.items() if array is not None})
        return damage

    def put(at, value):
        def change(array):
            array[at] = value
            return array
        return change

    changes = {
        "negative first": dict(offset=put(0, -1)), "first not 0": dict(offset=put(0, 1)), "falling": dict(offset=put(3, 0)),
        "rising": dict(offset=put(3, 10**6)), "huge last": dict(offset=put(-1, 2**60)), "short last": dict(offset=put(-1, 5)),
        "floats": dict(offset=lambda a: a.astype(float)), "nan": dict(offset=lambda a: a * np.nan),
        "table": dict(offset=lambda a: a[:, None]), "row": dict(offset=lambda a: a[None]), "missing": dict(offset=lambda a: None),
        "reversed": dict(offset=lambda a: a[::-1]), "scalar": dict(offset=lambda a: a[0]), "text": dict(offset=lambda a: a.astype(str)),
        "objects": dict(offset=lambda a: a.astype(object)), "bytes": dict(offset=lambda a: a.astype(np.uint8)),
        "complex": dict(offset=lambda a: a.astype(complex)), "structure": dict(offset=lambda a: a.view([("a", "<i8")])),
        "image -1": dict(image=put(0, -1)), "image beyond": dict(image=put(0, 10**6)), "image missing": dict(image=lambda a: None),
        "image floats": dict(image=lambda a: a + 0.5), "image nan": dict(image=lambda a: a * np.nan),
        "image table": dict(image=lambda a: a[:, None]), "image short": dict(image=lambda a: a[:-1]),
        "image text": dict(image=lambda a: a.astype(str)), "image objects": dict(image=lambda a: a.astype(object)),
        "both empty": dict(image=lambda a: a[:0], offset=lambda a: a[:1]), "image bool": dict(image=lambda a: a > 2),
    }
    for label, change in changes.items():
        yield Case(f"evaluate.py index.npz {label}", evaluated, parts, index(**change),
                   ANY if label in ("bytes", "image bool") else ERROR)
        yield Case(f"train.py index.npz {label}", [*TRAIN, "--out=new"], ("data", "weights"), index(**change),
                   ANY if label in ("bytes", "image bool") else ERROR, ("new", "data/features-*"))

    def tokens(value):
        def damage(folder):
            held = np.fromfile(folder / "data/tokens.bin", np.uint16)
            held[0] = value
            held.tofile(folder / "data/tokens.bin")
        return damage

    for value in (65535, 10_000):
        yield Case(f"train.py tokens.bin with {value}", [*TRAIN, "--out=new"], ("data", "weights"), tokens(value), ERROR,
                   ("new", "data/features-*"))
        yield Case(f"evaluate.py tokens.bin with {value}", evaluated, parts, tokens(value))

    def features(make):
        def damage(folder):
            (file,) = (folder / "data").glob("features-*.bin")
            make(file, file.read_bytes())
        return damage

    # a damaged cache is computed anew, or refused; but what is trained on must be the whole one
    for label, make in {**DAMAGES, "nan": lambda p, c: p.write_bytes(b"\xff\x7e" * (len(c) // 2)),
                        "end of zeros": lambda p, c: p.write_bytes(c[: len(c) // 2] + bytes(len(c) - len(c) // 2)),
                        "hole": lambda p, c: p.write_bytes(c[:99] + bytes(300) + c[399:]),
                        "partial": lambda p, c: (p.rename(f"{p}.partial"), os.truncate(f"{p}.partial", 100)),
                        "partial of zeros": lambda p, c: (p.unlink(), Path(f"{p}.partial").write_bytes(bytes(len(c))))}.items():
        def damaged(path, content, make=make):
            if make in DAMAGES.values():
                path.unlink()
            make(path, content)

        yield Case(f"train.py features {label}", [*TRAIN, "--out=new"], ("data", "weights"), features(damaged), FEATURES,
                   ("new", "data/features-*"))

    run = ("data", "weights", "run")
    for name in ("training_state.pt", "log.jsonl", "config.json", "fusion.safetensors", "tokenizer.json"):
        fine = DAMAGES if name in ("log.jsonl", "config.json", "fusion.safetensors", "tokenizer.json") else ("one byte longer",)
        yield from file_cases(f"run/{name}", RESUME, run, RUN_OUTPUTS, tuple(f"{label}?" for label in fine))
    import torch
    state = torch.load(WORLD / "run/training_state.pt", weights_only=True)

    def altered(change):
        def damage(folder):
            held = torch.load(folder / "run/training_state.pt", weights_only=True)
            other = change(held)
            torch.save(held if other is None else other, folder / "run/training_state.pt")
        return damage

    def assign(key, value, inner=None):
        def change(held):
            if inner is None:
                held[key] = value
            else:
                held[key][inner] = value
        return change

    values = {"null": None, "text": "x", "list": [], "object": {}, "negative": -1, "fraction": 1.5, "huge": 10**30,
              "nan": float("nan"), "tensor": torch.zeros(2)}
    for key in state:
        for label, value in values.items():
            fine = (key == "best" and label in ("fraction", "negative", "huge")) or (key == "losses" and label == "list") or \
                (key == "scaler" and label == "object")
            yield Case(f"train.py training_state.pt: {key} {label}", RESUME, run, altered(assign(key, value)),
                       ANY if fine else ERROR, RUN_OUTPUTS)
        yield Case(f"train.py training_state.pt: {key} gone", RESUME, run, altered(
            lambda held, key=key: {k: v for k, v in held.items() if k != key}), ERROR, RUN_OUTPUTS)
    for key in ("model", "config", "backbones", "optimizer"):
        for inner in list(state[key])[:40]:
            for label, value in list(values.items()):
                if key in ("model", "optimizer") and label in ("list", "object") and inner == "state":
                    continue
                same = type(value) is type(state[key][inner]) or isinstance(value, int) and type(state[key][inner]) is float
                if key != "config" and inner not in list(state[key])[:2] or key == "config" and same:
                    continue
                yield Case(f"train.py training_state.pt: {key}.{inner} {label}", RESUME, run,
                           altered(assign(key, value, inner)), ANY if inner == "param_groups" else ERROR, RUN_OUTPUTS)
    some = next(iter(state["model"]))
    for label, change in {
        "nan": lambda h: (h["model"][some].fill_(math.nan), None)[1], "step beyond": assign("step", 10**6),
        "losses of text": assign("losses", ["x"]), "losses of nan": assign("losses", [float("nan")]),
        "losses of lists": assign("losses", [[1]]), "half": lambda h: h["model"].update({some: h["model"][some].double()}),
        "more": lambda h: h["model"].update({"more": torch.zeros(2)}), "unknown": assign("unknown", 1),
        "optimizer of another": lambda h: h["optimizer"].update(state={}),
        "optimizer state of text": lambda h: h["optimizer"]["state"].update({0: "x"}),
        "optimizer nan": lambda h: (h["optimizer"]["state"][0]["exp_avg"].fill_(math.nan), None)[1],
        "optimizer shape": lambda h: h["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
        "optimizer groups": lambda h: h["optimizer"].update(param_groups=[]),
        "group fields": lambda h: h["optimizer"]["param_groups"][0].clear(),
        "list": lambda h: [h], "tensor": lambda h: torch.zeros(3),
    }.items():
        yield Case(f"train.py training_state.pt: {label}", RESUME, run, altered(change),
                   ANY if label in ("step beyond", "optimizer of another", "half", "optimizer groups", "group fields")
                   else ERROR, RUN_OUTPUTS)
    # nobody's work depends on the log: lines that are none may be dropped, never a traceback
    for line in ("null", "1", "[]", "{}", '"x"', '{"step": null}', '{"step": "x"}', '{"step": -1}', '{"step": 1.5}',
                 '{"step": 1e30}', '{"step": 1, "loss": null}', '{"step": 1, "loss": "x"}', '{"step": 1, "loss": []}',
                 '{"step": 1, "loss": NaN}', '{"step": 1, "loss": 1e999}', '{"step": [1]}', "[" * 100_000, "{", "\x00",
                 '{"step": 1, "val_loss": {}}', '{"step": 1, "step": 2}', '{"step": true}', "9" * 5000, '{"loss": 1}'):
        for where in ("first", "last"):
            yield Case(f"train.py log.jsonl {where} line {line[:24]!r}", RESUME, run, replace(
                "run/log.jsonl", lambda p, c, line=line, where=where: p.write_bytes(
                    line.encode() + b"\n" + c if where == "first" else c + line.encode())), ANY, RUN_OUTPUTS)


FEATURES = ANY


def caption_cases():
    parts = ("photos", "captions", "weights/tokenizer.json")
    out = ("set",)
    # entries that cannot be used are counted and skipped: the set without them is right
    per_entry = {key: {label for label in VALUES} for key in ("image", "caption", "split")}
    for name in ("list.json", "rows.jsonl"):
        accepted = {**{key: {f"{label}?" for label in labels} for key, labels in per_entry.items()},
                    "": {f"{label}?" for label in VALUES} | {"binary?"}}
        if name == "list.json":
            accepted |= {"0": {f"{label}?" for label in VALUES}}
        yield from json_cases(f"captions/{name}", [*PREPARE, f"captions/{name}"], parts, out,
                              accepted if name != "rows.jsonl" else AnyField(), lines=2)
    for name in ("coco_train.json", "karpathy.json"):
        yield from json_cases(f"captions/{name}", [*PREPARE, f"captions/{name}"], parts, out,
                              {key: {f"{label}?" for label in VALUES} for key in
                               ("split", "cocoid", "id", "image_id", "caption", "raw", "file_name", "filename",
                                "sentences", "sentences.0", "annotations.0")} | {"images.0": {"gone?"}}, lines=2)
    for name in ("captions.csv", "flickr.txt", "rows.jsonl", "list.json", "coco_train.json", "karpathy.json"):
        yield from file_cases(f"captions/{name}", [*PREPARE, f"captions/{name}"], parts, out,
                              ("halved?", "one byte shorter?") + (("one byte longer?", "zeros?") if name[0] in "cfr" else ()),
                              lines=2)
    texts = {"no header": "a.png,a dog\n", "quotes": 'image,caption\na.png,"a dog\n', "nul": "image,caption\na.png,a\0dog\n",
             "latin": "image,caption\na.png,caf\xe9\n".encode("latin-1"), "utf-16": "image,caption\na.png,a dog\n".encode("utf-16"),
             "long field": "image,caption\na.png," + "x" * 200_000 + "\n", "columns": "image," * 20_000 + "caption\n",
             "one line": "a" * 10_000_000, "lines": "\n" * 2_000_000, "commas": "image,caption\n" + "," * 1_000_000,
             "regex": "a" * 50_000 + "#\t", "hashes": "#" * 100_000 + "1\t", "surrogate": 'image,caption\na.png,"\ud83d"\n'
             .encode("utf-8", "surrogatepass"), "control": "image,caption\na.png,\x1b[31m dog\n", "end": "image,caption\n"
             "a.png,<|endoftext|>\n", "paths": "image,caption\n../../etc/passwd,a dog\n/etc/passwd,a cat\n"}
    for label, text in texts.items():
        content = text if isinstance(text, bytes) else text.encode()
        for name in ("captions.csv", "flickr.txt"):
            yield Case(f"prepare_flickr8k.py {name} {label}", [*PREPARE, f"captions/{name}"], parts,
                       replace(f"captions/{name}", lambda p, c, content=content: p.write_bytes(content)), ANY, out, lines=3)
    for label, lines in {"unknown": "x.jpg\n", "empty": "", "binary": None, "nul": "\0\n"}.items():
        yield Case(f"prepare_flickr8k.py split list {label}", [*PREPARE, "captions/flickr.txt"], parts,
                   replace("captions/Flickr_8k.trainImages.txt", lambda p, c, t=lines: p.write_bytes(
                       os.urandom(99) if t is None else t.encode())), ANY, out, lines=3)
    yield from json_cases("predictions.json", ["evaluate.py", "--predictions", "predictions.json", "--data", "data"],
                          ("predictions.json", "data"), (), {"caption": {"text"}})


class AnyField(dict):
    """Every field may be anything: the entry is then skipped."""

    def get(self, key, default=None):
        return {f"{label}?" for label in VALUES} | {"binary?"}


def group_config():
    yield from json_cases("complete/config.json", [*SAMPLE, "complete"], ("photos/a.png", "complete"))
    yield from json_cases("fusion/config.json", [*SAMPLE, "fusion"], ("photos/a.png", "fusion", "weights"))
    for file, args, parts in (
            ("complete/tokenizer.json", [*SAMPLE, "complete"], ("photos/a.png", "complete")),
            ("weights/tokenizer.json", [*TRAIN, "--out=new"], ("data", "weights")),
            ("data/tokenizer.json", [*EVALUATE, "--checkpoint", "complete", "--data", "data"], ("complete", "data"))):
        yield from json_cases(file, args, parts, ("new", "data/features-*"),
                              {"name": {"text"}, "conv_stem": {"gone"}})
        yield from file_cases(file, args, parts, ("new", "data/features-*"))
    for file in ("complete/config.json", "complete/tokenizer.json"):
        yield from file_cases(file, [*EVALUATE, "--checkpoint", "complete", "--data", "data"], ("complete", "data"))
        yield from file_cases(file, [*CONVERT, "--checkpoint", "complete"], ("complete",), ("new",))


def group_meta():
    free = {"source": {"null", "text", "gone"}, "counts": {"object", "gone"}, "clean_captions": {"true"},
            "image_ids.0": {"negative"}, "images.0": {"text"}, "splits.train": {"list?"}, "splits.val": {"list"},
            **{f"splits.{split}.0": {"gone?"} for split in ("train", "val", "test")},
            **{f"counts.{key}": {"negative", "gone"} for key in ("images", "captions")}}
    args = [*EVALUATE, "--checkpoint", "complete", "--data", "data"]
    yield from json_cases("data/meta.json", args, ("complete", "data"), (), free)
    yield from json_cases("data/meta.json", [*TRAIN, "--out=new"], ("data", "weights"), ("new", "data/features-*"),
                          free | {"splits.val": set(), "splits.test": {"list"}})
    yield from json_cases("data/captions.json", args, ("complete", "data"), (), {"0": {"text"}, "": {"text"}})
    yield from json_cases("shapes/scenes.jsonl", ["evaluate.py", "--predictions", "shapes.json", "--data", "shapes"],
                          ("shapes", "shapes.json"), (), {"arrangement": {f"{label}?" for label in VALUES if label != "deep"}, "size": {"text"},
                                                     "colour": {"text"}, "shape": {"text"}, "objects.0": {"gone"}})


def group_sources():
    def every(*names):
        return {name: {f"{label}?" for label in VALUES} for name in names}

    gone = {"gone?", "null?"}
    for folder, flag, files in (("gpt2", "--gpt2", ["config.json"]), ("vit", "--vit", ["config.json",
                                "preprocessor_config.json"]), ("timm", "--vit", ["config.json"]),
                                ("sharded", "--vit", ["model.safetensors.index.json", "config.json"])):
        args = [*CONVERT, flag, f"source/{folder}"] + (["--heads", "3"] if folder == "timm" else [])
        for name in files:
            accepted = every("metadata", "total_size", "model_type", "vocab_size", "image_size") | {
                "n_head": gone, "num_attention_heads": gone, "layer_norm_eps": gone, "layer_norm_epsilon": gone,
                "hidden_act": gone, "activation_function": gone, "scale_attn_weights": gone | {"true"},
                "scale_attn_by_inverse_layer_idx": gone, "do_center_crop": gone, "resample": gone, "size": gone,
                "image_mean": gone, "image_std": gone, "mean": gone, "std": gone, "crop_pct": gone,
                "interpolation": gone, "input_size": gone, "pretrained_cfg": gone | {"object?"}, "height": {"gone?"},
                "width": {"gone?"}, "": {"object?"}, "metadata.total_size": {f"{label}?" for label in VALUES}}
            if folder == "sharded":
                held = json.loads((WORLD / "source/sharded" / files[0]).read_text())
                accepted |= {f"weight_map.{tensor}": {"gone?"} for tensor in held["weight_map"]}
            accepted |= {"resample": gone | {"negative?", "text?"}, "do_center_crop": gone | {"true?"}}
            yield from json_cases(f"source/{folder}/{name}", args, (f"source/{folder}",), ("new",), accepted)
            yield from file_cases(f"source/{folder}/{name}", args, (f"source/{folder}",), ("new",))
    yield from json_cases("source/tensorflow/hparams.json",
                          [*CONVERT, "--gpt2", "source/tensorflow/model.ckpt"], ("source/tensorflow",), ("new",),
                          every("n_vocab", "n_ctx", "n_embd", "n_layer"))


GROUPS = {"config": group_config, "meta": group_meta, "sources": group_sources, "captions": caption_cases,
          "pictures": picture_cases, "names": name_cases, "outputs": output_cases, "numbers": number_cases,
          "archives": archive_cases, "shards": shard_cases, "urls": url_cases, "weights": weight_cases, "containers": other_weight_cases,
          "sets": set_cases}
WORLD = PORT = None


@contextlib.contextmanager
def world():
    """A Harness whose world is built, and the server of `url_cases`."""
    global WORLD, PORT
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    PORT = server.server_port
    STOP.clear()
    harness = Harness()
    WORLD = harness.world
    try:
        yield harness
    finally:
        STOP.set()
        server.shutdown()
        harness.close()


def main(words):
    verbose = "-v" in words
    words = [word for word in words if word != "-v"]
    every = int(words.pop(0)[8:]) if words[:1] and words[0].startswith("--every=") else 1
    sys.path[:0] = [str(ROOT), str(TESTS)]
    table, wrong = collections.defaultdict(collections.Counter), []
    with contextlib.suppress(KeyboardInterrupt), world() as harness:     # the table, of what was tried
        for group, make in GROUPS.items():
            started = time.monotonic()
            for case in list(make())[::every]:
                if words and not any(word in f"{group}: {case.name}" for word in words):
                    continue
                (ended, problem), out, err = harness.try_case(case)
                table[group]["tried"] += 1
                table[group]["else" if problem else ended] += 1
                if problem:
                    wrong.append((group, case.name, ended, problem))
                    print(f"{group} | {case.name!r} | {ended}: {problem}", flush=True)
                elif verbose:
                    print(f"   {case.name!r} | {ended} {(err or out).strip()[:150]!r}")
                table[group]["seconds"] = round(time.monotonic() - started)
    print(f"\n{'':12}" + "".join(f"{column:>10}" for column in ("tried", "refused", "accepted", "else", "seconds")))
    for group, row in [*table.items(), ("all", sum(table.values(), collections.Counter()))]:
        print(f"{group:12}" + "".join(f"{row[c]:10,}" for c in ("tried", "refused", "accepted", "else", "seconds")))
    return int(bool(wrong))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve()
    else:
        sys.exit(main(sys.argv[1:]))
