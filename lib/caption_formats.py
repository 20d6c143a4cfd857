"""Pictures and captions as they are handed round: in folders and zips, and in six kinds of caption files."""

import collections
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
from pathlib import Path

from lib.cli import UserError

OFFICIAL = {                                         # lines, sha256
    "flickr8k.token.txt": (40460, "1e1f3a371ba1a1bf742e6930521c037e046b2bf3fcc2390ba8405e0301ed7689"),
    "flickr_8k.trainimages.txt": (6000, "e330ddd5156a4c2d2e2b67bc587e70e588f2d132bd8a10dc54dcb71e58115d8e"),
    "flickr_8k.devimages.txt": (1000, "18ba829f47f6df1cb830bf7f0506e2ddf333818925299babbd1bbcaf50fdc504"),
    "flickr_8k.testimages.txt": (1000, "c0924146c131458ceba45da59670fe9520eadce1e5cafffa16a817672a9b1f17")}
LISTS = {"flickr_8k.trainimages.txt": "train", "flickr_8k.devimages.txt": "val",
         "flickr_8k.testimages.txt": "test"}
STRAY = "2258277193_586949ec62.jpg.1"                # has official captions, but is no picture
CAPTION_FILES = ["flickr8k.token.txt", "captions.txt", "dataset_flickr8k.json", "captions*.json", "*.jsonl",
                 "*.csv", "*.parquet"]               # of a folder's files, the first kind that is there
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
IMAGE_FIELDS = ["image", "file_name", "filename", "image_name", "image_path", "file", "path"]
TEXT_FIELDS = ["caption", "captions", "text", "sentence", "sentences", "comment"]


class File(typing.NamedTuple):
    path: str                     # within its folder or archive
    open: typing.Callable
    stamp: tuple                  # another one means other content


class Caption(typing.NamedTuple):
    image: str
    text: str
    split: str | None = None      # in the source's own words
    image_id: int | None = None   # COCO's
    file: str = ""                # where it was read, if that name may tell the split


# --------------------------------------------------------------------------------------------------
# files


def list_files(path):
    """The files in a folder or zip archive, or a file itself; no junk. Raises UserError for a wrong path."""
    if os.path.isdir(path):
        files = [File(p.relative_to(path).as_posix(), functools.partial(open, p, "rb"), stamp_of(p))
                 for p in sorted(Path(path).rglob("*")) if p.is_file()]
    elif not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    elif path.lower().endswith(".zip"):
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise UserError(f"{path} is not a whole zip archive; download or copy it again") from None
        files = [File(i.filename, functools.partial(archive.open, i), (i.file_size, i.CRC))
                 for i in archive.infolist() if not i.is_dir()]
    else:
        files = [File(Path(path).name, functools.partial(open, path, "rb"), stamp_of(path))]
    files = [f._replace(path=normal(f.path)) for f in files if "__MACOSX/" not in f.path]
    return [f for f in files if not basename(f.path).startswith(".")]


def stamp_of(path):
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def normal(path):
    """One spelling for one path: forward slashes, no ./ in front, composed accents (macOS splits them)."""
    parts = unicodedata.normalize("NFC", path.strip().replace("\\", "/")).split("/")
    return "/".join(p for p in parts if p not in ("", "."))


def basename(path):
    return path.rpartition("/")[2]


def read(file):
    """The content of a file. Raises UserError when it cannot be read."""
    try:
        with file.open() as opened:
            return opened.read()
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {file.path}: {error}") from None


def search(path, wanted):
    """wanted(files in `path`); where a folder has none, those in the zip archives that lie in it."""
    files = list_files(path)
    found = wanted(files)
    if not found and os.path.isdir(path):
        archives = [os.path.join(path, f.path) for f in files if f.path.lower().endswith(".zip")]
        found = wanted([f for archive in archives for f in list_files(archive)])
    return found


def picture_files(path):
    """The pictures in a folder or zip archive."""
    return search(path, lambda files: [f for f in files if os.path.splitext(f.path)[1].lower() in PICTURES])


