"""Repositories by name, from a hub and a CDN on this machine that behave as the real ones."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_convert_weights import FIXTURES, published_state, save
from test_model import captioner

from convert_weights import ConvertConfig, convert
from lib import checkpoint, download
from lib.cli import UserError
from lib.hub import local_or_hub
from model import VisionGPT

SHA = "0123456789abcdef" * 2 + "01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Repositories are folders of `root`/user/name. Weights lie on the CDN, as at huggingface.co."""

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url, self.cdn, self.requests = root, f"http://127.0.0.1:{self.server_port}", None, []
        self.private, self.gated, self.hashes, self.cuts, self.limits = [], [], {}, 0, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path.split("?")[0].strip("/").split("/")
        server.requests.append(self.path)
        if server.cdn is None:                                       # a CDN: signed addresses, no tokens
            if "Authorization" in self.headers or "?signature=" not in self.path:
                return self.send_error(400, "only one way to authorize")
            return self.send(server.root / Path(*path))
        name = "/".join(path[2:4] if path[0] == "api" else path[:2])
        if server.limits:
            self.send_response(429)
            self.send_header(*server.limits.pop())
            return self.end_headers()
        known = self.headers.get("Authorization") == "Bearer secret"
        if not (server.root / name).is_dir() or name in server.private and not known:
            return self.send_error(401)                              # also for names that do not exist
        if name in server.gated and not known:
            return self.send_error(403)
        if path[:2] == ["api", "models"]:
            files = [f for f in (server.root / name).rglob("*") if f.is_file()]
            names = [{"rfilename": str(f.relative_to(server.root / name))} for f in files]
            return self.send(json.dumps({"sha": SHA, "siblings": names, "likes": 3}).encode())
        if path[0] == "api":
            return self.send(server.root / Path(*path[2:4], *path[5:]))
        assert path[2:4] == ["resolve", SHA]
        file = server.root / name / Path(*path[4:])
        if file.suffix == ".json" or file.suffix == ".txt":          # within the hub, by a relative address
            return self.redirect(f"/api/cache/{name}/{SHA}/" + "/".join(path[4:]))
        digest = server.hashes.get(file.name) or hashlib.sha256(file.read_bytes()).hexdigest()
        self.redirect(f"{server.cdn.url}/{name}/{'/'.join(path[4:])}?signature=1", f'"{digest}"')

    def redirect(self, location, digest=None):
        self.send_response(302)
        self.send_header("Location", location)
        if digest:
            self.send_header("X-Linked-Etag", digest)
        self.end_headers()

    def send(self, content):
        content = content if isinstance(content, bytes) else content.read_bytes()
        asked = self.headers.get("Range")
        first = int(asked[len("bytes=") : -1]) if asked else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.end_headers()
        if self.server.cuts:
            self.server.cuts -= 1
            content = content[: first + len(content) // 5]
        self.wfile.write(content[first:])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub, cdn = (Hub(tmp_path / "web") for _ in range(2))
    hub.cdn = cdn
    (tmp_path / "web/someone/vit").mkdir(parents=True)
    save(tmp_path / "web/someone/vit/pytorch_model.bin", torch.load(FIXTURES / "timm.pth"))
    (tmp_path / "web/someone/vit/config.json").write_text("{}")
    (tmp_path / "web/someone/vit/flax_model.msgpack").write_bytes(b"of no use here")
    (tmp_path / "home").mkdir()
    for name in ("HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "HUB", hub.url)
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.chdir(tmp_path)
    yield hub
    for server in (hub, cdn):
        server.shutdown()
        server.server_close()


def convert_vit():
    convert(ConvertConfig(vit="someone/vit", heads=3))
    assert Path("weights/vit.safetensors").exists()


def test_vit_by_name_is_downloaded_once(hub):
    hub.cdn.cuts = 2
    convert_vit()
    held = sorted(os.listdir("downloads/someone/vit"))
    assert held == ["config.json", "pytorch_model.bin", "repository.json"]
    hub.requests.clear()
    convert_vit()
    assert hub.requests == [] and local_or_hub("someone/vit") == Path("downloads/someone/vit")


@pytest.mark.parametrize("place", ["variable", "file"])
def test_token_goes_to_the_hub_alone(hub, monkeypatch, place):
    """urllib forwards plain headers to wherever it is redirected; the CDN of this test refuses any token."""
    hub.private = ["someone/vit"]
    with pytest.raises(UserError, match="HTTP 401.*name is wrong.*HF_TOKEN"):
        convert_vit()
    if place == "variable":
        monkeypatch.setenv("HF_TOKEN", "secret")
    else:
        Path("home/token").write_text("secret\n")
    convert_vit()


def test_refusals_of_the_hub_say_what_to_do(hub, monkeypatch):
    hub.gated = ["someone/vit"]
    with pytest.raises(UserError, match="HTTP 403.*ask for access on its page"):
        convert_vit()
    with pytest.raises(UserError, match="HTTP 401.*name is wrong"):
        convert(ConvertConfig(vit="someone/typo"))
    (hub.root / "someone/data").mkdir()
    (hub.root / "someone/data/train.csv").write_text("")
    with pytest.raises(UserError, match="holds no weights"):
        local_or_hub("someone/data")
    assert local_or_hub("web/typo") == Path("web/typo")              # web/ is a folder: no name on the hub
    assert local_or_hub("../vit") == Path("../vit")
    assert not Path("weights").exists()


def test_download_of_another_hash_is_refused(hub):
    hub.hashes["pytorch_model.bin"] = "0" * 64
    with pytest.raises(UserError, match="its sha256 is"):
        convert_vit()
    assert sorted(os.listdir("downloads/someone/vit")) == ["config.json", "repository.started.json"]


def test_two_versions_are_not_spliced(hub, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    hub.cdn.cuts = 1
    with pytest.raises(UserError, match="cut; run it again to resume"):
        convert_vit()
    file = hub.root / "someone/vit/pytorch_model.bin"
    save(file, {name: tensor + 1 for name, tensor in torch.load(file).items()})
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    convert_vit()
    assert Path("downloads/someone/vit/pytorch_model.bin").read_bytes() == file.read_bytes()


def test_requests_to_wait_are_heeded(hub):
    hub.limits = [("Retry-After", "1"), ("RateLimit", '"api";r=0;t=1')]
    start = time.monotonic()
    convert_vit()
    assert time.monotonic() - start > 2
    shutil.rmtree("downloads")
    hub.limits = [("Retry-After", "5000")]
    with pytest.raises(UserError, match="HTTP 429.*tried again in 1:23 h"):
        convert_vit()


def test_shards_by_name(hub):
    folder = hub.root / "someone/vit"
    state = torch.load(folder / "pytorch_model.bin")
    shards = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for shard in set(shards.values()):
        save(folder / shard, {name: tensor for name, tensor in state.items() if shards[name] == shard})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=shards)))
    (folder / "pytorch_model.bin").unlink()
    convert_vit()


