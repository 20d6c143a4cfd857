"""Where pictures come from on a command line: files, folders, URLs, stdin, .tar shards; with their limits."""

import glob
import http.client
import io
import os
import re
import sys
import tarfile
import time
import typing
import urllib.error
import urllib.request

from PIL import Image

from lib.cli import UserError
from lib.download import with_deadline
from lib.images import MAX_IMAGE_BYTES, SUFFIXES, load_image

MAX_URL_BYTES = 32 << 20               # less than of a file, as many are read at once
MAX_MEMBERS = 1_000_000                # of a .tar shard
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
    suffixes = {".tar"} if pattern.lower().endswith(".tar") else SUFFIXES
    return [name for name in glob.iglob(pattern, recursive=True)
            if os.path.splitext(name)[1].lower() in suffixes and os.path.isfile(name)]


def natural_key(name: str) -> tuple[list[str], str]:
    """Sorts img2 before img10."""
    parts = re.split(r"(\d+)", name)
    return [part.zfill(32) if i % 2 else part.lower() for i, part in enumerate(parts)], name


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


class Member(typing.NamedTuple):
    """A picture in a .tar shard."""
    shard: str
    name: str
    offset: int
    size: int


class TarSource(io.FileIO):
    """A tar file whose headers, which tarfile reads at one go, cannot be of any size."""

    def read(self, size=-1):
        if not 0 <= size <= 1 << 20:
            raise ValueError("a header of over 1 MB")
        return super().read(size)


def shard_members(shard: str) -> list[Member]:
    """The pictures in an uncompressed tar file, in its order. Raises UserError if it is damaged."""
    members = []
    try:
        with tarfile.open(fileobj=TarSource(shard), mode="r:") as archive:
            while member := archive.next():
                is_picture = os.path.splitext(member.name)[1].lower() in SUFFIXES
                if is_picture and member.isreg() and not member.issparse():
                    members.append(Member(shard, member.name, member.offset_data, member.size))
                if len(archive.members) > MAX_MEMBERS:
                    raise ValueError(f"more than {MAX_MEMBERS:,} files")
    except (OSError, ValueError, RecursionError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shard} is not a whole tar file without compression: {reason}") from None
    return members


def load_source(source: str | Member) -> Image.Image:
    """`load_image` of a path, a URL, - for stdin or a Member. Raises UserError if it cannot be read."""
    member = source if isinstance(source, Member) else None
    if not (member or source == "-" or is_url(source)):
        return load_image(source)
    name, limit = (member.name, MAX_IMAGE_BYTES) if member else (source, MAX_URL_BYTES)
    try:
        if member:
            with open(member.shard, "rb") as file:
                file.seek(member.offset)
                content = file.read(min(member.size, limit + 1))
        elif source == "-":
            limit = MAX_IMAGE_BYTES
            content = sys.stdin.buffer.read(limit + 1)
        else:
            content = with_deadline(DEADLINE, download, source)
        if not 0 < len(content) <= limit:
            raise ValueError(f"it has more than {limit >> 20} MB" if content else "it is empty")
        return load_image(io.BytesIO(content))
    except UserError as error:
        raise UserError(str(error).replace("picture:", f"picture {name}:", 1)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if type(error) is urllib.error.URLError else error
        reason = getattr(reason, "strerror", None) or reason
        raise UserError(f"cannot read the picture {name}: {reason}") from None


def download(url: str) -> bytes:
    """The bytes at `url`, or the first of them if there are too many. Raises what urlopen raises."""
    end, content = time.monotonic() + DEADLINE + 1, bytearray()     # nobody waits for it any longer
    request = urllib.request.Request(url, headers={"User-Agent": "vision-gpt"})
    with urllib.request.urlopen(request, timeout=20) as response:
        while len(content) <= MAX_URL_BYTES and time.monotonic() < end and (block := response.read1(1 << 16)):
            content += block
    return bytes(content)
