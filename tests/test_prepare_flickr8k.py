"""Every layout as a tiny set: pictures of one colour each, so that a mixed-up picture shows."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from lib import caption_formats, prepared_set
from lib.caption_formats import (
    Caption,
    File,
    basename,
    csv_rows,
    match_pictures,
    normalize_path,
    parse_rows,
    read_captions,
)
from lib.cli import UserError
from lib.images import MAX_IMAGE_BYTES
from prepare_flickr8k import PrepareConfig, assign_splits, collect, first_images, prepare
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
NAMES = ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
BYTES = Tokenizer.train([], 257)                                    # a token for each byte


def colour(name):
    return tuple(np.random.default_rng(list(name.encode())).integers(0, 256, 3).tolist())


def draw(folder, names=NAMES):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), colour(name)).save(path, "PNG")      # the content counts, not the name
    return folder


def zipped(folder, path, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
        for name in extra:
            archive.writestr(name, b"junk")
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), newline="")
    return path


def official(folder, names=NAMES):
    """Flickr8k's text files: 1 and 2 train, 3 val, 4 test, further ones in no list."""
    lines = [f"{name}#{k}\tA dog {k} , in {name} .\n" for name in names for k in range(2)]
    write(folder / "Flickr8k.token.txt", "".join(lines))
    for list_name, members in (("train", NAMES[:2]), ("dev", NAMES[2:3]), ("test", NAMES[3:])):
        write(folder / f"Flickr_8k.{list_name}Images.txt", "\n".join(members) + "\n")
    return folder


def gather(images=None, *captions, **fields):
    config = PrepareConfig(images=str(images or ""), captions=[str(c) for c in captions], **fields)
    found, origin, skipped = collect(config)
    return {image.name: image for image in found}, origin, {k: v for k, v in skipped.items() if v}


def splits_of(images):
    return {name: image.split for name, image in images.items()}


OFFICIAL_SPLITS = {"1.jpg": "train", "2.jpg": "train", "3.jpg": "val", "4.jpg": "test"}


def check_colours(images):
    for image in images.values():
        with image.file.open() as file:
            assert Image.open(file).convert("RGB").getpixel((0, 0)) == colour(image.name), image.name


# --------------------------------------------------------------------------------------------------
# layouts