def caption_files(path):
    """The caption files and Flickr8k's split lists in a folder or zip, or a file with the lists beside it."""
    if os.path.isfile(path) and not path.lower().endswith(".zip"):
        folder = os.path.dirname(path) or "."
        beside = [os.path.join(folder, name) for name in os.listdir(folder) if name.lower() in LISTS]
        return [f for p in dict.fromkeys([path] + beside) for f in list_files(p)]
    found = search(path, _caption_files)
    if not found:
        raise UserError(f"no captions in {path}; name the file that holds them with --captions")
    return found


def _caption_files(files):
    kinds = ([f for f in files if fnmatch.fnmatch(basename(f.path).lower(), kind)] for kind in CAPTION_FILES)
    return next(filter(None, kinds), []) + [f for f in files if basename(f.path).lower() in LISTS]


def candidates(names, pictures):
    """{name: the files it can mean}: one, none, or several where that is not clear."""
    by_path, by_name = collections.defaultdict(list), collections.defaultdict(list)
    for file in pictures:
        by_path[file.path].append(file)
        by_name[basename(file.path)].append(file)
    found = {name: by_path.get(name) or same_end(name, by_name[basename(name)]) for name in names}
    copies = {name for name, files in found.items() if len(files) > 1 and len(set(map(read, files))) == 1}
    return {name: files[:1] if name in copies else files for name, files in found.items()}


def same_end(image, files):
    """The files whose path ends as `image` does, as far as both go: cats/1.jpg never means dogs/1.jpg."""
    parts, fits = image.split("/"), collections.defaultdict(list)
    for file in files:
        other = file.path.split("/")
        common = min(len(parts), len(other))
        if parts[-common:] == other[-common:]:
            fits[common].append(file)
    return fits[max(fits)] if fits else []


# --------------------------------------------------------------------------------------------------
# captions


def read_captions(files):
    """Files -> captions, {split: names} of Flickr8k's lists, pictures inside parquet, broken entries."""
    captions, lists, pictures, broken, seen = [], {}, [], [], set()
    for file in files:
        name = basename(file.path).lower()
        if name.endswith(".parquet"):
            captions += from_parquet(file, pictures, broken)
            continue
        content = read(file).replace(b"\r\n", b"\n")
        digest = hashlib.sha256(content).hexdigest()
        if digest in seen:                           # one file in two places, as when it is also unpacked
            continue
        seen.add(digest)
        if name in OFFICIAL:
            warn_of_altered(file, content.count(b"\n"), digest)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise UserError(f"{file.path} line {line} is not UTF-8 text; save the file as UTF-8") from None
        if name in LISTS:
            lists.setdefault(LISTS[name], set()).update(text.split())
        elif name.endswith(".json"):
            captions += from_json(text, file.path, broken)
        elif name.endswith((".jsonl", ".ndjson")):
            captions += from_rows(json_lines(text), file.path, broken)
        elif re.match(r".+#\d+\t", text):
            captions += from_tokens(text, file.path, broken)
        else:
            captions += from_rows(csv_rows(text, file.path), file.path, broken)
    broken += [f"{c.file}: {c.image}" for c in captions if not isinstance(c.text, str)]
    captions = [c for c in captions if isinstance(c.text, str) and c.image != STRAY]
    return [c._replace(image=normal(c.image)) for c in captions], lists, pictures, broken


def warn_of_altered(file, lines, digest):
    official_lines, official = OFFICIAL[basename(file.path).lower()]
    if digest != official:
        print(f"WARNING: {file.path} is an altered copy of the official file: {lines:,} lines where that has "
              f"{official_lines:,}, SHA-256 {digest[:12]}... and not {official[:12]}...; it is used, "
              "but scores may not compare with published ones", file=sys.stderr)


def from_tokens(text, name, broken):
    """Flickr8k.token.txt: `picture.jpg#0<tab>a caption`."""
    for number, line in enumerate(text.split("\n"), 1):
        if match := re.fullmatch(r"(.+)#\d+\t(.*)", line):
            yield Caption(match[1], match[2])
        elif line.strip():
            broken.append(f"{name} line {number}")


