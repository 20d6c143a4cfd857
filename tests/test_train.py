"""Training computes what the formulas say, repeats itself exactly after a stop, and says what is wrong."""

import dataclasses
import fcntl
import io
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_checkpoint import save_backbones
from test_data import make_set
from test_model import captioner

import fast
import prepare_shapes
import train as trainer
from data import CaptionSet, ImageInputs, collate, epoch_batches, read_pixels, to_device
from lib import checkpoint, cli, figures
from lib.cli import UserError
from lib.images import normalize
from lib.metrics import score
from lib.prepared_set import clean_caption
from model import VisionGPT
from train import (
    PRESETS,
    TrainConfig,
    build_model,
    configure_optimizer,
    estimate_loss,
    get_lr,
    resolve_config,
    train,
)
from vit import ViT

SCRIPT = Path(trainer.__file__)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A prepared set, tiny backbones with another tokenizer, and two checkpoints to start from."""
    folder = tmp_path_factory.mktemp("train")
    pictures, texts = make_set(folder / "data", longest=7)
    model = captioner(n_positions=40)                     # every parameter random, output projections too
    files = save_backbones(model, folder / "weights")
    model.tokenizer.save(folder / "weights")
    model.save_pretrained(folder / "complete")
    model.save_pretrained(folder / "fusion", backbones=files)
    return SimpleNamespace(folder=folder, pictures=pictures, texts=texts, model=model)


@pytest.fixture
def config(base, tmp_path):
    """config(**changes) -> a TrainConfig on the tiny set that evaluates little."""
    def make(**changes):
        given = dict(data=str(base.folder / "data"), weights=str(base.folder / "weights"),
                     out=str(tmp_path / "run"), device="cpu", batch_size=3, max_steps=1, epochs=50,
                     warmup_steps=2, learning_rate=1e-2, eval_interval=100, log_interval=1, num_samples=1)
        return TrainConfig(**{**given, **changes})
    return make


def log_of(cfg, name):
    """{step: value} of log.jsonl, no step twice."""
    rows = map(json.loads, (Path(cfg.out) / "log.jsonl").read_text().splitlines())
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    assert pairs == sorted(set(pairs)) and len(dict(pairs)) == len(pairs)
    return dict(pairs)


def state_of(cfg):
    return torch.load(Path(cfg.out) / "training_state.pt", weights_only=True)


def flags_of(cfg):
    changed = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)
               if getattr(cfg, field.name) != field.default}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in changed.items()]


def go_on(cfg, **given):
    return train(*resolve_config({"resume": True, "out": cfg.out, **given}))


# --------------------------------------------------------------------------------------------------
# the loss and its gradient against a reference that knows nothing of batches, padding and sharing

MUTATIONS = ["erf instead of tanh in GPT-2", "tanh instead of erf in the fusion", "a look at the next word",
             "no end to learn", "the neighbour's image", "a mean of means", "cross-attention after its block",
             "no residual in the resampler", "a scale of the whole width"]


def reference_loss(P, config, seen, parts, mutation=None):
    """The mean over all targets, each caption by itself. `seen`: pictures (N, 3, S, S) or patches (N, 4, C);
    `parts`, the batches of the step: lists of (place in `seen`, tokens)."""
    def linear(x, name):
        return F.linear(x, P[name + ".weight"], P.get(name + ".bias"))

    def norm(x, name, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], P[name + ".weight"], P[name + ".bias"], eps)

    def attend(q, k, v, heads, mask=None):
        q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in (q, k, v))         # (H, T, D)
        wide = heads if "whole width" in str(mutation) else 1
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1] * wide)
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def see(picture):
        x = F.conv2d(picture[None], P["vit.patch_embed.weight"], P["vit.patch_embed.bias"], stride=8)
        x = torch.cat([P["vit.cls_token"][0], x[0].flatten(1).T]) + P["vit.pos_embed"][0]
        for i in range(config.vit.n_layer):
            name = f"vit.blocks.{i}."
            qkv = linear(norm(x, name + "norm1", 1e-6), name + "attn.qkv").chunk(3, dim=1)
            x = x + linear(attend(*qkv, config.vit.n_head), name + "attn.proj")
            h = F.gelu(linear(norm(x, name + "norm2", 1e-6), name + "mlp.fc1"))
            x = x + linear(h, name + "mlp.fc2")
        return norm(x, "vit.norm", 1e-6)[1:]

    def resample(patches):
        patches, x = linear(patches, "resampler.project"), P["resampler.latents"]
        for i in range(config.resampler.n_layer):
            name = f"resampler.layers.{i}."
            q = linear(norm(x, name + "norm_latents"), name + "q")
            k, v = linear(norm(patches, name + "norm_patches"), name + "kv").chunk(2, dim=1)
            seen = linear(attend(q, k, v, config.resampler.n_head), name + "proj")
            x = seen if "residual" in str(mutation) else x + seen
            form = "tanh" if "in the fusion" in str(mutation) else "none"
            h = F.gelu(linear(norm(x, name + "norm_mlp"), name + "fc1"), approximate=form)
            x = x + linear(h, name + "fc2")
        return x

    def look(x, visual, i):
        name = f"xattn.{i}."
        k, v = linear(visual, name + "kv").chunk(2, dim=1)
        q = linear(norm(x, name + "ln"), name + "q")
        return x + linear(attend(q, k, v, config.gpt2.n_head), name + "out")

    def caption_loss(visual, row):
        end, late = config.gpt2.vocab_size - 1, "after" in str(mutation)
        targets = row if "end" in str(mutation) else [*row, end]
        tokens = [end, *row][: len(targets)]
        x = P["gpt2.wte.weight"][tokens] + P["gpt2.wpe.weight"][: len(tokens)]
        mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril(int("next word" in str(mutation)))
        for i in range(config.gpt2.n_layer):
            x = look(x, visual, i) if i in config.cross_attention and not late else x
            name = f"gpt2.h.{i}."
            qkv = linear(norm(x, name + "ln_1"), name + "attn.c_attn").chunk(3, dim=1)
            x = x + linear(attend(*qkv, config.gpt2.n_head, mask), name + "attn.c_proj")
            form = "none" if "in GPT-2" in str(mutation) else "tanh"
            h = F.gelu(linear(norm(x, name + "ln_2"), name + "mlp.c_fc"), approximate=form)
            x = x + linear(h, name + "mlp.c_proj")
            x = look(x, visual, i) if i in config.cross_attention and late else x
        logits = norm(x, "gpt2.ln_f") @ P["gpt2.wte.weight"].T
        return F.cross_entropy(logits, torch.tensor(targets), reduction="sum"), len(targets)

    sums = []
    for part in parts:
        images = [image for image, _ in part]
        visual = {i: resample(seen[i] if seen.ndim == 3 else see(seen[i])) for i in set(images)}
        images = images[1:] + images[:1] if "neighbour" in str(mutation) else images
        losses, counts = zip(*(caption_loss(visual[i], row) for i, (_, row) in zip(images, part)))
        sums.append((sum(losses), sum(counts)))
    if "means" in str(mutation):
        return sum(loss / count for loss, count in sums) / len(sums)
    return sum(loss for loss, _ in sums) / sum(count for _, count in sums)


def agree(found, wanted):
    """Norm of the difference at most 1e-5 of the larger of its own and a thousandth of the largest."""
    least = max(g.norm() for g in wanted.values()) / 1000
    return found.keys() == wanted.keys() and all(
        (found[name] - g).norm() <= 1e-5 * max(g.norm(), least) for name, g in wanted.items())


@pytest.mark.parametrize("part", ["fusion", "all"])
def test_a_training_step_is_what_the_formulas_say(part, base, config):
    """Of the run itself: its log gives the loss, AdamW's first moment after a step a tenth of the gradient.

    Two forward passes of unequal size, buckets, padding, shared images and cached features included.
    """
    cfg = config(init_from=str(base.folder / "complete"), train=part, batch_size=2, grad_accumulation=2,
                 dropout=0.0, grad_clip=0.0)
    train(cfg)
    model, data = build_model(cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = configure_optimizer(model, cfg)
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    moments = state_of(cfg)["optimizer"]["state"]
    found = {name: moments[i]["exp_avg"].double() / (1 - 0.9) for i, name in enumerate(order)}

    prefixes = ("resampler.", "xattn.") if part == "fusion" else ("",)
    P = {name: p.double().requires_grad_(name.startswith(prefixes))
         for name, p in base.model.state_dict().items()}
    if part == "fusion":
        (file,) = (base.folder / "data").glob("features-*.bin")
        seen = torch.from_numpy(np.fromfile(file, np.float16, 14 * 48).reshape(-1, 4, 12)).double()
    else:
        small = [Image.fromarray(p).resize((16, 16), Image.Resampling.BILINEAR) for p in base.pictures]
        mean, std = np.array(model.config.vit.mean), np.array(model.config.vit.std)
        seen = torch.from_numpy((np.stack(small) / 255 - mean) / std).permute(0, 3, 1, 2).double()
    parts = [[(i, base.model.tokenizer.encode(clean_caption(text))) for i in images for text in base.texts[i]]
             for images in np.split(epoch_batches(data, data.split("train"), 4, cfg.seed, 0)[0], 2)]
    targets = [sum(1 + len(row) for _, row in part) for part in parts]
    assert targets[0] != targets[1] and len({i for i, _ in parts[0]}) == 2 < len(parts[0])

    for mutation in [None, *(MUTATIONS if part == "fusion" else [])]:
        loss = reference_loss(P, model.config, seen, parts, mutation)
        trained = {name: p for name, p in P.items() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        wanted = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), gradients)}
        right = agree(found, wanted) and abs(log_of(cfg, "loss")[1] - loss.item()) < 1e-5 * loss.item()
        assert right == (mutation is None), mutation


@pytest.mark.skipif(not fast.available(), reason="PyTorch without oneDNN")
def test_gpt2_is_packed_although_the_vit_is_gone(config, monkeypatch):
    widths, onednn = [], fast.onednn

    def counting(x, weight, *rest):
        widths.append(len(x))
        return onednn(x, weight, *rest)

    monkeypatch.setattr(fast, "onednn", counting)
    monkeypatch.setattr(trainer, "ImageInputs", lambda *args: widths.clear() or eyes)
    cfg = config()
    model, data = build_model(cfg)
    eyes = ImageInputs(model, data, cfg, torch.device("cpu"), torch.float32)
    train(cfg)
    assert len(widths) > 4 * len(model.gpt2.h)


def test_a_caption_costs_the_same_in_any_company(base, config):
    cfg = config(train="all", init_from=str(base.folder / "complete"), dropout=0.0)
    model, data = build_model(cfg)
    eyes = ImageInputs(model, data, cfg, torch.device("cpu"), torch.float32)

    @torch.no_grad()
    def loss(images):
        batch = to_device(collate(data, np.array(images), eyes), model.device, model.config.vit)
        return trainer.batch_loss(model, batch, None).item()
    alone = {i: loss([i]) for i in (0, 4, 7)}
    assert loss([4, 7]) == pytest.approx(alone[4] + alone[7], rel=1e-6)
    assert loss([7, 0, 4]) == pytest.approx(sum(alone.values()), rel=1e-6)


# --------------------------------------------------------------------------------------------------
# stopped and resumed


class Trigger(io.StringIO):
    """A stdout that does something once, when it is written `sign`."""

    def __init__(self, sign, act):
        super().__init__()
        self.sign, self.act = sign, act

    def write(self, text):
        if self.act and self.sign in text:
            act, self.act = self.act, None
            act()
        return super().write(text)


def flat(value, path=""):
    """Nested dicts and lists -> {path: number, text or bytes of a tensor}."""
    if isinstance(value, torch.Tensor):
        return {path: (value.dtype, value.numpy().tobytes())}
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for name, item in value.items() for k, v in flat(item, f"{path}.{name}").items()}


def same_run(cfg, other):
    """Bitwise the same parameters, optimizer and best model, and the same losses in log.jsonl."""
    a, b = state_of(cfg), state_of(other)
    assert flat({**a, "config": 0}) == flat({**b, "config": 0}) and a.keys() == b.keys()
    for name in ("loss", "lr", "val_loss", "val_loss_shuffled"):
        assert log_of(cfg, name) == log_of(other, name)
    (one,), (two,) = (list(Path(c.out).glob("[fm]*.safetensors")) for c in (cfg, other))
    assert one.name == two.name and one.read_bytes() == two.read_bytes()


LONG = dict(max_steps=11, log_interval=3, eval_interval=4, save_interval=5, grad_accumulation=2)
KINDS = {"fusion": dict(dropout=0.3, **LONG), "all": dict(train="all", augment=True, dropout=0.2, **LONG)}


@pytest.fixture(scope="module", params=list(KINDS))
def unbroken(request, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    cfg = TrainConfig(data=str(base.folder / "data"), weights=str(base.folder / "weights"), out=str(out),
                      device="cpu", batch_size=2, epochs=50, warmup_steps=2, learning_rate=0.01,
                      num_samples=1, **KINDS[request.param])
    assert train(cfg) == min(log_of(cfg, "val_loss").values())
    assert list(log_of(cfg, "loss")) == [3, 6, 9, 11] and list(log_of(cfg, "val_loss")) == [4, 8, 11]
    return cfg


def test_a_stopped_run_goes_on_as_if_nothing_had_been(unbroken, tmp_path, monkeypatch):
    """The signal comes while it evaluates, after step 4; step 5 is done and saved, between two log lines."""
    cfg = dataclasses.replace(unbroken, out=str(tmp_path / "run"))
    number = signal.SIGTERM if cfg.train == "fusion" else signal.SIGINT
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(sys, "stdout", Trigger("step 4: validation", lambda: os.kill(os.getpid(), number)))
    with pytest.raises(KeyboardInterrupt) as kept:            # held with all its frames, as in a notebook
        train(cfg)
    assert "stopped after step 5; continue with the same command and --resume" in sys.stdout.getvalue()
    assert state_of(cfg)["step"] == 5 and list(log_of(cfg, "loss")) == [3] and kept.traceback
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    go_on(cfg)
    same_run(cfg, unbroken)


@pytest.mark.parametrize("unbroken", ["fusion"], indirect=True)
def test_a_killed_run_goes_on_from_its_last_save(unbroken, tmp_path):
    """kill -9 after step 6; steps 4 and 5 belong to a log line that comes after the save."""
    cfg = dataclasses.replace(unbroken, out=str(tmp_path / "run"))
    code = ("import io, os, runpy, sys\n"
            "class Out(io.StringIO):\n"
            "    def reconfigure(self, **_):\n"
            "        pass\n"
            "    def write(self, text):\n"
            "        os.kill(os.getpid(), 9) if 'step 6/' in text else None\n"
            f"sys.stdout, sys.argv = Out(), ['train.py'] + {flags_of(cfg)}\n"
            f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
            f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert state_of(cfg)["step"] == 5 and list(log_of(cfg, "loss")) == [3, 6]
    with open(Path(cfg.out) / "log.jsonl", "a") as file:
        file.write('{"step": 6, "val_l')                            # a line that was cut
    (Path(cfg.out) / "training_state.pt.1.tmp").write_text("")      # a save that was cut
    go_on(cfg)
    same_run(cfg, unbroken)
    assert not list(Path(cfg.out).glob("*.tmp"))


@pytest.mark.parametrize("unbroken", ["all"], indirect=True)
def test_training_state_alone_suffices_whatever_the_intervals(unbroken, tmp_path):
    """Another eval interval, too, leaves every step as it was."""
    cfg = dataclasses.replace(unbroken, out=str(tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys, "stdout", Trigger("step 6/", lambda: os.kill(os.getpid(), signal.SIGINT)))
        train(cfg)
    for file in Path(cfg.out).iterdir():
        if file.name != "training_state.pt":
            file.unlink()
    state = state_of(cfg) | {"best": 0.0}                          # of a model that is gone
    torch.save(state, Path(cfg.out) / "training_state.pt")
    go_on(cfg, eval_interval=3, save_interval=2, log_interval=1)
    a, b = state_of(cfg), state_of(unbroken)
    assert flat({n: a[n] for n in ("model", "optimizer")}) == flat({n: b[n] for n in ("model", "optimizer")})
    assert list(log_of(cfg, "loss")) == [8, 9, 10, 11] and list(log_of(cfg, "val_loss")) == [9, 11]
    assert log_of(cfg, "val_loss")[11] == log_of(unbroken, "val_loss")[11]
    assert checkpoint.read_config(cfg.out)["training"]["val_loss"] == min(log_of(cfg, "val_loss").values())


# --------------------------------------------------------------------------------------------------
# several processes


def start(count, flags):
    """train.py in `count` processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "WORLD_SIZE": str(count),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen([sys.executable, str(SCRIPT), *flags], **pipes,
                             env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(count)]


