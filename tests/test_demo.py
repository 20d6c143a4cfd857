"""demo.py: what its server answers and refuses, and the page itself where there is a browser."""

import json
import re
import shutil
import socket
import threading
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import ROOT, random_captioner
from PIL import Image

import demo
from lib.cli import UserError
from model import VisionGPT
from sample import caption_words

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PICTURE = ROOT / "assets/examples/coffee.jpg"


@pytest.fixture(scope="module")
def model():
    return random_captioner(n_positions=40)


def serve(model):
    server = demo.make_server(demo.DemoConfig(port=0), model, "tiny")
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    return server


@pytest.fixture(scope="module")
def server(model):
    server = serve(model)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(server):
    """ask(path, body, headers) -> status, content; a GET without a body, a POST with one."""
    def ask(path, body=None, headers=None):
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if "json" in answer.headers["Content-Type"] else content
    return ask


def test_page_examples_and_nothing_else_are_served(ask):
    status, page = ask("/")
    assert status == 200 and page == (ROOT / "assets/demo.html").read_bytes()
    status, info = ask("/info")
    assert status == 200 and info["examples"][:2] == ["astronaut.jpg", "camera.jpg"]
    assert ask("/examples/coffee.jpg") == (200, PICTURE.read_bytes())
    for path in ("/examples/../../demo.py", "/examples/%2e%2e/%2e%2e/demo.py", "/demo.py", "//etc/passwd"):
        assert ask(path)[0] == 404, path


def test_page_needs_nothing_from_elsewhere():
    page = (ROOT / "assets/demo.html").read_text()
    assert not re.findall(r"https?://|\bimport\b|@import|src=\"(?!\")", page)


def test_captions_are_the_models_own(ask, model):
    body = PICTURE.read_bytes()
    status, answer = ask("/caption?num_beams=3&max_length=8", body)
    assert status == 200 and "words" not in answer["captions"][0]
    expected = model.caption(PICTURE, num_beams=3, num_return_sequences=3, max_length=8)
    assert [one["text"] for one in answer["captions"]] == expected
    greedy = ask("/caption?num_beams=1&max_length=8&prompt=two%20men", body)[1]["captions"]
    assert [one["text"] for one in greedy] == [model.caption(PICTURE, prompt="two men", max_length=8)]


def test_samples_follow_the_seed_and_come_best_first(ask):
    body = PICTURE.read_bytes()
    first, again, other = (ask(f"/caption?temperature=1&max_length=6&seed={seed}", body)[1]["captions"]
                           for seed in (1, 1, 2))
    assert len(first) == 4 and first == again != other
    assert [one["score"] for one in first] == sorted((one["score"] for one in first), reverse=True)


def test_words_have_the_mean_map_of_their_tokens(ask, model):
    """Computed for all captions at once in the server, here for each alone."""
    query = "temperature=2&seed=1&min_length=11&max_length=12&prompt=two%20men"
    captions = ask(f"/caption?{query}&attention=1", PICTURE.read_bytes())[1]["captions"]
    images, prompt = model.preprocess([PICTURE]), model.tokenizer.encode("two men")
    generator, several = torch.Generator().manual_seed(1), 0
    rows, scores = model.generate_tokens(demo.read_options(query)[0], prompt, images, generator=generator)
    rows = [row for _, row in sorted(zip(scores, rows), reverse=True)]
    for one, row in zip(captions, rows):
        tokens = torch.tensor([[model.eos_id, *prompt, *row]])
        maps = model.attention_maps(images, tokens)[0, len(prompt) : -1]
        assert one["text"] == "two men" + model.tokenizer.decode(row).rstrip()
        words = [(word, maps[at].mean(0)) for word, at in caption_words(model.tokenizer, row) if word]
        assert [w["word"] for w in one["words"]] == [word for word, _ in words]
        for shown, (_, expected) in zip(one["words"], words):
            assert np.allclose(shown["map"], expected / expected.max(), atol=1e-4)
        several += sum(len(at) > 1 for _, at in caption_words(model.tokenizer, row))
    assert several > 2


def test_a_flag_of_the_query_is_on_or_off():
    for value in (0, 1):
        assert demo.read_options(f"num_beams=1&drafts={value}")[0].drafts is bool(value)


def test_a_long_prompt_leaves_room_or_is_refused(ask):
    body = PICTURE.read_bytes()
    assert ask("/caption?num_beams=1&prompt=" + "z" * 30, body)[0] == 200        # 9 positions left of 40
    status, answer = ask("/caption?prompt=" + "z" * 60, body)
    assert status == 400 and "the 0 positions" in answer["error"]


@pytest.mark.parametrize("query, body, status, message", [
    ("", b"no picture", 400, "not a JPEG"),
    ("", PICTURE.read_bytes()[:9000], 400, "cannot read the picture"),
    ("", b"", 400, "not a JPEG"),
    ("num_beam=3", None, 400, "did you mean num_beams"),
    ("num_beams=many", None, 400, "must be a number"),
    ("num_beams=17", None, 400, "16 at most"),
    ("num_beams=0", None, 400, "at least 1|from 1"),
    ("temperature=nan", None, 400, "temperature"),
    ("temperature=1&num_beams=2", None, 400, "beam search cannot be combined"),
    ("max_length=1000", None, 400, "200 at most"),
    ("prompt=" + 501 * "a", None, 400, "500 at most"),
])
def test_mistakes_are_one_sentence(ask, query, body, status, message):
    got, answer = ask(f"/caption?{query}", PICTURE.read_bytes() if body is None else body)
    assert got == status and re.search(message, answer["error"]) and "\n" not in answer["error"], answer