LAYOUTS = ["folders", "renamed and nested", "zips", "folder of zips", "one file", "CRLF"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_files_are_found_however_they_lie(tmp_path, layout, capsys):
    pictures, text = draw(tmp_path / "Flicker8k_Dataset"), official(tmp_path / "text")
    if layout == "renamed and nested":
        nested = tmp_path / "flickr" / "Flickr8k_Dataset" / "Flicker8k_Dataset"
        shutil.copytree(pictures, nested)
        write(nested / "._1.jpg", "junk")
        pictures = tmp_path / "flickr"
    if "zips" in layout:
        (tmp_path / "zips").mkdir()
        junk = ["__MACOSX/Flicker8k_Dataset/._1.jpg", "__MACOSX/1.jpg", "2258277193_586949ec62.jpg.1"]
        pictures = zipped(pictures, tmp_path / "zips" / "Flickr8k_Dataset.zip", junk)
        text = zipped(text, tmp_path / "zips" / "Flickr8k_text.zip", ["__MACOSX/._Flickr8k.token.txt"])
    if layout == "folder of zips":
        pictures = text = tmp_path / "zips"
    if layout == "one file":
        text = text / "Flickr8k.token.txt"                          # its lists lie beside it
    if layout == "CRLF":
        for file in text.iterdir():
            write(file, file.read_text().replace("\n", "\r\n"))
    images, origin, skipped = gather(pictures, text)
    assert splits_of(images) == OFFICIAL_SPLITS and origin == "Flickr8k's lists" and not skipped
    assert images["3.jpg"].texts == ["A dog 0 , in 3.jpg .", "A dog 1 , in 3.jpg ."]
    check_colours(images)
    assert "Flickr8k.token.txt is an altered copy" in capsys.readouterr().err


def test_official_stray_entry_is_ignored_and_unlisted_images_are_kept(tmp_path):
    names = NAMES + ["5.jpg", "2258277193_586949ec62.jpg.1"]
    images, _, skipped = gather(draw(tmp_path / "i", names), official(tmp_path / "t", names))
    assert splits_of(images) == {**OFFICIAL_SPLITS, "5.jpg": None} and not skipped


def test_altered_split_list_warns_with_what_differs(tmp_path, capsys):
    text = official(tmp_path / "t")
    write(text / "Flickr_8k.testImages.txt", "1.jpg\n4.jpg\nunknown.jpg\n")
    images, *_ = gather(draw(tmp_path / "i"), text)
    assert images["1.jpg"].split == "test"                          # never trained on what is tested
    warnings = capsys.readouterr().err
    assert "testImages.txt is an altered copy of the official file" in warnings
    assert "images in two splits, used in only one: 1.jpg" in warnings
    assert "images in a split list but not in the captions: unknown.jpg" in warnings


def test_kaggle_folder_alone_is_enough(tmp_path, capsys):
    draw(tmp_path / "Images")
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(
        [["image", "caption"]] + [[n, f'A dog , in "{n}" .'] for n in NAMES])
    write(tmp_path / "captions.txt", out.getvalue())
    images, origin, skipped = gather(tmp_path)
    assert images["2.jpg"].texts == ['A dog , in "2.jpg" .'] and not skipped
    assert origin == "a hash of the file names" and "80/10/10" in capsys.readouterr().err
    assert gather("", tmp_path / "captions.txt")[0].keys() == images.keys()
    official(tmp_path / "lists")
    lists = [tmp_path / "lists" / f"Flickr_8k.{s}Images.txt" for s in ("train", "dev", "test")]
    assert splits_of(gather(tmp_path, tmp_path / "captions.txt", *lists)[0]) == OFFICIAL_SPLITS


def test_karpathy_json_gives_splits_and_raw_sentences(tmp_path):
    splits = dict(zip(NAMES, ["train", "restval", "val", "test"]))
    content = {"dataset": "flickr8k", "images": [
        {"filename": n, "split": s, "imgid": 7, "sentences": [{"raw": "A dog .", "tokens": ["a", "dog"]}]}
        for n, s in splits.items()]}
    write(tmp_path / "dataset_flickr8k.json", content)
    images, origin, _ = gather(draw(tmp_path / "Images"), tmp_path / "dataset_flickr8k.json")
    assert splits_of(images) == OFFICIAL_SPLITS and images["1.jpg"].texts == ["A dog ."]
    assert origin == "the split column"


def test_coco_json_gives_ids_and_splits_by_file_name(tmp_path):
    folder = draw(tmp_path, ["train2014/1.jpg", "val2014/2.jpg"])
    files = [write(tmp_path / "annotations" / f"captions_{split}2014.json", {
        "images": [{"id": 100 + n, "file_name": f"{n}.jpg"}],
        "annotations": [{"id": 1, "image_id": 100 + n, "caption": "A dog.\n"},
                        {"id": 2, "image_id": 9, "caption": "of no image"},
                        {"id": 3, "image_id": 100 + n, "caption": None}]})
        for n, split in ((1, "train"), (2, "val"))]
    for captions in (files, [tmp_path / "annotations"], []):
        images, origin, skipped = gather(folder, *captions)
        assert splits_of(images) == {"1.jpg": "train", "2.jpg": "val"} and origin == "the file names"
        assert [image.image_id for image in images.values()] == [101, 102]
        assert len(skipped["broken entries of the captions"]) == 4


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_own_files_with_split_column(tmp_path, suffix):
    words = dict(zip(NAMES, ["Train", "training", "dev", "TEST"]))
    rows = [{"image": n, "caption": f"a dog, {n}", "split": w} for n, w in words.items()]
    path = tmp_path / f"mine.{suffix}"
    if suffix == "jsonl":
        write(path, "\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n")
    elif suffix == "json":
        write(path, rows)
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if suffix == "tsv" else ","
            writer = csv.DictWriter(file, ["split", "caption", "image"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    images, *_ = gather(draw(tmp_path / "photos"), path)
    assert splits_of(images) == OFFICIAL_SPLITS and images["4.jpg"].texts == ["a dog, 4.jpg"]


def test_parquet_of_the_hub(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    for split, names in (("train", NAMES[:2]), ("validation", NAMES[2:3]), ("test", NAMES[3:])):
        files = [draw(tmp_path / "i", [n]) / n for n in names]
        columns = {"image": [{"bytes": f.read_bytes(), "path": None} for f in files], "filename": names}
        for k in range(5):
            columns[f"caption_{k}"] = [f"{n} {k}" for n in names]
        file = tmp_path / "data" / f"{split}-00000-of-00001-ab.parquet"
        pq.write_table(pa.table(columns), file, row_group_size=1)
    images, origin, skipped = gather(tmp_path / "data")
    by_name = {basename(name): image._replace(name=basename(name)) for name, image in images.items()}
    assert splits_of(by_name) == OFFICIAL_SPLITS and origin == "the file names" and not skipped
    assert by_name["2.jpg"].texts == [f"2.jpg {k}" for k in range(5)]
    check_colours(by_name)
    for content in (b"", b"PAR1" * 9, file.read_bytes()[:-40], file.read_bytes()[40:]):
        write(tmp_path / "c" / "cut.parquet", "").write_bytes(content)
        with pytest.raises(UserError, match="not a complete parquet file"):
            gather(tmp_path / "c")


# --------------------------------------------------------------------------------------------------
# names and splits


def test_same_name_in_two_folders_is_never_mixed_up(tmp_path):
    folder = draw(tmp_path / "p", ["cats/1.jpg", "dogs/1.jpg", "cats/2.jpg", "x/cats/3.jpg", "3.jpg"])
    rows = ["image,caption", "cats/1.jpg,cat", "dogs/1.jpg,dog", "1.jpg,unclear", "dogs/2.jpg,absent",
            "./3.jpg,three", "photos\\cats\\2.jpg,windows"]
    images, _, skipped = gather(folder, write(tmp_path / "c.csv", "\n".join(rows)))
    assert {name: image.texts for name, image in images.items()} == {
        "cats/1.jpg": ["cat"], "dogs/1.jpg": ["dog"], "3.jpg": ["three"], "photos/cats/2.jpg": ["windows"]}
    assert images["3.jpg"].file.path == "3.jpg"
    assert skipped["images that could be several pictures"] == ["1.jpg"]
    assert [name.split(" ")[0] for name in skipped["images without a picture"]] == ["dogs/2.jpg"]
    assert skipped["pictures without a caption"] == ["x/cats/3.jpg"]


def test_identical_copies_are_one_picture_and_two_spellings_one_image(tmp_path):
    folder = draw(tmp_path / "p", ["1.jpg"])
    shutil.copytree(folder, tmp_path / "all" / "a")
    shutil.copytree(folder, tmp_path / "all" / "b")
    rows = ["image,caption", "1.jpg,one", "a/1.jpg,two"]
    images, *_ = gather(tmp_path / "all", write(tmp_path / "c.csv", "\n".join(rows)))
    assert {name: image.texts for name, image in images.items()} == {"1.jpg": ["one", "two"]}


PATH = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join)


@given(PATH, st.lists(PATH, unique=True, max_size=6))
def test_matching_pictures_agree_with_the_image_as_far_as_both_paths_go(image, paths):
    files = [File(path, lambda path=path: io.BytesIO(path.encode()), 0) for path in paths]
    found = [file.path for file in match_pictures([image], files)[image]]
    assert all(f"/{path}".endswith(f"/{image}") or f"/{image}".endswith(f"/{path}") for path in found)
    fits = [path for path in paths if f"/{path}".endswith(f"/{image}") or f"/{image}".endswith(f"/{path}")]
    assert bool(found) == bool(fits) and (image not in paths or found == [image])


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1).filter(str.strip)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1), st.sampled_from(",\t;|"))
def test_csv_gives_back_what_csv_wrote(rows, delimiter):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows([("image", "caption"), *rows])
    broken = []
    captions = list(parse_rows(csv_rows(out.getvalue(), "x.csv"), "x.csv", broken))
    assert [(c.image, c.text) for c in captions] == [(normalize_path(i), t) for i, t in rows] and not broken