@pytest.mark.parametrize("unbroken", ["all"], indirect=True)
def test_two_processes_train_as_one_does(unbroken, tmp_path):
    """They share the two forward passes of a step; process 1 alone is sent the signal, and both stop.

    One process then trains the rest.
    """
    cfg = dataclasses.replace(unbroken, out=str(tmp_path / "run"), log_interval=1)
    running = start(2, flags_of(cfg))
    for line in running[0].stdout:
        if "step 3/" in line:
            running[1].send_signal(signal.SIGTERM)
            break
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [130, 130], said
    stopped = state_of(cfg)["step"]
    assert f"stopped after step {stopped};" in said[0][0] and 3 < stopped < 11
    assert [line for line in said[1][0].splitlines() if not line.startswith("[Gloo]")] == []
    go_on(cfg)
    (a, one), (b, two) = ((flat(state_of(c)["model"]), log_of(c, "val_loss")) for c in (cfg, unbroken))
    assert a == b and {step: one[step] for step in (8, 11)} == {step: two[step] for step in (8, 11)}
    losses = list(log_of(cfg, "loss").values())
    assert log_of(unbroken, "loss")[6] == pytest.approx(sum(losses[3:6]) / 3, rel=1e-12)


def test_processes_without_work_are_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="with --batch-size 4 --grad-accumulation 4, or start at most 2"):
        train(config(batch_size=8, grad_accumulation=2))
    with pytest.raises(UserError, match="with torchrun"):
        train(config(grad_accumulation=4))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="8 training images, too few for --grad-accumulation 9"):
        train(config(grad_accumulation=9))