def test_published_model_by_name(hub):
    folder = hub.root / "someone/caption/model_fp32"
    folder.mkdir(parents=True)
    save(folder / "model_checkpoint.pth", dict(model_state_dict=published_state()))
    convert(ConvertConfig(vision_gpt="someone/caption", heads=3))
    assert VisionGPT.from_pretrained("weights/vision-gpt", device="cpu").config.cross_attention == (1, 3)


def test_checkpoint_by_name(hub):
    model = captioner()
    model.save_pretrained(hub.root / "someone/mini", training=dict(photographs=True))
    loaded = VisionGPT.from_pretrained("someone/mini", device="cpu")
    images = torch.randn(2, 3, 16, 16)
    assert loaded.generate(images, max_length=9) == model.generate(images, max_length=9)
    convert(ConvertConfig(checkpoint="someone/mini", out="copy"))
    assert checkpoint.read_config("copy")["training"] == dict(photographs=True)


@pytest.mark.parametrize("given, expected", [
    ("", "https://huggingface.co"), ("https://mirror.example/hub/", "https://mirror.example/hub")])
def test_endpoint_may_be_empty_or_end_in_a_slash(given, expected):
    code = "from lib.download import HUB; print(HUB)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HF_ENDPOINT": given},
                          cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.strip() == expected
