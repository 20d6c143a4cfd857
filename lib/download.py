"""Files from the web: resumed where they were cut, checked, and under their name only when whole."""

import hashlib
import http.client
import math
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from lib import cli
from lib.cli import UserError

CHUNK = 1 << 20
ATTEMPTS = 4                       # in a row without a byte received
PAUSE = 1.0                        # seconds before the second attempt, doubled for each further one
TIMEOUT = 30.0


def fetch(url, path, sha256=None, md5=None):
    """Download `url` to `path` unless it is there; return `path`. The first digits of `sha256` are enough.

    What a broken download received stays in `path`.partial, and the next call goes on from there. Raises
    UserError for no such file, no network, no space, or a content that is not what the hash says.
    """
    path = Path(path)
    if path.exists():
        if wrong := mismatch(path, sha256, md5):
            raise UserError(f"{path} is not the file at {url} ({wrong}): move it away to download it again")
        return path
    partial = Path(f"{path}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(partial, "ab", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror}") from None
    with file:
        failures = 0
        while True:
            before = file.tell()
            try:
                if receive(url, file, path.name):
                    break
                problem, hopeless = "the connection was cut", False
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                hopeless = error.code < 500 and error.code != 429
            except (OSError, http.client.HTTPException) as error:    # timeouts and resets are OSErrors
                problem = getattr(error, "reason", error)
                hopeless = isinstance(problem, (socket.gaierror, ConnectionRefusedError))
            failures = 0 if file.tell() > before else failures + 1
            if hopeless or failures == ATTEMPTS:
                kept = "; what was received is kept, the next call goes on there" if file.tell() else ""
                if not kept:
                    partial.unlink()
                raise UserError(f"{url} cannot be downloaded: {problem}{kept}")
            print(f"{path.name}: {problem}, trying again", file=sys.stderr)
            time.sleep(PAUSE * 2**failures)
    if wrong := mismatch(partial, sha256, md5):
        partial.unlink()
        raise UserError(f"{url} gave another file than the one expected ({wrong}); it was removed, try again")
    os.replace(partial, path)
    return path


def receive(url, file, label):
    """Append what is missing of `url` to `file`; True when it is whole. Without Range starts anew."""
    held = file.tell()
    headers = {"User-Agent": "vision-gpt", **({"Range": f"bytes={held}-"} if held else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{held}":  # nothing beyond what is held
            return True
        restart(file)                                                # it is no beginning of this file
        return False
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(f"{url} cannot be downloaded: {error}") from None
    with response:
        if response.headers.get_content_type() == "text/html":
            raise UserError(f"{url} is a web page, not a file to download")
        if held and not response.headers.get("Content-Range", "").startswith(f"bytes {held}-"):
            restart(file)
            held = 0
        length = response.headers.get("Content-Length")
        blocks = iter(lambda: response.read(CHUNK), b"")
        if length:
            blocks = cli.progress(blocks, label, math.ceil(int(length) / CHUNK), " MB")
        for block in blocks:
            try:
                while block:                                         # a full disk takes a part, then none
                    block = block[file.write(block) :]
            except OSError as error:
                raise UserError(f"cannot write {file.name}: {error.strerror}; its start is kept") from None
        return length is None or file.tell() == held + int(length)


def restart(file):
    file.truncate(0)
    file.seek(0)


def mismatch(path, sha256=None, md5=None):
    """What is wrong with the content of `path`, or None."""
    for name, wanted in (("sha256", sha256), ("md5", md5)):
        if wanted:
            digest = hashlib.new(name)
            with open(path, "rb") as file:
                while block := file.read(CHUNK):
                    digest.update(block)
            if not digest.hexdigest().startswith(wanted.lower()):
                return f"its {name} is {digest.hexdigest()[:16]}..., not {wanted[:16]}"
    return None
