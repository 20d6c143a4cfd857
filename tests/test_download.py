"""Downloads from a server on this machine that can be told to misbehave."""

import contextlib
import hashlib
import http.server
import os
import threading
import time

import pytest

from lib import cli, download
from lib.cli import UserError

CONTENT = bytes(range(256)) * 1000


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; `cut` connections end after a fifth of it, `status` is an answer instead of it.

    `drip` sends "headers" or "body" a byte at a time; `length` is a false Content-Length.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut, self.status, self.ranges, self.requests = 0, None, True, []
        self.drip = self.length = None
        self.kind = "application/octet-stream"
        self.url = f"http://127.0.0.1:{self.server_port}/file"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append(asked)
        if server.status:
            return self.send_error(server.status)
        if self.path in ("/relative", "/loop"):
            self.send_response(302)
            self.send_header("Location", "file" if self.path == "/relative" else self.path)
            return self.end_headers()
        if server.drip == "headers":
            return self.trickle(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500)
        first = int(asked[len("bytes=") : -1]) if asked and server.ranges else 0
        if first >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            return self.end_headers()
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", server.length or str(len(CONTENT) - first))
        self.end_headers()
        body = CONTENT[first:]
        if server.cut:
            server.cut -= 1
            body = body[: len(CONTENT) // 5]
        self.trickle(body) if server.drip else self.wfile.write(body)

    def trickle(self, content):
        with contextlib.suppress(OSError):
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(0.01)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "CHUNK", 1000)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_download_resumes_cut_connections(server, tmp_path, ranges):
    server.cut, server.ranges = 3, ranges
    path = download.download_file(server.url, tmp_path / "new" / "file", hashlib.sha256(CONTENT).hexdigest(),
                          hashlib.md5(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["file"]
    assert len(server.requests) == 4 and server.requests[-1] is not None


def test_download_goes_on_where_an_earlier_run_stopped(server, tmp_path):
    (tmp_path / "file.partial").write_bytes(CONTENT[:7777])
    assert download.download_file(server.url, tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == ["bytes=7777-"]


@pytest.mark.parametrize("held", [CONTENT, CONTENT + b"more"])
def test_download_ends_with_a_partial_file_that_has_it_all(server, tmp_path, held):
    (tmp_path / "file.partial").write_bytes(held)
    assert download.download_file(server.url, tmp_path / "file").read_bytes() == CONTENT


def test_download_keeps_the_part_when_it_gives_up(server, tmp_path):
    server.cut, server.status = 1, None
    (tmp_path / "file.partial").write_bytes(CONTENT[:7777])
    server.status = 503
    with pytest.raises(UserError, match="503.*to resume"):
        download.download_file(server.url, tmp_path / "file")
    assert len(server.requests) == download.ATTEMPTS
    assert (tmp_path / "file.partial").read_bytes() == CONTENT[:7777] and not (tmp_path / "file").exists()


def test_download_of_a_wrong_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match="sha256 .* not 01234567"):
        download.download_file(server.url, tmp_path / "file", sha256="01234567")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="md5"):
        download.download_file(server.url, tmp_path / "file", md5="0" * 32)


def test_download_takes_a_hash_prefix_and_what_is_there(server, tmp_path):
    prefix = hashlib.sha256(CONTENT).hexdigest()[:8]
    download.download_file(server.url, tmp_path / "file", sha256=prefix)
    download.download_file(server.url, tmp_path / "file", sha256=prefix)
    assert len(server.requests) == 1
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="move it away"):
        download.download_file(server.url, tmp_path / "file", sha256=prefix)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_download_of_what_does_not_exist_says_so_at_once(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match="404"):
        download.download_file(server.url, tmp_path / "file")
    assert len(server.requests) == 1 and list(tmp_path.iterdir()) == []


def test_download_refuses_a_web_page(server, tmp_path):
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="web page"):
        download.download_file(server.url, tmp_path / "file")


def test_download_without_network_or_folder_says_so(tmp_path):
    server = Server()
    server.server_close()                                    # a port on which nobody listens
    with pytest.raises(UserError, match="cannot download"):
        download.download_file(server.url, tmp_path / "file")
    with pytest.raises(UserError, match="cannot download"):
        download.download_file("no url", tmp_path / "file")
    (tmp_path / "block").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        download.download_file(server.url, tmp_path / "block" / "file")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' ever full device")
def test_download_to_a_full_disk_says_so(server, tmp_path):
    (tmp_path / "file.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*No space left"):
        download.download_file(server.url, tmp_path / "file")


@pytest.mark.parametrize("drip", ["headers", "body"])
def test_download_from_a_server_that_trickles_ends(server, tmp_path, monkeypatch, drip):
    """Each read ended in time, so that a byte a second held the program for ever."""
    monkeypatch.setattr(download, "STALL", 0.1)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    server.drip = drip
    with pytest.raises(UserError, match="no answer within|the server sent [0-9]+ bytes in"):
        download.download_file(server.url, tmp_path / "file")
    assert not (tmp_path / "file").exists() and len(server.requests) == 2


@pytest.mark.parametrize("length", ["many", "-5"])
def test_download_with_a_content_length_that_is_none_is_complete(server, tmp_path, length):
    server.length = length
    assert download.download_file(server.url, tmp_path / "file").read_bytes() == CONTENT


def test_download_follows_redirects_to_their_end(server, tmp_path, capsys):
    root = server.url.removesuffix("/file")
    assert download.download_file(f"{root}/relative", tmp_path / "file").read_bytes() == CONTENT
    with pytest.raises(UserError, match="HTTP 302 .*infinite loop") as caught:
        download.download_file(f"{root}/loop", tmp_path / "other")
    assert "\n" not in str(caught.value) and capsys.readouterr().err == ""


def test_download_tells_of_its_failures_once(server, tmp_path, capsys):
    server.status = 500
    with pytest.raises(UserError, match="HTTP 500"):
        download.download_file(server.url, tmp_path / "file")
    assert capsys.readouterr().err.count("trying again") == 1 and len(server.requests) == download.ATTEMPTS


def test_two_downloads_of_one_file_do_not_mix(server, tmp_path):
    with open(tmp_path / "file.partial", "ab") as file:
        cli.lock(file, "")
        with pytest.raises(UserError, match="another process is downloading"):
            download.download_file(server.url, tmp_path / "file")