@pytest.mark.parametrize("batch_size, passes", [(1, 4), (2, 2), (3, 2), (5, 3)])
def test_steps_see_the_images_of_a_larger_batch(batch_size, passes, config):
    """Each forward pass some of them, what is left over at the end of an epoch included."""
    class Nothing:
        device = torch.device("cpu")

        def __call__(self, images, rng):
            return {}

    seen = {}
    for size, n in ((batch_size, passes), (batch_size * passes, 1)):
        cfg = config(batch_size=size, grad_accumulation=n)
        model, data = build_model(cfg)
        steps = 2 * trainer.steps_per_epoch(cfg, len(data.split("train")))
        batches = list(trainer.training_batches(data, Nothing(), cfg, range(steps)))
        seen[n] = [sorted(np.concatenate([batch["numbers"] for batch in step])) for step in batches]
        assert all(len(step) == n and all(len(batch["numbers"]) for batch in step) for step in batches)
        assert sorted(sum(seen[n], [])) == sorted([*data.split("train")] * 2)
    assert len(seen[passes]) < len(seen[1]) or seen[passes] == seen[1]


# --------------------------------------------------------------------------------------------------
# whose settings rule, whose folder it is


def test_resume_keeps_the_saved_settings(config, capsys):
    cfg = config(max_steps=2, dropout=0.25, overwrite=True)
    train(cfg)
    first = state_of(cfg)
    given = dict(resume=True, out=cfg.out)
    again, state = resolve_config(given)
    assert again == dataclasses.replace(cfg, resume=True, overwrite=False) and flat(state) == flat(first)
    assert resolve_config({**given, "dropout": 0.25, "learning_rate": cfg.learning_rate})[0] == again
    for name, value in dict(learning_rate=0.5, train="all", preset="mini", seed=2, blind=True).items():
        with pytest.raises(UserError, match=f"was started with {name} .*, not .*another --out"):
            resolve_config({**given, name: value})
    changed = dict(epochs=9, max_steps=4, eval_interval=3, save_interval=3, log_interval=2, num_samples=0)
    cfg = resolve_config({**given, **changed})[0]
    assert {name: getattr(cfg, name) for name in changed} == changed and cfg.dropout == 0.25
    train(*resolve_config({**given, **changed}))
    assert state_of(cfg)["step"] == 4 and list(log_of(cfg, "loss")) == [1, 2, 4]
    assert capsys.readouterr().err == ""
    train(*resolve_config(given))                                  # it has come to its end: nothing to do
    assert state_of(cfg)["step"] == 4 and list(log_of(cfg, "loss")) == [1, 2, 4]


