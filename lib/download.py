"""Files from the web: resumed where they were cut off, verified, and under their name only when complete."""

import concurrent.futures
import hashlib
import http.client
import math
import os
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from lib import cli
from lib.cli import UserError

HUB = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
CHUNK = 1 << 20
ATTEMPTS = 4                       # in a row that received less than SLOWEST
PAUSE = 0.5                        # seconds before the second attempt are twice this, then four times ...
TIMEOUT = 30.0                     # of a single read
STALL = 60.0                       # seconds until the answer begins, and for each SLOWEST bytes of it
SLOWEST = 1 << 16
PATIENCE = 600                     # seconds that a server may ask us to wait


def download_file(url: str, path: str | Path, sha256: str | None = None, md5: str | None = None) -> Path:
    """Download `url` to `path` unless it is there; return `path`. The first digits of `sha256` are enough.

    A broken download stays in `path`.partial, and the next call resumes it. Raises UserError if there is no
    such file, no network or no space, if the server stalls, or if the content does not match the hash.
    """
    path = Path(path)
    if path.exists():
        if wrong := hash_mismatch(path, sha256, md5):
            raise UserError(f"{path} is not the file at {url} ({wrong}): move it away to download it again")
        return path
    partial, tag = Path(f"{path}.partial"), Path(f"{path}.partial.tag")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab", buffering=0) as file:
            cli.lock(file, f"another process is downloading {path}: wait for it")
            problem = receive(url, file, path.name)
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror}") from None
    if problem and partial.stat().st_size:
        raise UserError(f"cannot download {url}: {problem}; run it again to resume")
    linked = re.fullmatch('linked "([0-9a-f]{64})"', read_tag(tag))
    problem = problem or hash_mismatch(partial, sha256 or linked and linked[1], md5)
    tag.unlink(missing_ok=True)
    if problem:
        partial.unlink()
        raise UserError(f"cannot download {url}: {problem}")
    os.replace(partial, path)
    return path


def read_tag(file: Path) -> str:
    """The version of a file of which its partial download is, as the server named it, or nothing."""
    return file.read_text() if file.exists() else ""


def receive(url, file, label) -> str | None:
    """Append what is missing of `url` to `file`, trying again after failures; returns what stays wrong."""
    failures = 0
    while True:
        before = file.tell()
        try:
            if receive_once(url, file, label):
                return None
            problem, hopeless = "the connection was cut", False
        except UserError as error:
            problem, hopeless = error, True
        except urllib.error.HTTPError as error:
            problem, wait = explain(error, url), seconds_to_wait(error)
            hopeless = error.code < 500 and error.code != 429 or wait > PATIENCE
            problem += f", to be tried again in {cli.clock(wait)}" if wait > PATIENCE else ""
            for _ in cli.progress(range(0 if hopeless else wait), f"{label}: {problem}, waiting: second"):
                time.sleep(1)
        except (OSError, http.client.HTTPException) as error:        # timeouts and resets are OSErrors
            problem = getattr(error, "reason", error)
            hopeless = isinstance(problem, (socket.gaierror, ConnectionRefusedError))
        failures = 1 if file.tell() - before >= SLOWEST else failures + 1
        problem = " ".join(str(problem).split())[:300]
        if hopeless or failures == ATTEMPTS:
            return problem
        if failures == 1:
            print(cli.printable(f"{label}: {problem}, trying again"), file=sys.stderr)
        time.sleep(PAUSE * 2**failures)