def test_uploads_are_limited(ask, server):
    """Told before the picture has come; without its length it is not read at all."""
    assert ask("/caption", b"x", {"Content-Length": str(33 << 20)}) == (
        413, {"error": "this has 33 MB; the limit is 32 MB"})
    assert ask("/caption", b"x", {"Content-Length": "-1"})[0] == 411
    assert ask("/caption", iter([b"x"]), {"Transfer-Encoding": "chunked"})[0] == 411
    assert ask("/info", b"x")[0] == 404


def test_other_sites_cannot_ask(ask, server):
    """Neither by a form or script of theirs, nor by pointing a name of theirs to this machine."""
    body, here = PICTURE.read_bytes(), f"127.0.0.1:{server.server_port}"
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://{here}.evil.example"):
        assert ask("/caption?max_length=2", body, {"Origin": origin})[0] == 403, origin
    assert ask("/caption?max_length=2", body, {"Origin": f"http://{here}"})[0] == 200
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1.evil.example", "", "[::1"):
        assert ask("/", headers={"Host": host})[0] == 403, host
    for host in ("localhost", "LOCALHOST:80", "[::1]:80", "192.168.1.5"):
        assert ask("/info", headers={"Host": host})[0] == 200, host


def test_slow_clients_are_hung_up_on(server, monkeypatch):
    """A byte now and then would outlive a limit on silence alone."""
    monkeypatch.setattr(demo.Page, "deadline", 0.2)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as slow:
        slow.sendall(b"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        assert slow.recv(100) == b""


def test_pictures_take_turns(ask, server, monkeypatch):
    body = PICTURE.read_bytes()
    alone = ask("/caption?max_length=9", body)[1]["captions"]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask("/caption?max_length=9", body), range(6)))
    assert all(status == 200 and answer["captions"] == alone for status, answer in answers)
    monkeypatch.setattr(server, "places", threading.Semaphore(0))
    assert ask("/caption", body)[0] == 503


def test_a_taken_port_is_told(server, model):
    with pytest.raises(UserError, match="choose another --port"):
        demo.make_server(demo.DemoConfig(port=server.server_port), model, "tiny")


def test_page_in_a_browser():
    """Examples, drop, words under the pointer and the keyboard, a bad and a large file, two tabs."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    if not CHROMIUM:
        pytest.skip("no chromium here")
    server = serve(VisionGPT.from_pretrained(ROOT / "assets/mini", "cpu"))
    drop = """([name, base64]) => {
        const data = new DataTransfer(), bytes = Uint8Array.from(atob(base64), c => c.charCodeAt());
        data.items.add(new File([bytes], name));
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
    }"""
    small = BytesIO()
    Image.new("RGB", (60, 40), "green").save(small, "PNG")
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tabs = [browser.new_page() for _ in range(2)]
        problems = []
        for tab in tabs:
            tab.set_default_timeout(60_000)          # a busy machine
            tab.on("pageerror", lambda error: problems.append(str(error)))
            tab.goto(server.url)
        for tab in tabs:
            tab.wait_for_selector(".word")
        page = tabs[0]

        said = page.inner_text("#caption")
        with page.expect_response(lambda answer: "/caption" in answer.url):
            page.evaluate(drop, ["green.png", b64encode(small.getvalue()).decode()])
        page.wait_for_selector(".word")
        assert page.get_attribute("#photo", "alt") == "green.png" and page.inner_text("#caption") != said
        assert page.evaluate("[photo.naturalWidth, photo.naturalHeight]") == [60, 40]

        assert not page.query_selector("#heat.on")
        page.locator(".word").nth(1).hover()
        page.wait_for_selector("#heat.on")
        one = page.evaluate("heat.toDataURL()")
        page.locator("h1").hover()
        assert not page.query_selector("#heat.on")
        page.locator(".word").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("heat.toDataURL()") == one and page.query_selector("#heat.on")
        assert ", looked at the " in page.evaluate("document.activeElement.ariaLabel")

        page.evaluate(drop, ["notes.txt", "bm8="])
        page.wait_for_selector("#error:not([hidden])")
        assert "not a JPEG" in page.inner_text("#error") and not page.query_selector(".word")
        page.evaluate("take(new File([new Uint8Array(33 << 20)], 'big.jpg'), 'big.jpg')")
        page.locator("#error", has_text="33 MB; the limit is 32 MB").wait_for()
        page.locator("#examples button").nth(2).click()
        page.wait_for_selector(".word")
        assert page.is_hidden("#error")
        page.fill("[name=prompt]", "two men")
        page.keyboard.press("Enter")
        page.locator("#caption", has_text="two men").wait_for()
        browser.close()
    server.shutdown()
    server.server_close()
    assert not problems