def test_resume_with_another_dtype_on_another_device(config):
    """As where auto, float32 on the CPU, becomes float16 on a GPU: there is no loss scale to go on from."""
    cfg = config()
    train(cfg)
    state = state_of(cfg)
    state["config"]["dtype"] = "float16"
    torch.save(state, Path(cfg.out) / "training_state.pt")
    go_on(cfg, max_steps=2)
    assert state["scaler"] == {} and state_of(cfg)["scaler"] and state_of(cfg)["step"] == 2


def test_resume_without_a_run_starts_and_says_so(config, capsys):
    cfg = config(resume=True)
    given = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "preset"}
    again, state = resolve_config(given)
    assert again == cfg and state is None
    assert "training_state.pt does not exist: starting at step 0" in capsys.readouterr().err
    Path(cfg.out).mkdir()
    (Path(cfg.out) / ".lock").touch()                                 # killed before a save
    (Path(cfg.out) / "log.jsonl").write_text('{"step": 7, "loss": 1.0}\nnull\n{"step": "x"}\n{"step": 1, "lo')
    train(again, state)
    assert list(log_of(cfg, "loss")) == [1]


def test_used_folder_is_refused_resumed_or_overwritten(base, config):
    cfg = config()
    train(cfg)
    first = {file.name: file.read_bytes() for file in Path(cfg.out).iterdir()}
    with pytest.raises(UserError, match="holds a run: .*--resume.*--overwrite.*--out"):
        train(cfg)
    with pytest.raises(UserError, match="not a prepared dataset"):        # a mistake costs nothing
        train(dataclasses.replace(cfg, overwrite=True, data="nowhere"))
    assert {file.name: file.read_bytes() for file in Path(cfg.out).iterdir()} == first
    train(config(overwrite=True, train="all", learning_rate=1e-3))
    made = {file.name for file in Path(cfg.out).iterdir()}
    assert "model.safetensors" in made and "fusion.safetensors" not in made
    assert list(log_of(cfg, "loss")) == [1] and "gpt2.wte.weight" in state_of(cfg)["model"]
    with pytest.raises(UserError, match="give one of them"):
        config(resume=True, overwrite=True)
    with pytest.raises(UserError, match="would be overwritten"):  # a run cannot start from itself
        config(overwrite=True, init_from=cfg.out)


def test_second_run_in_a_folder_is_refused(config):
    cfg = config()
    Path(cfg.out).mkdir()
    with open(Path(cfg.out) / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing .*--out"):
            train(cfg)
    train(cfg)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "other", "code"])
def test_damaged_training_state_is_one_line(damage, config, tmp_path):
    cfg, ran = config(), tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(ran),))
    train(cfg)
    file = Path(cfg.out) / "training_state.pt"
    whole = file.read_bytes()
    {"cut": lambda: file.write_bytes(whole[: len(whole) // 2]), "noise": lambda: file.write_bytes(bytes(500)),
     "empty": lambda: file.write_bytes(b""), "other": lambda: torch.save({"a": 1}, file),
     "code": lambda: torch.save({"config": Code()}, file)}[damage]()
    message = "training_state.pt has the unknown field 'a'" if damage == "other" else (
        r"training_state.pt is damaged .*\(\w+\); .* --overwrite")
    with pytest.raises(UserError, match=message) as e:
        resolve_config(dict(resume=True, out=cfg.out))
    assert "\n" not in str(e.value) and not ran.exists()


@pytest.mark.parametrize("change, message", [
    (dict(step=-1), "step is -1"), (dict(best="x"), "best is 'x'"), (dict(losses=["x"]), "losses.0 is 'x'"),
    (dict(losses=[math.nan]), "losses.0 is nan"), (dict(scaler=None), "scaler is null"),
    (dict(config={}), "config lacks the field 'preset'"), (dict(model={}), "have changed since"),
    (dict(optimizer=dict(state={0: {}}, param_groups=[])), "optimizer.state.0 lacks the field 'step'"),
    (dict(optimizer=dict(state={0: dict.fromkeys(["step", "exp_avg", "exp_avg_sq"], torch.zeros(1))},
                         param_groups=[])), "do not fit the model"), ("nan", "do not fit the model")])
def test_training_state_of_another_run_is_one_line(change, message, config):
    cfg = config()
    train(cfg)
    saved = state_of(cfg)
    if change == "nan":
        next(iter(saved["model"].values())).fill_(math.nan)
        change = {}
    torch.save(saved | change, Path(cfg.out) / "training_state.pt")
    with pytest.raises(UserError, match=message) as e:
        go_on(cfg)
    assert "\n" not in str(e.value)


def test_files_of_others_are_neither_replaced_nor_removed(config):
    """train.py once removed every *.tmp of its folder, and replaced somebody's tokenizer.json."""
    cfg = config()
    out = Path(cfg.out)
    out.mkdir()
    for name in ("thesis.tmp", "a.12.tmp"):
        (out / name).write_text("mine")
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(UserError, match="holds a file tokenizer.json .* not belong to a training run"):
        train(cfg)
    assert {file.name for file in out.iterdir()} == {"thesis.tmp", "a.12.tmp", "tokenizer.json"}
    (out / "tokenizer.json").unlink()
    (out / "loss.png.77.tmp").touch()                                 # of a run that was killed
    (out / ".lock").touch()
    train(cfg)
    assert (out / "thesis.tmp").read_text() == (out / "a.12.tmp").read_text() == "mine"
    assert not (out / "loss.png.77.tmp").exists()


def test_changed_weights_or_data_are_not_resumed(base, config, tmp_path):
    for name in ("weights", "data"):
        shutil.copytree(base.folder / name, tmp_path / name)
    cfg = config(weights=str(tmp_path / "weights"), data=str(tmp_path / "data"))
    train(cfg)
    save_backbones(captioner(seed=3, n_positions=40), tmp_path / "weights")
    with pytest.raises(UserError, match="have changed since the run in .* started"):
        go_on(cfg)
    cfg = config(preset="shapes", data=str(tmp_path / "data"), out=str(tmp_path / "scratch"), train="all")
    train(cfg)
    make_set(tmp_path / "data", tokenizer=base.model.tokenizer)
    with pytest.raises(UserError, match="have changed since the run in .* started"):
        go_on(cfg)


# --------------------------------------------------------------------------------------------------
# what can go wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_what_is_good(config, monkeypatch):
    cfg = config(max_steps=3, save_interval=1, eval_interval=1)
    train(cfg)
    train_step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda *args: train_step(*args) * math.nan)
    names = ["training_state.pt", "fusion.safetensors", "config.json", "log.jsonl"]
    kept = {name: (Path(cfg.out) / name).read_bytes() for name in names}
    with pytest.raises(UserError, match="the loss became nan at step 4; .* last good .*--learning-rate"):
        go_on(cfg, max_steps=6)
    assert {name: (Path(cfg.out) / name).read_bytes() for name in kept} == kept
    assert all(p.isfinite().all() for p in VisionGPT.from_pretrained(cfg.out, device="cpu").parameters())


@pytest.mark.parametrize("ask", [
    lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8),
    lambda: exec("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')", {"torch": torch})])
