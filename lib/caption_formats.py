"""Captions and pictures as people share them: in folders and zip archives, in seven kinds of caption file."""

import collections
import contextlib
import csv
import fnmatch
import functools
import hashlib
import io
import itertools
import json
import os
import re
import sys
import typing
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lib import records
from lib.cli import UserError, printable
from lib.images import MAX_IMAGE_BYTES, SUFFIXES

OFFICIAL = {                                         # Flickr8k's own files: split, SHA-256 (its beginning)
    "flickr8k.token.txt": (None, "1e1f3a371ba1a1bf"),
    "flickr_8k.trainimages.txt": ("train", "e330ddd5156a4c2d"),
    "flickr_8k.devimages.txt": ("val", "18ba829f47f6df1c"),
    "flickr_8k.testimages.txt": ("test", "c0924146c131458c")}
SPLIT_LISTS = {name: split for name, (split, _) in OFFICIAL.items() if split}
STRAY = "2258277193_586949ec62.jpg.1"                # has captions in Flickr8k, but is not a picture
CAPTION_FILES = ["flickr8k.token.txt", "captions.txt", "dataset_flickr8k.json", "captions*.json", "*.jsonl",
                 "*.csv", "*.parquet"]               # in a folder: the first of these kinds that it holds
IMAGE_FIELDS = ["image", "file_name", "filename", "image_name", "image_path", "file", "path"]
TEXT_FIELDS = ["caption", "captions", "text", "sentence", "sentences", "comment"]
ZIP_ERRORS = (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
MAX_FILES = 500_000                                  # in a folder or zip archive
MAX_CAPTION_BYTES = 512 << 20                        # in a caption file
MAX_LENGTH = 10_000                                  # characters of a caption or name


class File(typing.NamedTuple):
    path: str                     # within its folder or archive
    open: Callable
    size: int


class Caption(typing.NamedTuple):
    image: str
    text: str
    split: str = ""               # in the words of its source
    image_id: int | None = None   # as in COCO
    file: str = ""                # where it was read, if that name may name the split


def list_files(path: str) -> list[File]:
    """The files in a folder or zip archive, or the file itself, without junk. UserError for a wrong path."""
    if os.path.isdir(path):
        entries = list(itertools.islice(Path(path).rglob("*"), MAX_FILES + 1))
        if len(entries) > MAX_FILES:
            raise UserError(f"{path} holds more than {MAX_FILES:,} files; name the subfolder that you mean")
        files = [disk_file(p, p.relative_to(path)) for p in sorted(entries) if p.is_file()]
    elif not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    elif not os.path.isfile(path):
        raise UserError(f"{path} is a pipe or a device, and not a file, folder or zip archive")
    elif path.lower().endswith(".zip"):
        files = zip_members(path)
    else:
        files = [disk_file(path, Path(path).name)]
    files = [f._replace(path=normalize_path(f.path)) for f in files if "__MACOSX/" not in f.path]
    return [f for f in files if not basename(f.path).startswith(".")]


def disk_file(path: str | Path, name: str | Path) -> File:
    return File(str(name), functools.partial(open, path, "rb"), os.path.getsize(path))


class ZipSource(io.FileIO):
    """A zip archive whose table of contents, which zipfile reads at one go, cannot be of any size."""

    def read(self, size=-1):
        if size > MAX_FILES * 100:
            raise ValueError(f"it holds more than {MAX_FILES:,} files")
        return super().read(size)


def zip_members(path: str) -> list[File]:
    def opened(info):
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("its compression is not supported; make the zip archive with another program")
        return archive.open(info)

    try:
        archive = zipfile.ZipFile(ZipSource(path))
    except ZIP_ERRORS as error:
        raise UserError(f"{path} is not a complete zip archive ({error}); copy it again") from None
    return [File(info.filename, functools.partial(opened, info), info.file_size)
            for info in archive.infolist() if info.filename and not info.is_dir()]


def normalize_path(path: str) -> str:
    """One spelling per path: forward slashes, no ./ in front, composed accents (macOS splits them)."""
    parts = unicodedata.normalize("NFC", path.strip().replace("\\", "/")).split("/")
    return "/".join(p for p in parts if p not in ("", "."))


def basename(path: str) -> str:
    return path.rpartition("/")[2]


def read(file: File, largest: int = MAX_IMAGE_BYTES) -> bytes:
    """The content of a file. Raises UserError when it cannot be read or is larger than `largest` bytes."""
    try:
        if file.size <= largest:                                     # the size that it says it has
            with file.open() as opened:
                content = opened.read(largest + 1)
    except ZIP_ERRORS as error:
        raise UserError(f"cannot read {file.path}: {getattr(error, 'strerror', None) or error}") from None
    if file.size > largest or len(content) > largest:
        raise UserError(f"{file.path} is too large: the limit is {largest >> 20} MB")
    return content


def search(path: str, wanted: Callable) -> list[File]:
    """wanted(files in `path`); if a folder has none, those in the zip archives in it."""
    files = list_files(path)
    found = wanted(files)
    if not found and os.path.isdir(path):
        archives = [os.path.join(path, f.path) for f in files if f.path.lower().endswith(".zip")]
        found = wanted([f for archive in archives for f in list_files(archive)])
    return found


def picture_files(path: str) -> list[File]:
    """The pictures in a folder or zip archive."""
    return search(path, lambda files: [f for f in files if os.path.splitext(f.path)[1].lower() in SUFFIXES])


def caption_files(path: str) -> list[File]:
    """The caption files and Flickr8k's split lists in a folder or zip; or a file and the lists beside it."""
    if os.path.isfile(path) and not path.lower().endswith(".zip"):
        folder = os.path.dirname(path) or "."
        beside = [os.path.join(folder, name) for name in os.listdir(folder) if name.lower() in SPLIT_LISTS]
        return [f for p in dict.fromkeys([path] + beside) for f in list_files(p)]

    def wanted(files):
        names = {f: basename(f.path).lower() for f in files}
        kinds = ([f for f in files if fnmatch.fnmatch(names[f], kind)] for kind in CAPTION_FILES)
        return next(filter(None, kinds), []) + [f for f in files if names[f] in SPLIT_LISTS]

    found = search(path, wanted)
    if not found:
        raise UserError(f"no captions in {path}; name the file that holds them with --captions")
    return found


def match_pictures(names: Iterable[str], pictures: list[File]) -> dict[str, list[File]]:
    """{name: the files it may refer to}: one, none, or several if that is unclear."""
    by_name = collections.defaultdict(list)
    for file in pictures:
        by_name[basename(file.path)].append(file)
    return {name: longest_match(name, by_name[basename(name)]) for name in names}


def longest_match(name: str, files: list[File]) -> list[File]:
    """The files whose path agrees with `name` from the end back, or one of them if they are copies.

    cats/1.jpg never means dogs/1.jpg.
    """
    parts, fits = name.split("/"), collections.defaultdict(list)
    for file in files:
        other = file.path.split("/")
        common = min(len(parts), len(other))
        if parts[-common:] == other[-common:]:
            fits[common, other == parts].append(file)
    found = fits[max(fits)] if fits else []
    if 1 < len(found) < 10:
        with contextlib.suppress(UserError):
            if len({hashlib.sha256(read(file)).digest() for file in found}) == 1:
                return found[:1]
    return found


def read_captions(files: list[File]) -> tuple[list[Caption], dict, list[File], list[str]]:
    """The captions, {split: image names} of Flickr8k's lists, pictures in parquet files, broken entries."""
    captions, lists, pictures, broken, seen = [], {}, [], [], set()
    for file in files:
        name = basename(file.path).lower()
        if name.endswith(".parquet"):
            captions += parse_rows(parquet_rows(file, pictures), file.path, broken)
            continue
        content = read(file, MAX_CAPTION_BYTES).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 in seen:                           # the same file twice, as when a zip is also unpacked
            continue
        seen.add(sha256)
        if name in OFFICIAL and not sha256.startswith(OFFICIAL[name][1]):
            print(f"WARNING: {file.path} is an altered copy of the official file, so scores may not be "
                  "comparable with published ones", file=sys.stderr)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise UserError(f"{file.path} line {line} is not UTF-8 text; save the file as UTF-8") from None
        if name in SPLIT_LISTS:
            lists.setdefault(SPLIT_LISTS[name], set()).update(text.split())
            continue
        if name.endswith(".json"):
            rows = json_rows(text, file.path)
        elif name.endswith((".jsonl", ".ndjson")):
            rows = json_lines(text)
        else:
            rows = flickr8k_rows(text) if re.match(r".+#\d+\t", text) else csv_rows(text, file.path)
        captions += parse_rows(rows, file.path, broken)
    return [c for c in captions if c.image != STRAY], lists, pictures, broken


def parse_rows(rows: Iterable[tuple[str, dict]], name: str, broken: list) -> Iterator[Caption]:
    """Captions of (place, row) pairs; a row has one, a list of them, or caption_0, caption_1 ..."""
    for place, row in rows:
        row = {key.lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        image = next((row[key] for key in IMAGE_FIELDS if row.get(key)), None)
        texts = next((row[key] for key in TEXT_FIELDS if row.get(key)), None)
        if texts is None:
            texts = [text for key, text in row.items() if re.fullmatch(r"caption_\d+", key)]
        texts, split = texts if isinstance(texts, list) else [texts], row.get("split") or ""
        if texts and all(isinstance(s, str) and len(s) <= MAX_LENGTH for s in [image, split, *texts]):
            image = normalize_path(image)
            yield from (Caption(image, text, split, row.get("image_id"), name) for text in texts)
        else:
            broken.append(f"{name} {place}")


def flickr8k_rows(text: str) -> Iterator[tuple]:
    """Flickr8k.token.txt: `picture.jpg#0<tab>a caption`."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            match = re.fullmatch(r"(?P<image>.+)#\d+\t(?P<caption>.*)", line)
            yield f"line {number}", match and match.groupdict()


def json_rows(text: str, name: str) -> Iterator[tuple]:
    """COCO's JSON, Karpathy's, or a list of rows."""
    rows = records.parse_json(object, text, name)                # of any shape: wrong entries are skipped
    try:
        if isinstance(rows, dict) and "annotations" in rows:
            images = {image["id"]: image["file_name"] for image in rows["images"]}
            rows = [{**note, "image": images.get(note["image_id"])} for note in rows["annotations"]]
        elif not isinstance(rows, list):
            rows = [{"image": f"{image.get('filepath', '')}/{image['filename']}", "split": image.get("split"),
                     "caption": [sentence["raw"] for sentence in image["sentences"]],
                     "image_id": image.get("cocoid")} for image in rows["images"]]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{name} is neither COCO's JSON, nor Karpathy's, nor a list of rows with image and "
                        "caption") from None
    return ((f"entry {number}", row) for number, row in enumerate(rows, 1))


def json_lines(text: str) -> Iterator[tuple]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError):
                yield f"line {number}", None


def csv_rows(text: str, name: str) -> Iterator[tuple]:
    """CSV with a header, separated by commas, semicolons, bars or tabs; None for a row of another length."""
    header = text.partition("\n")[0]
    delimiter = max(",\t;|", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [column.strip().lower() for column in next(reader, [])]
        if not set(columns) & set(IMAGE_FIELDS) or not set(columns) & set(TEXT_FIELDS):
            raise UserError(f"{name} begins with {header[:60]!r}; its first line should name the columns "
                            "image and caption")
        for row in reader:
            if row:
                yield f"line {reader.line_num}", dict(zip(columns, row)) if len(row) == len(columns) else None
    except csv.Error as error:
        reason = printable(str(error))
        raise UserError(f"{name} line {reader.line_num} is not CSV ({reason}): put captions with commas or "
                        "quotes in quotes, and double the quotes inside them") from None


def parquet_rows(file: File, pictures: list) -> list[tuple]:
    """Hugging Face's parquet: pictures in the column `image` as {bytes, path}, read when they are needed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file.path} can only be read with pyarrow: pip install pyarrow") from None
    rows = []
    try:
        table = pyarrow.parquet.ParquetFile(file.open())
        columns = {field.name: field.type for field in table.schema_arrow}
        if not pyarrow.types.is_struct(columns.pop("image", pyarrow.null())):
            raise UserError(f"{file.path} has no column `image` with bytes and path")
        for group in range(table.num_row_groups):
            for index, row in enumerate(table.read_row_group(group, list(columns)).to_pylist()):
                image = f"{basename(file.path)}/{row.get('filename') or f'{len(rows):06}.jpg'}"
                opened = functools.partial(parquet_picture, table, group, index)
                pictures.append(File(image, opened, size=0))
                rows.append((f"row {len(rows)}", {**row, "image": image}))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        raise UserError(f"{file.path} is not a complete parquet file; download or copy it again") from None
    return rows


def parquet_picture(table, group, index):
    cells = parquet_pictures(table, group)[index : index + 1]               # a damaged file may have fewer
    return io.BytesIO(cells[0]["bytes"] if cells and cells[0] and cells[0].get("bytes") else b"")


@functools.lru_cache(maxsize=1)                      # pictures are read in order, one group at a time
def parquet_pictures(table, group):
    return table.read_row_group(group, ["image"])["image"].to_pylist()
