"""export_onnx.py: onnxruntime computes what PyTorch does; web/: pictures are resized as Pillow does."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, random_captioner
from PIL import Image

import export_onnx
from gpt2 import KVCache
from lib.cli import UserError
from lib.images import normalize


@pytest.fixture(scope="module")
def model():
    return random_captioner()


def test_missing_packages_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx.export(model, tmp_path)


def test_a_checkpoint_is_not_written_into(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a checkpoint"):
        export_onnx.main(["--checkpoint", str(ROOT / "assets/mini"), "--out", str(tmp_path)])


def test_onnx_gives_pytorchs_logits_and_captions(model, tmp_path):
    """From an empty cache on, for three texts about a picture; the export saw two with a past of three."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install onnx onnxscript onnxruntime")
    export_onnx.export(model, tmp_path)
    exported, rng = export_onnx.OnnxCaptioner(tmp_path), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    tokens = rng.integers(0, model.eos_id, (3, 9))
    (visual,) = exported.encoder.run(None, dict(pixels=pixels))
    cache = np.zeros((2, 2, 3, 2, 0, 12), np.float32)
    with torch.inference_mode():
        cross_kv = model.cross_kv(model.encode(normalize(torch.from_numpy(pixels), model.config.vit)))
        held = KVCache(model.config.gpt2, 3, 9)
        for t in range(9):
            step = dict(token=tokens[:, t : t + 1], cache=cache, visual=visual)
            logits, cache = exported.decoder.run(None, step)
            x = model.hidden(torch.from_numpy(tokens[:, t : t + 1]), cross_kv, cache=held)
            assert np.allclose(logits, model.gpt2.logits(x[:, -1]), atol=1e-4)
    picture = Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8))
    caption = model.tokenizer.decode(exported.caption(picture, 20)).strip()
    assert caption == model.caption(picture, max_length=20)


@pytest.mark.skipif(not shutil.which("node"), reason="no node here")
def test_the_browser_resizes_as_pillow_does(tmp_path):
    """To the byte, but within 1 level where Pillow 13 begins with the height, as with tall pictures."""
    rng, script = np.random.default_rng(0), tmp_path / "try.mjs"
    sizes = [(448, 299), (60, 90), (1, 1), (300, 20), (128, 200)]
    pictures = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sizes]
    np.concatenate([p.ravel() for p in pictures]).tofile(tmp_path / "in")
    shutil.copy(ROOT / "web/resize.js", tmp_path / "resize.mjs")
    script.write_text(f"""
        import fs from "fs";
        import {{ squash }} from "./resize.mjs";
        const all = fs.readFileSync("in");
        let at = 0;
        fs.writeFileSync("out", Buffer.concat({[list(size) for size in sizes]}.map(([w, h]) =>
            squash(all.subarray(at, at += w * h * 3), w, h, 128))));
    """)
    subprocess.run(["node", script], cwd=tmp_path, check=True, timeout=60, capture_output=True)
    found = np.fromfile(tmp_path / "out", np.uint8).reshape(-1, 128, 128, 3)
    for (w, h), picture, one in zip(sizes, pictures, found):
        expected = np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.BILINEAR))
        assert np.abs(one.astype(int) - expected).max() <= (1 if h > w else 0), (w, h)