def test_out_of_memory_names_the_flags(ask, config, monkeypatch):
    cfg = config(batch_size=4, grad_accumulation=2)
    flags = ["--data", cfg.data, "--weights", cfg.weights, "--out", cfg.out, "--batch-size=4", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--grad_accumulation", "2"])
    monkeypatch.setattr(VisionGPT, "loss", lambda *args, **named: ask())
    with pytest.raises(UserError, match=r"--batch-size \(4\) and raise --grad-accumulation \(2\)"):
        trainer.main()
    monkeypatch.setattr(VisionGPT, "loss", lambda *args, **named: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):                # a mistake of ours stays one
        trainer.main()


def test_what_is_missing_is_named_with_its_command(base, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="python prepare_flickr8k.py"):
        train(config(data="none"))
    with pytest.raises(UserError, match=r"none/vit.safetensors and none/gpt2.safetensors missing: "
                                        r"run python convert_weights.py, .*--weights"):
        train(config(weights="none"))
    with pytest.raises(UserError, match="other.safetensors missing"):
        train(config(vit="other.safetensors"))
    with pytest.raises(UserError, match="none is not a checkpoint folder"):
        train(config(init_from="none"))
    for tracker in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, "wandb", None)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(UserError, match=f"pip install {tracker}"):
            train(config(tracker=tracker))


def test_tokens_that_are_not_gpt2s_are_an_error(base, config, tmp_path):
    shutil.copytree(base.folder / "weights", tmp_path / "weights")
    (tmp_path / "weights/tokenizer.json").unlink()
    with pytest.raises(UserError, match="the tokenizer has .* tokens, the model"):
        train(cfg := config(weights=str(tmp_path / "weights")))
    assert not (Path(cfg.out) / "log.jsonl").exists()              # before any step


def test_too_long_a_caption_is_an_error_before_any_work(base, config, tmp_path):
    make_set(tmp_path / "data", longest=45)
    with pytest.raises(UserError, match=r"a caption of \d+ tokens is too long .* room for 39"):
        train(config(data=str(tmp_path / "data")))
    assert not list((tmp_path / "data").glob("features-*"))


@pytest.mark.parametrize("flag, value, message", [
    ("batch_size", 0, "batch_size is 0, but must be from 1 to"), ("epochs", 0, "at least 1"),
    ("learning_rate", math.nan, "learning_rate is nan"), ("learning_rate", -1.0, "from 0 to 1000"),
    ("dropout", 1.0, "dropout is 1.0, but must be from 0 to 0.99"), ("min_lr", math.inf, "is inf"),
    ("label_smoothing", 1.5, "to 0.99"), ("grad_clip", -1.0, "from 0 to"), ("threads", 100000, "to 256"),
    ("eval_interval", 0, "1")])
def test_settings_that_cannot_be_are_refused(flag, value, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**{flag: value})


@pytest.mark.parametrize("given", [dict(gpt2="file", preset="shapes"), dict(gpt2="file", preset="mini"),
                                   dict(gpt2="file", init_from="out/run"), dict(vit="file", preset="shapes")])
def test_backbones_that_would_not_be_read_are_refused(given):
    with pytest.raises(UserError, match="--gpt2 is only for a new model|--vit cannot go with preset shapes"):
        TrainConfig(**given)


# --------------------------------------------------------------------------------------------------
# the pieces of the loop


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=10)
    rates = [get_lr(step, 110, cfg) for step in range(111)]
    assert max(get_lr(step, 32, cfg) for step in range(32)) == 1.0        # short runs reach the peak too
    assert get_lr(109, 110, TrainConfig(learning_rate=0.01, min_lr=0.1)) == 0.01            # and none rises
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert rates[35] == pytest.approx(0.1 + 0.45 * (1 + math.sqrt(0.5)))
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert get_lr(0, 10, TrainConfig(learning_rate=2.0, min_lr=0.0, warmup_steps=0)) == 2.0
    assert get_lr(500, 110, cfg) == pytest.approx(0.1)


@pytest.mark.parametrize("part", ["fusion", "all"])
def test_optimizer_decays_matrices_of_what_is_trained(part, config):
    cfg = config(train=part, weight_decay=0.3)
    model, _ = build_model(cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = configure_optimizer(model, cfg).param_groups
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0] and not decayed & spared
    trained = {name for name in names.values() if part == "all" or name.startswith(("resampler.", "xattn."))}
    assert decayed | spared == trained
    for name in decayed | spared:
        norm = any(word in name for word in ("norm", ".ln", "ln_"))
        matrix = name.endswith(".weight") and not norm
        assert (name in decayed) == matrix, name
    assert "resampler.latents" in spared and "xattn.1.ln.weight" in spared and "xattn.1.kv.weight" in decayed