def test_splits_prefer_column_then_lists_then_file_name_then_hash():
    column = [Caption("a", "", "train", None, "val.csv"), Caption("b", "", "valid", None, "val.csv")]
    plain = [c._replace(split="") for c in column]
    lists = {"train": {"b"}, "test": {"a"}}
    assert assign_splits(column, lists)[0] == {"a": "train", "b": "val"}
    assert assign_splits(plain, lists)[0] == {"a": "test", "b": "train"}
    assert assign_splits(plain, {})[0] == {"a": "val", "b": "val"}
    many = [Caption(f"{n}.jpg", "") for n in range(2000)]
    splits, _ = assign_splits(many, {})
    assert list(splits.values()).count("train") == pytest.approx(1600, abs=80)
    assert splits == assign_splits(many[::-1], {})[0]               # a matter of the name alone


def test_unknown_split_word_is_named(capsys):
    splits, _ = assign_splits([Caption("a", "", "train"), Caption("b", "", "extra"), Caption("c", "")], {})
    assert splits == {"a": "train", "b": None, "c": None} and "extra" in capsys.readouterr().err


def test_limit_takes_the_first_of_every_split_in_proportion(tmp_path):
    names = [f"{n:03}.jpg" for n in range(80)]
    words = ["train"] * 60 + ["val"] * 10 + ["test"] * 10
    path = write(tmp_path / "c.jsonl", "\n".join(
        json.dumps({"image": n, "caption": "x", "split": w}) for n, w in zip(names, words)))
    images = list(gather(draw(tmp_path / "i", names), path)[0].values())
    chosen = [image.name for image in first_images(images, 16)]
    assert chosen == names[:12] + names[60:62] + names[70:72]
    assert {image.split for image in first_images(images, 3)} == {"train", "val", "test"}
    assert first_images(images, 1000) == images


