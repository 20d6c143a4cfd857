"""Where pictures come from: in which order, what is missing, and sources that never end or hold too much."""

import http.server
import os
import socketserver
import threading
import time

import numpy as np
import pytest
from PIL import Image

from lib import picture_sources
from lib.cli import UserError
from lib.picture_sources import find_pictures, load_source, natural_key


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """photos/ with three pictures, one of them damaged, a text and a subfolder."""
    (tmp_path / "photos/below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("img10.png", "img2.PNG", "below/img0.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos/bad3.jpg").write_bytes(b"no picture")
    (tmp_path / "photos/notes.txt").write_text("no picture either")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server():
    """server(answer) -> a URL at which answer(connection) is called for each request."""
    servers = []

    def serve(answer):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.recv(1 << 16)
                try:
                    answer(self.request)
                except OSError:                                                   # the client has gone
                    pass

        servers.append(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))
        servers[-1].daemon_threads, servers[-1].block_on_close = True, False
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/a.png"

    yield serve
    for one in servers:
        one.shutdown()
        one.server_close()


# --------------------------------------------------------------------------------------------------
# finding


def test_pictures_come_in_natural_order():
    names = ["b/img1.png", "img10.png", "IMG2.png", "img1.png", "a10b2", "a10b10"]
    assert sorted(names, key=natural_key) == [
        "a10b2", "a10b10", "b/img1.png", "img1.png", "IMG2.png", "img10.png"]
    natural_key("https://host/" + "9" * 5000 + "²")                 # more digits than int() takes


def test_pictures_of_folders_patterns_and_names(folder):
    in_folder = ["photos/bad3.jpg", "photos/img2.PNG", "photos/img10.png"]
    assert find_pictures(["photos"]) == (in_folder, [])
    assert find_pictures(["photos/*.png"]) == (["photos/img10.png"], [])
    assert find_pictures(["photos/**/*.png"])[0] == ["photos/below/img0.png", "photos/img10.png"]
    as_named = ["-", "https://a.b/c", "photos/notes.txt"]
    assert find_pictures(as_named[::-1]) == (as_named, [])
    assert find_pictures(["photos/img10.png"] * 2)[0] == ["photos/img10.png"] * 2
    found, missing = find_pictures(["nope.jpg", "no*.jpg", ".", "a\0b"])
    assert found == [] and [line.split(": ")[1] for line in missing] == [
        "no such picture", "no such picture", "no pictures in this folder", "no such picture"]


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(folder):
    (folder / "photos").rename(folder / "[2024]")
    assert len(find_pictures(["[2024]"])[0]) == 3


def test_pipes_and_devices_are_not_read(folder):
    os.mkfifo(folder / "photos/pipe.png")
    found, missing = find_pictures(["photos/pipe.png", "/dev/zero"])
    assert found == [] and ["pipe or a device" in line for line in missing] == [True, True]
    assert len(find_pictures(["photos"])[0]) == 3
    with pytest.raises(UserError, match="pipe.png.* is a folder, a pipe or a device"):
        load_source("photos/pipe.png")


def test_a_search_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr(picture_sources, "DEADLINE", 0.1)
    monkeypatch.setattr(picture_sources, "list_pictures", lambda pattern: time.sleep(9))
    with pytest.raises(UserError, match=r"/\*\* takes over 0.1 s to search"):
        find_pictures(["/**"])


@pytest.mark.parametrize("stdin, message", [("/dev/null", "-: it is empty"), ("/dev/zero", "more than")])
def test_stdin_may_be_empty_or_endless(stdin, message, monkeypatch):
    with open(stdin) as file, monkeypatch.context() as patched:
        patched.setattr("sys.stdin", file)
        with pytest.raises(UserError, match=message):
            load_source("-")


# --------------------------------------------------------------------------------------------------
# URLs


def test_urls_are_read_and_their_errors_name_them(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/photos"
        assert load_source(f"{url}/img10.png").tobytes() == load_source("photos/img10.png").tobytes()
        for name, why in (("nope.png", "404"), ("notes.txt", "not a JPEG")):
            with pytest.raises(UserError) as caught:
                load_source(f"{url}/{name}")
            assert f"picture {url}/{name}: " in str(caught.value) and why in str(caught.value)
        server.shutdown()
    for wrong in (f"{url}/img10.png", "http://[::1", "http://a b/", "https://", "http://1:x/"):
        with pytest.raises(UserError, match="cannot read the picture http"):
            load_source(wrong)


@pytest.mark.parametrize("head, often", [
    (b"", b"H"), (b"HTTP/1.0 200 OK\r\n", b"A: b\r\n"), (b"HTTP/1.0 200 OK\r\n\r\n", b"x")])
def test_a_server_that_drips_is_given_up(server, monkeypatch, head, often):
    """Each byte came in time, the answer never: in the first line, the headers or the picture itself."""
    def drip(connection):
        connection.sendall(head)
        while True:
            connection.sendall(often)
            time.sleep(0.1)

    monkeypatch.setattr(picture_sources, "DEADLINE", 0.5)
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer within"):
        load_source(server(drip))
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("length", [b"", b"Content-Length: many\r\n", b"Content-Length: -3\r\n",
                                    b"Content-Length: 99999999999999999999\r\n"])
def test_what_a_server_says_of_its_length_is_not_believed(server, monkeypatch, length, folder):
    content = (folder / "photos/img10.png").read_bytes()
    url = server(lambda connection: connection.sendall(b"HTTP/1.0 200 OK\r\n" + length + b"\r\n" + content))
    assert load_source(url).size == (30, 20)
    monkeypatch.setattr(picture_sources, "MAX_URL_BYTES", len(content) - 1)
    with pytest.raises(UserError, match="more than"):
        load_source(url)


@pytest.mark.parametrize("answer", [
    b"", b"HTTP/1.0 204 None\r\n\r\n", b"\0" * 99, b"HTTP/1.0 200 OK\r\n" * 999,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.0 302 Away\r\nLocation: file:///etc/passwd\r\n\r\n",
    b"HTTP/1.0 302 Away\r\nLocation: ftp://127.0.0.1:1/x\r\n\r\n"])
def test_answers_that_are_none_are_told_in_one_line(server, answer):
    with pytest.raises(UserError, match="cannot read the picture http") as caught:
        load_source(server(lambda connection: connection.sendall(answer)))
    assert "\n" not in str(caught.value)