@pytest.mark.parametrize("kind", ["fusion", "all", "from fusion", "from all", "mini"])
def test_dropout_is_only_in_what_is_trained(kind, base, config):
    """Fine-tuning everything once had none in the backbones, which come without."""
    start = {"init_from": str(base.folder / "fusion")} if kind.startswith("from") else {}
    part = "text" if kind == "mini" else "fusion" if kind.endswith("fusion") else "all"
    preset = dict(preset="mini") if kind == "mini" else {}
    model, _ = build_model(config(train=part, dropout=0.4, **start, **preset))
    trained = {"fusion": ("resampler.", "xattn."), "text": ("resampler.", "xattn.", "gpt2."), "all": ""}[part]
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            active = module.training and module.p == 0.4
            assert active == name.startswith(trained), name
    assert model.config.resampler.dropout == 0.4
    assert model.config.gpt2.dropout == (0 if part == "fusion" else 0.4)
    assert kind == "mini" or model.config.vit.dropout == (0.4 if part == "all" else 0)


def test_validation_is_over_targets_with_every_image_at_its_place(base, config):
    cfg = config(train="all", init_from=str(base.folder / "complete"))
    model, data = build_model(cfg)
    eyes = ImageInputs(model, data, cfg, torch.device("cpu"), torch.float32)
    images = data.split("train")
    state, total, count = torch.get_rng_state(), 0.0, 0
    model.train()
    found = [estimate_loss(model, data, eyes, images, n, None) for n in (1, 3, 5, 50)]
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()
    with torch.no_grad():
        for i in images:
            batch = to_device(collate(data, np.array([i]), eyes), model.device, model.config.vit)
            total += trainer.batch_loss(model, batch, None).item()
            count += batch["count"]
    assert [own for own, _ in found] == pytest.approx([total / count] * 4, rel=1e-6)
    assert all(abs(other - own) > 1e-6 for own, other in found)


# --------------------------------------------------------------------------------------------------
# what a run leaves


def preprocessed(data, model, images):
    return normalize(read_pixels(data, images, model.config.vit.image_size), model.config.vit)


def test_a_run_leaves_the_best_model_and_its_pictures(base, config, capsys):
    """Of the fusion alone, over the frozen files; a learning rate as high as this makes later steps worse."""
    cfg = config(max_steps=5, eval_interval=1, learning_rate=0.1, min_lr=0.1, num_samples=2)
    best = train(cfg)
    losses = log_of(cfg, "val_loss")
    assert best == min(losses.values()) and losses[1] > best < losses[5]
    out, training = Path(cfg.out), checkpoint.read_config(cfg.out)["training"]
    assert losses[training["step"]] == best == training["val_loss"]
    assert training["photographs"] and training["preset"] == "flickr8k" and training["data"] == cfg.data
    names = {file.name for file in out.iterdir()}
    assert names == {".lock", "config.json", "drafts.safetensors", "fusion.safetensors", "log.jsonl",
                     "loss.png", "samples.png", "tokenizer.json", "training_state.pt"}
    tensors = checkpoint.read_tensors(out / "fusion.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"resampler", "xattn"} and all(
        t.dtype == torch.float32 for t in tensors.values())
    assert set(state_of(cfg)["model"]) == set(tensors)
    model = VisionGPT.from_pretrained(out, device="cpu")
    data = CaptionSet(cfg.data, model.tokenizer)
    eyes = ImageInputs(model, data, cfg, torch.device("cpu"), torch.float32)
    again, _ = estimate_loss(model, data, eyes, data.split("val"), 3, None)
    assert again == pytest.approx(best, rel=1e-6)
    texts = model.eval().generate(preprocessed(data, model, data.split("val")), max_length=39)
    sheet = figures.contact_sheet([Image.fromarray(base.pictures[i]) for i in data.split("val")], texts)
    assert np.array_equal(Image.open(out / "samples.png"), sheet)                  # by the best, not the last
    assert len(Image.open(out / "loss.png").getcolors(1 << 24)) > 10
    shown = capsys.readouterr().out
    assert f"step 5: validation loss {losses[5]:.4f}, with another image" in shown
    assert "9.jpg: " in shown and f"(reference: {base.texts[9][0]})" in shown


@pytest.mark.parametrize("source", ["complete", "fusion"])
@pytest.mark.parametrize("part", ["fusion", "all"])
def test_fine_tuning_starts_from_the_model_it_is_given(source, part, base, config):
    """With a learning rate of nothing the best model is the one it came from, kept in the same form."""
    cfg = config(init_from=str(base.folder / source), train=part, learning_rate=0.0, min_lr=0.0,
                 dtype="bfloat16")
    train(cfg)
    form = "fusion.safetensors" if source == part == "fusion" else "model.safetensors"
    assert {file.name for file in Path(cfg.out).glob("*.safetensors")} == {form, "drafts.safetensors"}
    model = VisionGPT.from_pretrained(cfg.out, device="cpu")
    assert flat(dict(model.state_dict())) == flat(dict(base.model.state_dict()))


def test_bfloat16_trains_the_same_loss(base, config, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        cfg = config(dtype=dtype, max_steps=3, learning_rate=1e-3, init_from=str(base.folder / "fusion"),
                     out=str(tmp_path / dtype), dropout=0.0)
        train(cfg)
        losses[dtype] = list(log_of(cfg, "loss").values())
        assert {t.dtype for t in state_of(cfg)["model"].values()} == {torch.float32}
    assert bool(state_of(cfg)["scaler"])                           # float16 scales its loss
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.005)
    assert len({tuple(values) for values in losses.values()}) == 3


def test_blind_training_sees_nothing(config):
    cfg = config(blind=True, max_steps=2, eval_interval=1)
    train(cfg)
    assert log_of(cfg, "val_loss") == pytest.approx(log_of(cfg, "val_loss_shuffled"), rel=1e-6)
    assert checkpoint.read_config(cfg.out)["training"]["blind"] is True


def test_training_changes_nothing_global(config):
    def state():
        return (torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads(),
                torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), random.getstate(),
                np.random.get_state()[1].tolist(), torch.get_default_device(), os.getcwd(),
                torch.backends.cuda.flash_sdp_enabled(), torch.are_deterministic_algorithms_enabled())
    before = state()
    train(config(threads=3))
    assert state() == before


