"""Where pictures come from on a command line: files, folders, patterns, URLs, stdin; each with its limits."""

import glob
import http.client
import io
import os
import re
import sys
import time
import urllib.error
import urllib.request

from PIL import Image

from lib.cli import UserError
from lib.download import with_deadline
from lib.images import MAX_IMAGE_BYTES, SUFFIXES, load_image

MAX_URL_BYTES = 32 << 20               # less than of a file, as many are read at once
DEADLINE = 60                          # seconds for a whole download, and for a folder or pattern


def find_pictures(args: list[str]) -> tuple[list[str], list[str]]:
    """Files, folders, patterns, URLs, - -> sources in natural order, and a line for each that is missing."""
    found, missing = [], []
    for arg in args:
        if arg == "-" or is_url(arg) or os.path.isfile(arg):
            found.append(arg)
            continue
        pattern = os.path.join(glob.escape(arg), "*") if os.path.isdir(arg) else arg
        try:
            names = with_deadline(DEADLINE, list_pictures, pattern)
        except TimeoutError:
            raise UserError(f"{arg} takes over {DEADLINE} s to search: name a folder further down") from None
        found += names
        if not names:
            missing.append(f"{arg}: " + ("no pictures in this folder" if pattern != arg else "no such picture"
                                         if not os.path.exists(arg) else "a pipe or a device, not a file"))
    return sorted(found, key=natural_key), missing


def list_pictures(pattern: str) -> list[str]:
    return [name for name in glob.iglob(pattern, recursive=True)
            if os.path.splitext(name)[1].lower() in SUFFIXES and os.path.isfile(name)]


def natural_key(name: str) -> tuple[list[str], str]:
    """Sorts img2 before img10."""
    parts = re.split(r"(\d+)", name)
    return [part.zfill(32) if i % 2 else part.lower() for i, part in enumerate(parts)], name


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def load_source(source: str) -> Image.Image:
    """`load_image` of a path, a URL or - for stdin. Raises UserError if it is too large or cannot be read."""
    stdin = source == "-"
    if not stdin and not is_url(source):
        return load_image(source)
    limit = MAX_IMAGE_BYTES if stdin else MAX_URL_BYTES
    try:
        content = sys.stdin.buffer.read(limit + 1) if stdin else with_deadline(DEADLINE, download, source)
        if not 0 < len(content) <= limit:
            raise ValueError(f"it has more than {limit >> 20} MB" if content else "it is empty")
        return load_image(io.BytesIO(content))
    except UserError as error:
        raise UserError(str(error).replace("picture:", f"picture {source}:", 1)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if type(error) is urllib.error.URLError else error
        reason = getattr(reason, "strerror", None) or reason
        raise UserError(f"cannot read the picture {source}: {reason}") from None


def download(url: str) -> bytes:
    """The bytes at `url`, or the first of them if there are too many. Raises what urlopen raises."""
    end, content = time.monotonic() + DEADLINE + 1, bytearray()     # nobody waits for it any longer
    request = urllib.request.Request(url, headers={"User-Agent": "vision-gpt"})
    with urllib.request.urlopen(request, timeout=20) as response:
        while len(content) <= MAX_URL_BYTES and time.monotonic() < end and (block := response.read1(1 << 16)):
            content += block
    return bytes(content)