# --------------------------------------------------------------------------------------------------
# what is written


@pytest.fixture
def given_set(tmp_path):
    names = [*NAMES, "absent.jpg", "broken.jpg", "5.jpg"]
    pictures = draw(tmp_path / "i", NAMES + ["5.jpg", "nobody.jpg"])
    (pictures / "broken.jpg").write_bytes((pictures / "1.jpg").read_bytes()[:40])
    text = official(tmp_path / "t", names)
    with open(text / "Flickr8k.token.txt", "a") as file:
        file.write("1.jpg#2\t  \na line without a tab\n")
    return PrepareConfig(str(pictures), [str(text)], str(tmp_path / "out"), image_size=8)


def test_prepared_set_holds_pictures_tokens_and_splits(given_set):
    summary = prepare(given_set, BYTES)
    written = data.CaptionSet(given_set.out)
    assert written.names == NAMES + ["5.jpg"] and written.image_ids == [0, 1, 2, 3, 4]
    assert {k: v.tolist() for k, v in written.splits.items()} == {"train": [0, 1], "val": [2], "test": [3]}
    for name, image in zip(written.names, written.images):
        assert image.shape == (8, 8, 3) and (image == colour(name)).all()
    assert written.references(2) == ["A dog 0 , in 3.jpg .", "A dog 1 , in 3.jpg ."]
    assert BYTES.decode(written.caption_tokens([2])[0][0].tolist()) == "A dog 0, in 3.jpg."
    assert set(os.listdir(given_set.out)) == {
        "images.bin", "tokens.bin", "index.npz", "captions.json", "tokenizer.json", "meta.json"}
    meta = json.loads((Path(given_set.out) / "meta.json").read_text())
    assert [meta["counts"][what] for what in ("images", "captions", "no split")] == [5, 10, 1]
    for line in ("5 images with 10 captions", "train 2, val 1, test 1, no split 1", "absent.jpg (no split)",
                 "skipped unreadable pictures (1): broken.jpg", "skipped blank captions (1): 1.jpg",
                 "Flickr8k.token.txt line 16", "skipped pictures without a caption (1): nobody.jpg"):
        assert line in summary