def receive_once(url, file, label) -> bool:
    """Request what is missing of `url`; True when `file` is complete. Without Range it starts over."""
    held = file.tell()
    headers = {"User-Agent": "vision-gpt", **({"Range": f"bytes={held}-"} if held else {})}
    try:
        request = authorize(urllib.request.Request(url, headers=headers))
        opener = urllib.request.build_opener(Redirects)
        response = with_deadline(STALL, opener.open, request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        whole = error.headers.get("Content-Range") == f"bytes */{held}"
        if not whole:                                                # what is held is no part of it
            file.truncate(file.seek(0))
        return whole
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(str(error)) from None
    with response:
        if response.headers.get_content_type() == "text/html":
            raise UserError("it is a web page, not a file to download")
        linked = getattr(request, "linked", None)
        tag, tag_file = response.headers.get("ETag", ""), Path(f"{file.name}.tag")
        tag = f"linked {linked}" if linked else tag
        if held and tag != (read_tag(tag_file) or tag):
            file.truncate(file.seek(0))                              # two versions would not fit together
            raise ConnectionError("the file has changed since its download began")
        if held and not response.headers.get("Content-Range", "").startswith(f"bytes {held}-"):
            held = 0
            file.truncate(file.seek(0))
        if not held:
            tag_file.write_text(tag)
        length, chunks = response.length, read_chunks(response)      # None: unknown, or no number
        if length:
            chunks = cli.progress(chunks, label, math.ceil(length / CHUNK), " MB")
        for chunk in chunks:
            try:
                while chunk:                                         # a full disk takes a part, then none
                    chunk = chunk[file.write(chunk) :]
            except OSError as error:
                raise UserError(f"cannot write {file.name}: {error.strerror}") from None
        return length is None or file.tell() == held + length


class Redirects(urllib.request.HTTPRedirectHandler):
    """Notes the hash that the hub names before it sends one to another host, which never sees the token."""

    def redirect_request(self, request, *answer):
        new = super().redirect_request(request, *answer)
        if new is not None:
            new.first = getattr(request, "first", request)
            new.first.linked = answer[3].get("X-Linked-Etag") or getattr(new.first, "linked", None)
            authorize(new)
        return new


def authorize(request: urllib.request.Request) -> urllib.request.Request:
    """Add the hub's token, if there is one, to a request to the hub, in a way that no redirect passes on."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    token = os.environ.get("HF_TOKEN") or (file.read_text() if file.is_file() else "")
    if token.strip() and request.full_url.startswith(f"{HUB}/"):
        request.add_unredirected_header("Authorization", f"Bearer {token.strip()}")
    return request


def explain(error: urllib.error.HTTPError, url: str) -> str:
    hints = {401: "the name is wrong, or it is private: set HF_TOKEN to a token that may read it",
             403: "ask for access on its page, and set HF_TOKEN to a token that may read it",
             404: "it has no such repository or file"} if url.startswith(f"{HUB}/") else {}
    return f"HTTP {error.code} {error.reason}" + (f" ({hints[error.code]})" if error.code in hints else "")


def seconds_to_wait(error: urllib.error.HTTPError) -> int:
    """How long a server that was asked too often wants us to wait, by RateLimit or Retry-After."""
    limit = re.search(r"\bt=([0-9]{1,6})\b", error.headers.get("RateLimit", ""))
    after = limit or re.fullmatch("([0-9]{1,6})", error.headers.get("Retry-After", ""))
    return int(after[1]) if after else 0


def read_chunks(response):
    """The body in chunks. Raises TimeoutError for a trickle, which no limit on a single read notices."""
    chunk, start = bytearray(), time.monotonic()
    while piece := response.read1(CHUNK - len(chunk)):
        chunk += piece
        late = time.monotonic() - start > STALL
        if late or len(chunk) == CHUNK:
            yield bytes(chunk)
            if late and len(chunk) < SLOWEST:
                raise TimeoutError(f"the server sent {len(chunk)} bytes in {STALL:.0f} seconds")
            chunk, start = bytearray(), time.monotonic()
    yield bytes(chunk)


def with_deadline(seconds: float, function, *args, **kwargs):
    """function(*args, **kwargs) in a thread. Raises TimeoutError if it takes longer, and leaves it behind."""
    future = concurrent.futures.Future()

    def call():
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:                                   # raised again by result()
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    if not concurrent.futures.wait([future], timeout=seconds).done:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return future.result()


def hash_mismatch(path: Path, sha256: str | None = None, md5: str | None = None) -> str | None:
    """What is wrong with the content of `path`, or None."""
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, name).hexdigest()
            if not digest.startswith(expected.lower()):
                return f"its {name} is {digest[:16]}..., not {expected[:16]}"
    return None