def test_trains_on_so_many_threads(config, monkeypatch):
    monkeypatch.setattr(trainer, "finish", lambda *_: seen.append(torch.get_num_threads()))
    seen = []
    train(config(threads=3))
    train(config(overwrite=True))
    assert seen == [3, torch.get_num_threads()]


# --------------------------------------------------------------------------------------------------
# presets and the command line


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings(preset):
    cfg, state = resolve_config({"preset": preset, "epochs": 3})
    assert state is None and cfg.epochs == 3 and cfg.out == f"out/{preset}"
    for name, value in PRESETS[preset].items():
        assert type(value) is type(getattr(TrainConfig(), name)), name
        assert getattr(cfg, name) == (3 if name == "epochs" else value)
    assert cfg.train == {"flickr8k": "fusion", "mini": "text", "shapes": "all"}[preset]


def test_shapes_preset_trains_a_complete_model_and_judges_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare_shapes.prepare(prepare_shapes.ShapesConfig(train_scenes=12, eval_scenes=4, image_size=32))
    flags = "--preset shapes --max-steps 2 --batch-size=4 --device cpu"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    trainer.main()
    assert "of 4 greedy captions of unseen test scenes are right in every word" in capsys.readouterr().out
    training = checkpoint.read_config("out/shapes")["training"]
    assert not training["photographs"] and training["data"] == "data/shapes"
    model = VisionGPT.from_pretrained("out/shapes", device="cpu")
    assert model.config.vit.image_size == 96 and not model.backbones
    with pytest.raises(UserError, match="no checkpoint found"):
        monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
        checkpoint.find_checkpoint()                               # a captioner of photographs is not at hand


def test_mini_preset_makes_its_own_tokens(base, config):
    cfg = config(**{**PRESETS["mini"], "preset": "mini"})
    model, data = build_model(cfg)
    texts = [text for i in data.split("train") for text in base.texts[i]]
    assert data.tokenizer.ranks == model.tokenizer.ranks != CaptionSet(cfg.data).tokenizer.ranks
    assert "".join(texts) and model.config.gpt2.vocab_size == data.tokenizer.vocab_size
    assert model.config.gpt2.n_positions == 64 and model.frozen == ("vit",)
    bundled = VisionGPT.from_pretrained(checkpoint.ROOT / "assets/mini", "cpu")
    assert all(torch.equal(p, bundled.vit.state_dict()[name]) for name, p in model.vit.state_dict().items())


def test_mini_preset_takes_another_vit(base, config):
    eyes = base.folder / "weights/vit.safetensors"
    model, _ = build_model(config(**{**PRESETS["mini"], "preset": "mini", "vit": str(eyes)}))
    assert torch.equal(model.vit.pos_embed, base.model.vit.pos_embed)


@pytest.mark.parametrize("source", ["complete", "fusion"])
def test_a_model_is_fine_tuned_behind_another_vit(source, base, config, tmp_path):
    eyes, file = ViT(dataclasses.replace(base.model.config.vit, n_layer=1)), tmp_path / "eyes.safetensors"
    checkpoint.save_module(eyes, file, sha256=checkpoint.sha256(eyes.state_dict()))
    cfg = config(init_from=str(base.folder / source), vit=str(file), eval_interval=1)
    train(cfg)
    seen = VisionGPT.from_pretrained(cfg.out, "cpu")
    assert torch.equal(seen.vit.pos_embed, eyes.pos_embed) and seen.config.vit.n_layer == 1
    assert torch.equal(seen.gpt2.wte.weight, base.model.gpt2.wte.weight)
    narrow = ViT(dataclasses.replace(base.model.config.vit, n_embd=8, n_head=2))
    checkpoint.save_module(narrow, file)
    with pytest.raises(UserError, match="has width 8, but the model's own has 12"):
        build_model(cfg)


# --------------------------------------------------------------------------------------------------
# rewards


def test_evaluation_scores_captions_and_keeps_the_model_with_the_best(base, config):
    cfg = config(init_from=str(base.folder / "complete"), eval_captions=4, select="CIDEr", max_steps=4,
                 eval_interval=1)
    best = train(cfg)
    cider, loss = log_of(cfg, "val_cider"), log_of(cfg, "val_loss")
    assert best == -max(cider.values()) and log_of(cfg, "val_cider_shuffled") and len(loss) == 4
    saved = checkpoint.read_config(cfg.out)["training"]
    assert saved["val_cider"] == max(cider.values()) and 0 <= saved["val_ended"] <= 1


def test_reward_is_cider_d_with_an_end_word(base, config):
    _, data = build_model(config())
    images = data.split("train").tolist()
    reward = trainer.Reward({i: data.references(i) for i in images})
    texts = [data.references(i)[0] for i in images]
    others = texts[1:] + texts[:1]
    found = [reward(i, [text, other], [True, False]) for i, text, other in zip(images, texts, others)]
    references = [[text + " END" for text in data.references(i)] for i in images]
    for column, said in enumerate(([text + " END" for text in texts], others)):
        wanted = score(said, references)[1]["CIDEr"]
        assert [pair[column] for pair in found] == pytest.approx(wanted, rel=1e-9)


def test_self_critical_gradient_is_that_of_the_expected_reward(base, config, monkeypatch):
    """Averaged over many samples it nears the gradient of sum over captions of probability x reward.

    Captions of a single token or none, so that all of them can be listed; the reward favours one token.
    """
    cfg = config(init_from=str(base.folder / "complete"), dropout=0.0, self_critical=64)
    model, data = build_model(cfg)
    inputs = ImageInputs(model, data, cfg, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(trainer, "caption_room", lambda model: 1)
    batch = to_device(collate(data, data.split("train")[:2], inputs), model.device, model.config.vit)
    torch.manual_seed(0)
    worth = torch.rand(model.eos_id + 1)
    token_of = {model.tokenizer.decode([i]): i for i in range(model.eos_id)} | {"": model.eos_id}

    def reward(image, texts, ended):
        return [worth[token_of[text]].item() for text in texts]
    total = 0.0
    for _ in range(300):
        loss = trainer.self_critical_loss(model, batch, reward, cfg.self_critical, None)
        total = total + torch.autograd.grad(loss, model.xattn["1"].out.weight)[0] / 300
    start = torch.full((2, 1), model.eos_id)
    logits, _ = model(start, model.encode(features=batch["features"]))
    values = torch.tensor([worth[token_of[model.tokenizer.decode([i])]] if i < model.eos_id else worth[i]
                           for i in range(model.eos_id + 1)])
    expected = -(logits[:, 0].softmax(-1) @ values).mean()
    exact = torch.autograd.grad(expected, model.xattn["1"].out.weight)[0]
    assert F.cosine_similarity(total.flatten(), exact.flatten(), 0) > 0.95
    assert 0.8 < total.norm() / exact.norm() < 1.25


@pytest.mark.parametrize("given, message", [
    (dict(self_critical=5), "name its folder with --init-from"),
    (dict(self_critical=1, init_from="out/run"), "at least 2 captions"),
    (dict(self_critical=5, init_from="out/run", label_smoothing=0.1), "leave them out with --self-critical"),
    (dict(self_critical=5, init_from="out/run", captions_per_image=2), "leave them out with --self-critical"),
    (dict(vit="."), "--vit . is a folder: name a vit.safetensors"),
    (dict(select="CIDEr"), "add --eval-captions")])
def test_settings_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**given)