def from_json(text, name, broken):
    """COCO's layout, Karpathy's, or a list of rows."""
    try:
        content = json.loads(text)
        if isinstance(content, list):
            yield from from_rows(enumerate(content, 1), name, broken)
        elif "annotations" in content:
            images = {image["id"]: str(image["file_name"]) for image in content["images"]}
            for note in content["annotations"]:
                if note["image_id"] in images:
                    yield Caption(images[note["image_id"]], note["caption"], None, note["image_id"], name)
                else:
                    broken.append(f"{name} image_id {note['image_id']}")
        else:
            for image in content["images"]:
                path = f"{image.get('filepath', '')}/{image['filename']}"
                split = str(image.get("split") or "")
                for sentence in image["sentences"]:
                    yield Caption(path, sentence["raw"], split, image.get("cocoid"), name)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name} is neither COCO's JSON, nor Karpathy's, nor a list of rows with image and "
                        f"caption ({type(error).__name__}: {error})") from None


def json_lines(text):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError:
                yield number, None


def csv_rows(text, name):
    """(line number, dict), None for a row of another length than the header. Columns end at , tab ; or |"""
    header = text.partition("\n")[0]
    delimiter = max(",\t;|", key=header.count)
    columns = [column.strip().lower() for column in next(csv.reader([header], delimiter=delimiter), [])]
    if not set(columns) & set(IMAGE_FIELDS) or not set(columns) & set(TEXT_FIELDS):
        raise UserError(f"{name} begins with {header[:60]!r}, and not with the columns image and caption")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in itertools.islice(reader, 1, None):
            if row:
                yield reader.line_num, dict(zip(columns, row)) if len(row) == len(columns) else None
    except csv.Error as error:
        raise UserError(f"{name} line {reader.line_num} is not CSV ({error}): captions with commas or quotes "
                        "belong in quotes, and the quotes inside are doubled") from None


def from_rows(rows, name, broken):
    """(line number, dict) pairs -> captions; a row has one, or a list of them, or caption_0, caption_1 ..."""
    for number, row in rows:
        row = {key.lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        image = next((row[key] for key in IMAGE_FIELDS if row.get(key)), None)
        texts = next((row[key] for key in TEXT_FIELDS if row.get(key)), None)
        if texts is None:
            texts = [text for key, text in row.items() if re.fullmatch(r"caption_\d+", key)]
        texts = texts if isinstance(texts, list) else [texts]
        if not image or not texts or not all(isinstance(text, str) for text in texts):
            broken.append(f"{name} line {number}")
        else:
            split = row.get("split")
            yield from (Caption(str(image), text, split and str(split), None, name) for text in texts)


def from_parquet(file, pictures, broken):
    """Hugging Face parquet: pictures in the column `image` as {bytes, path}, read when they are wanted."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file.path} can only be read with pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(file.open())
        columns = {field.name: field.type for field in table.schema_arrow}
        if not pyarrow.types.is_struct(columns.pop("image", pyarrow.null())):
            raise UserError(f"{file.path} has no column image of bytes and path")
        rows = []
        for group in range(table.num_row_groups):
            for index, row in enumerate(table.read_row_group(group, list(columns)).to_pylist()):
                image = f"{basename(file.path)}/{row.get('filename') or f'{len(rows):06}.jpg'}"
                opened = functools.partial(parquet_picture, table, group, index)
                pictures.append(File(image, opened, (len(rows), *file.stamp)))
                rows.append((len(rows), {**row, "image": image}))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file.path} is not a whole parquet file: {error}") from None
    return from_rows(rows, file.path, broken)


def parquet_picture(table, group, index):
    return io.BytesIO(parquet_group(table, group)[index]["bytes"])


@functools.lru_cache(maxsize=1)                      # pictures are wanted in order: one group at a time
def parquet_group(table, group):
    return table.read_row_group(group, ["image"])["image"].to_pylist()