def test_raw_captions_keep_their_spaces(given_set):
    given_set.raw_captions = True
    prepare(given_set, BYTES)
    tokens = data.CaptionSet(given_set.out).caption_tokens([2])[0][0]
    assert BYTES.decode(tokens.tolist()) == "A dog 0 , in 3.jpg ."


def test_second_run_writes_the_same_set_or_what_has_changed(given_set):
    content = lambda: {file.name: file.read_bytes() for file in Path(given_set.out).iterdir()}
    prepare(given_set, BYTES)
    before = content()
    prepare(given_set, BYTES)
    assert content() == before
    Image.new("RGB", (9, 9), "red").save(given_set.images + "/1.jpg", "PNG")
    prepare(given_set, BYTES)
    assert (data.CaptionSet(given_set.out).images[0] == (255, 0, 0)).all()


def test_failed_run_leaves_the_former_set_alone(given_set):
    prepare(given_set, BYTES)
    for name in os.listdir(given_set.images):
        (Path(given_set.images) / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the pictures could be read"):
        prepare(given_set, BYTES)
    assert len(data.CaptionSet(given_set.out).images) == 5 and len(os.listdir(given_set.out)) == 6


def test_interrupted_writing_leaves_no_set_that_looks_whole(tmp_path):
    pictures = [np.zeros((2, 2, 3), np.uint8)]
    prepared_set.write_images(tmp_path, pictures)
    prepared_set.write_set(tmp_path, ["a"], [(0, "x")], dict(train=[0], val=[], test=[]), BYTES,
                           dict(image_size=2))
    prepared_set.write_images(tmp_path, pictures * 2)                    # and killed here
    with pytest.raises(UserError):
        data.CaptionSet(tmp_path)


@pytest.mark.parametrize("text, clean", [
    ("A dog , a cat .", "A dog, a cat."), ("the man 's hat is n't on !", "the man's hat isn't on!"),
    ('says " hi " .', 'says " hi ".'), ("( a lens ) here", "(a lens) here"), ("paper , .", "paper,."),
    ("  two\n lines ", "two lines"), ("costs .50 , or 2 : 1", "costs .50, or 2: 1"), (" . ", ".")])
def test_clean_caption(text, clean):
    assert prepared_set.clean_caption(text) == clean and prepared_set.clean_caption(clean) == clean


# --------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize("name, content, message", [
    ("c.csv", b"image,caption\n1.jpg,caf\xe9\n", "c.csv line 2 is not UTF-8"),
    ("c.csv", b"1.jpg,a dog\n", "should name the columns image and caption"),
    ("c.csv", b'image,caption\n1.jpg,"a dog\n', "c.csv line 2 is not CSV"),
    ("c.csv", b"", "the columns image and caption"),
    ("c.csv", b"image,caption\n9.jpg,a dog\n", "none of the 1 images .* is among the 4 pictures"),
    ("c.csv", b"image,caption\n1.jpg,\n", "none of the captions .* can be used; .*: c.csv line 2"),
    ("c.csv", b"image,caption,split\n1.jpg,a dog,seven\n", "none of 1 images is in train, val or test"),
    ("c.jsonl", b'{"image": "1.jpg"\n[]\n', "broken entries: c.jsonl line 1, c.jsonl line 2"),
    ("c.json", b'{"images": [', "c.json is damaged: Expecting value"),
    ("c.json", b'{"images": [{"id": 1}], "annotations": []}', "neither COCO's JSON, nor Karpathy's"),
    ("c.json", b"3", "neither COCO's JSON, nor Karpathy's"),
    ("c.zip", b"PK but cut", "not a complete zip archive")])