def test_rewards_weigh_images_alike_in_uneven_micro_batches(base, config, monkeypatch):
    """A step's loss is the mean over images, here of made-up rewards: the number of each image."""
    cfg = config(init_from=str(base.folder / "complete"), self_critical=2)
    model, data = build_model(cfg)
    inputs = ImageInputs(model, data, cfg, torch.device("cpu"), torch.float32)
    parts = data.split("train")[:3], data.split("train")[3:4]
    batches = [collate(data, part, inputs) | {"seed": 0} for part in parts]

    def loss_of(model, batch, *args):
        return model.resampler.latents.sum() * 0 + float(np.mean(batch["numbers"]))

    monkeypatch.setattr(trainer, "self_critical_loss", loss_of)
    optimizer, scaler = trainer.configure_optimizer(model, cfg), torch.amp.GradScaler("cpu", enabled=False)
    for n in (1, 2):
        loss = trainer.train_step(model, optimizer, scaler, batches[:n], cfg, None, reward=object())
        assert loss.item() == pytest.approx(np.concatenate(parts[:n]).mean())


def test_self_critical_run_writes_its_rewards(base, config):
    given = dict(init_from=str(base.folder / "complete"), self_critical=3, preset="mini", eval_captions=2)
    cfg, _ = resolve_config({**dataclasses.asdict(config(**given)), "train": "all", "max_steps": 2})
    assert trainer.resolve_config(given)[0].select == "CIDEr"
    train(cfg)
    assert all(-10 <= loss <= 0 for loss in log_of(cfg, "loss").values())


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as done:
        cli.parse(TrainConfig, trainer.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and "python train.py --preset shapes" in text
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(TrainConfig))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_training_on_a_gpu_follows_the_cpu(dtype, base, config, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        cfg = config(device=device, dtype=dtype if device == "cuda" else "float32", max_steps=4, dropout=0.0,
                     learning_rate=1e-3, init_from=str(base.folder / "fusion"), out=str(tmp_path / device))
        train(dataclasses.replace(cfg, max_steps=2))
        go_on(cfg, max_steps=4)
        losses.append(list(log_of(cfg, "loss").values()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if dtype == "float32" else 0.02)


# --------------------------------------------------------------------------------------------------
# bugs that were fixed


def test_blind_run_does_not_count_as_trained_on_photographs(config):
    """The caption-only baseline, being newest, became the model that sample.py chose."""
    cfg = config(blind=True)
    train(cfg)
    training = checkpoint.read_config(cfg.out)["training"]
    assert training["blind"] and not training["photographs"]


def test_resume_refuses_captions_that_changed(config, tmp_path):
    """A set prepared anew was gone on with in silence, in another order."""
    folder = tmp_path / "copy"
    cfg = config(max_steps=1)
    shutil.copytree(cfg.data, folder)
    cfg = dataclasses.replace(cfg, data=str(folder))
    train(cfg)
    texts = json.loads((folder / "captions.json").read_text())
    (folder / "captions.json").write_text(json.dumps([texts[-1], *texts[1:]]))
    with pytest.raises(UserError, match="have changed since"):
        go_on(cfg, max_steps=2)


def test_validation_never_compares_an_image_with_itself(config):
    """Odd numbers of images left a batch of one, whose neighbour was the image itself."""
    cfg = config(batch_size=2)
    model, data = build_model(cfg)
    sizes = []

    class Seen:
        def __call__(self, images, rng=None):
            sizes.append(len(images))
            S = model.config.vit.image_size
            return {"images": torch.zeros(len(images), 3, S, S)}
    images = data.split("train")
    for count in (3, 5, len(images)):
        estimate_loss(model, data, Seen(), images[:count], 2, None)
    assert min(sizes) >= 2


def test_word_dropout_hides_its_share_of_the_words_from_gpt2_alone(config, monkeypatch):
    seen = []

    def look(model, tokens, visual, targets, *rest, **named):
        seen.append((tokens, targets))
        return model.xattn["1"].out.weight.sum() * 0

    monkeypatch.setattr(VisionGPT, "loss", look)
    cfg = config(word_dropout=0.25, max_steps=30)
    train(cfg)
    end = build_model(cfg)[0].eos_id
    hidden, words = 0, 0
    for tokens, targets in seen[:30]:                                 # the rest is of the validation
        words += int(((targets != -100) & (targets != end)).sum())
        followed = targets[:, :-1] == tokens[:, 1:]
        hidden += int(((targets[:, :-1] >= 0) & (targets[:, :-1] != end) & ~followed).sum())
    assert 0.2 < hidden / words < 0.3


@pytest.fixture(scope="module")
def rare_words(tmp_path_factory):
    """A prepared set in which most words are seen with few images."""
    folder = tmp_path_factory.mktemp("rare")
    make_set(folder, images=60, longest=1)
    return folder


def test_a_run_with_all_that_is_random_goes_on_as_if_nothing_had_been(base, rare_words, config, monkeypatch):
    cfg = config(train="all", data=str(rare_words), init_from=str(base.folder / "complete"),
                 word_dropout=0.2, captions_per_image=1, grad_accumulation=2, augment=True,
                 max_steps=6, save_interval=3, dropout=0.1, label_smoothing=0.1, batch_size=4)
    train(cfg)
    broken, calls, batch_loss = dataclasses.replace(cfg, out=cfg.out + "-broken"), [], trainer.batch_loss

    def stop(*args, **named):
        calls.append(args)
        if len(calls) == 9:                                            # in step 5, after the save at 3
            raise ZeroDivisionError
        return batch_loss(*args, **named)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer, "batch_loss", stop)
        train(broken)
    assert state_of(broken)["step"] == 3
    go_on(broken)
    assert flat(state_of(broken)["model"]) == flat(state_of(cfg)["model"])