def test_mistakes_end_in_one_line_that_says_which(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        gather(draw(tmp_path / "i"), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_paths_without_pictures_or_captions_are_named(tmp_path):
    text = official(tmp_path / "t")
    with pytest.raises(UserError, match="nowhere does not exist"):
        gather(tmp_path / "nowhere", text)
    with pytest.raises(UserError, match="no pictures in .*t; name their folder"):
        gather(text)
    with pytest.raises(UserError, match="no captions in .*i; name the file"):
        gather(draw(tmp_path / "i"))
    with pytest.raises(UserError, match="image_size"):
        PrepareConfig(image_size=0)


@pytest.mark.parametrize("name, content", [
    ("deep.json", b"[" * 100_000), ("deep.jsonl", b"[" * 100_000), ("digits.json", b"9" * 5000),
    ("null.json", b"null"), ("empty.json", b'{"images": []}'), ("returns.csv", b"image,caption\r1.jpg\r\r"),
    ("quote.csv", b'image,"caption'), ("field.csv", b"image,caption\n1.jpg," + b"x" * 200_000),
    ("long.csv", b"image,caption\n1.jpg," + b"x" * 11_000)])
def test_odd_caption_files_end_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        gather(draw(tmp_path / "i"), tmp_path / name)
    assert str(caught.value).isprintable() and name in str(caught.value)


FIELDS = st.sampled_from(["images", "annotations", "id", "image_id", "file_name", "filename", "sentences",
                          "raw", "caption", "split", "image", "cocoid", "caption_0"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4)), max_leaves=12)


@settings(deadline=None)
@given(JSON, st.sampled_from(["json", "jsonl"]))
def test_json_of_any_shape_gives_captions_or_one_line(content, suffix):
    file = File(f"x.{suffix}", lambda: io.BytesIO(json.dumps(content).encode()), 0)
    try:
        captions, *_, broken = read_captions([file])
    except UserError as error:
        assert str(error).isprintable() and "x.json" in str(error)
    else:
        assert all(isinstance(text, str) for c in captions for text in (c.image, c.text, c.split))
        assert all(place.startswith("x.") for place in broken)


@settings(deadline=None)
@example(b'\t""\0', "txt", b"")                     # the reason of Python's csv holds a tab
@given(st.binary(max_size=80) | st.text('a,"#0\t\n\r|é', max_size=60).map(str.encode),
       st.sampled_from(["txt", "json", "jsonl"]), st.sampled_from([b"", b"image,caption\n", b"1.jpg#0\t"]))
def test_any_bytes_give_captions_or_one_line(content, suffix, beginning):
    try:
        read_captions([File(f"x.{suffix}", lambda: io.BytesIO(beginning + content), 0)])
    except UserError as error:
        assert str(error).isprintable()


def test_broken_rows_are_skipped_and_named(tmp_path):
    path = write(tmp_path / "c.csv", "image,caption\n1.jpg,a dog, running\n2.jpg,fine\n,no image\n")
    images, _, skipped = gather(draw(tmp_path / "i"), path)
    assert list(images) == ["2.jpg"]
    assert skipped["broken entries of the captions"] == ["c.csv line 2", "c.csv line 4"]


def test_zip_archives_have_limits(tmp_path, monkeypatch):
    """On the size of a member and on the number of them; unusual compressions are not read at all."""
    folder = draw(tmp_path / "i", ["1.jpg", "2.jpg"])
    path = zipped(folder, tmp_path / "p.zip")
    captions = write(tmp_path / "c.csv", "image,caption\n" + "".join(f"{name},a dog\n" for name in NAMES))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("3.jpg", bytes(MAX_IMAGE_BYTES + 1), zipfile.ZIP_DEFLATED)
        archive.writestr("4.jpg", (folder / "1.jpg").read_bytes(), zipfile.ZIP_LZMA)
    summary = prepare(PrepareConfig(str(path), [str(captions)], str(tmp_path / "out"), image_size=8), BYTES)
    assert "skipped unreadable pictures (2): 3.jpg, 4.jpg" in summary
    monkeypatch.setattr(caption_formats, "MAX_FILES", 1)
    for pictures in (path, folder):
        with pytest.raises(UserError, match="holds more than 1 files"):
            gather(pictures, captions)


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    captions = write(tmp_path / "c.csv", "image,caption\n1.jpg,a dog\n")
    for path in (tmp_path / "pipe.zip", "/dev/zero"):
        for arguments in ((path, captions), (tmp_path, path)):
            with pytest.raises(UserError, match=f"{path} is a pipe or a device"):
                gather(*arguments)


@pytest.mark.parametrize("name", prepared_set.SET_FILES)
def test_files_that_are_not_of_a_set_are_never_replaced(given_set, name):
    write(Path(given_set.out) / name, "my work")
    with pytest.raises(UserError, match=f"holds a file {name} that would be replaced"):
        prepare(given_set, BYTES)
    assert [(p.name, p.read_text()) for p in Path(given_set.out).iterdir()] == [(name, "my work")]
    os.remove(f"{given_set.out}/{name}")
    write(Path(given_set.out) / "thesis.txt", "my work")
    prepare(given_set, BYTES)
    assert Path(given_set.out, "thesis.txt").read_text() == "my work"


def test_run_that_was_killed_is_begun_again_and_two_at_once_are_refused(given_set):
    with pytest.raises(KeyboardInterrupt), prepared_set.set_folder(given_set.out):
        prepared_set.write_images(given_set.out, [np.zeros((8, 8, 3), np.uint8)])
        with pytest.raises(UserError, match="another run is writing"):
            prepare(given_set, BYTES)
        raise KeyboardInterrupt                                     # and so is half of a set left
    write(Path(given_set.out) / "tokens.bin.123.tmp", "begun")
    prepare(given_set, BYTES)
    assert len(data.CaptionSet(given_set.out).images) == 5 and len(os.listdir(given_set.out)) == 6


def test_the_mark_of_an_unfinished_set_is_closed_when_it_is_removed(given_set, monkeypatch):
    """Windows removes no open file."""
    fcntl, remove, removed = pytest.importorskip("fcntl"), os.remove, []

    def remove_closed(path):
        if path.endswith(".unfinished"):
            with open(path) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # BlockingIOError while it is held open
            removed.append(path)
        remove(path)

    monkeypatch.setattr(prepared_set.os, "remove", remove_closed)
    prepare(given_set, BYTES)
    assert removed == [os.path.join(given_set.out, ".unfinished")]


@pytest.mark.parametrize("meta", ["", "[]", '{"images": 3}', '{"source": 7}'])
def test_damaged_meta_json_is_not_taken_for_a_set(given_set, meta):
    prepare(given_set, BYTES)
    write(Path(given_set.out) / "meta.json", meta)
    with pytest.raises(UserError, match="that would be replaced but does not belong to a prepared set"):
        prepare(given_set, BYTES)


def test_names_with_line_breaks_and_other_bytes_are_one_line(tmp_path, capsys):
    name, out = os.fsdecode(b"a\nb \xff.jpg"), str(tmp_path / "out\n")
    folder = draw(tmp_path / "i", ["1.jpg"])
    os.rename(folder / "1.jpg", folder / name)
    captions = write(tmp_path / "c.json", [{"image": name, "caption": "x", "split": "train"},
                                           {"image": name, "caption": "x", "split": "x\n"},
                                           {"image": "\ud800\n", "caption": "y", "split": "train"}])
    summary = prepare(PrepareConfig(str(folder), [str(captions)], out, image_size=8), BYTES)
    assert all(line.isprintable() for line in summary.split("\n")) and summary.count("\n") == 2
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())
    assert data.CaptionSet(out).names == [name]


def test_command_line_says_what_is_wrong_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "prepare_flickr8k.py", "--images", tmp_path / "nowhere"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "does not exist" in done.stderr


@pytest.mark.skipif(not (SHARED / "flickr8k").is_dir(), reason="the real Flickr8k is not at hand")
def test_real_archives_are_complete_but_for_one_image(tmp_path, capsys):
    images, text = (str(SHARED / "flickr8k" / f"Flickr8k_{part}.zip") for part in ("Dataset", "text"))
    config = PrepareConfig(images, [text], str(tmp_path), limit=24)
    images, _, skipped = collect(config)
    assert len(images) == 8090 and sum(len(image.texts) for image in images) == 40450
    splits = [image.split for image in images]
    assert [splits.count(split) for split in ("train", "val", "test", None)] == [5999, 1000, 1000, 91]
    assert skipped["images without a picture"] == ["3050606344_af711c726c.jpg (train)"]
    summary = prepare(config, BYTES)
    assert "train 18, val 3, test 3" in summary and "3050606344_af711c726c.jpg (train)" in summary
    assert not capsys.readouterr().err                              # known files: no warning
    assert len(data.CaptionSet(tmp_path).split("train")) == 18
