"""Folders of images: labels, captions, unreadable files, buckets, and the stored index of the files."""

import csv
import json
import logging
import os
import pickle
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.core import files
from diffusion.core.build import build
from diffusion.data import file_index
from diffusion.data.file_index import FileIndex
from diffusion.data.pipeline import Batches
from tests.refusals import refused


def save(path, colour=(10, 20, 30), size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def make(path, **keywords):
    return build("data", {"name": "folder", "path": str(path), "size": 8, **keywords})


@pytest.fixture
def tree(tmp_path):
    """A folder with three images in two classes. Their red values are 0, 1, 2 in the order of their names."""
    root = tmp_path / "images"
    save(root / "bird" / "1 a.png", (0, 0, 0))
    save(root / "bird" / "deep" / "x.webp", (1, 0, 0), lossless=True)
    save(root / "cät" / "ü.png", (2, 0, 0))
    return root


def reds(source):
    """Returns the red value of the first pixel of each image."""
    return [int(source[index]["x"][0, 0, 0]) for index in range(len(source))]


def test_images_labels_and_names(tree):
    source = make(tree)
    assert reds(source) == [0, 1, 2] and source.spec.shape == (8, 8, 3)
    assert [int(source[index]["cond"]["label"]) for index in range(3)] == [0, 0, 1]
    assert source.spec.class_names == ("bird", "cät") and source.spec.num_classes == 2
    assert source[0]["x"].dtype == source.spec.x.dtype == "uint8" and source[0]["cond"]["label"].dtype == np.int32


def test_without_labels(tree):
    save(tree / "loose.jpg")
    source = make(tree, labels=False)
    assert len(source) == 4 and source[0]["cond"] == {} and source.spec.num_classes == 0
    with refused("data.labels") as caught:
        make(tree)
    assert "loose.jpg" in caught.value.problem


@pytest.mark.parametrize("index", [-1, 3])
def test_index_out_of_range(tree, index):
    with pytest.raises(IndexError):
        make(tree)[index]


def test_file_names_that_are_not_utf8(tree):
    path = os.fsencode(tree) + b"/bird/\xff\xfe \n.png"
    with open(path, "wb") as file:
        Image.new("RGB", (8, 8), (7, 0, 0)).save(file, "PNG")
    assert 7 in reds(make(tree))


def test_captions_next_to_the_images(tree, caplog):
    (tree / "bird" / "1 a.txt").write_text(" a bird, a naïve one\n")
    (tree / "cät" / "ü.caption").write_text("a cat")
    with refused("data.captions") as caught:
        make(tree, captions=True)
    assert "1 of the 3" in caught.value.problem and "x.webp" in caught.value.problem
    source = make(tree, captions=True, on_error="skip")
    assert "x.webp" in caplog.text
    assert [source[index]["caption"] for index in range(3)] == ["a bird, a naïve one", "a cat", "a cat"]
    (tree / "bird" / "deep" / "x.txt").write_text("a photo")
    source = make(tree, captions=True)
    assert source[1]["caption"] == "a photo" and source.spec.captions
    (tree / "bird" / "deep" / "x.txt").write_bytes(b"caf\xe9")
    with refused("data") as caught:
        source[1]
    assert "x.webp" in caught.value.problem and "UTF-8" in caught.value.problem
    assert "caption" not in make(tree)[0]


def test_captions_in_one_file(tree):
    lines = [{"file_name": "cät/ü.png", "text": "ein Kätzchen"}, {"file_name": "bird/1 a.png", "text": "a bird"}]
    (tree / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with refused("data.captions") as caught:
        make(tree, captions=True)
    assert "1 of the 3" in caught.value.problem and "x.webp" in caught.value.problem
    source = make(tree, captions=True, on_error="skip")
    assert source[0]["caption"] == "a bird" and source[1]["skipped"] and source[2]["caption"] == "ein Kätzchen"


SPELLINGS = ("./bird/1 a.png", "bird\\deep/../deep/x.webp", unicodedata.normalize("NFD", "cät/ü.png"))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "nested"])
def test_paths_and_files_of_captions(tree, kind, caplog):
    """Paths are compared in one spelling; a file may lie in any folder, and list further images."""
    rows = [(name, f"text {number}, {kind}") for number, name in enumerate((*SPELLINGS, "gone.png"))]
    if kind == "csv":
        with open(tree / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([("text", "file_name"), *((text, name) for name, text in rows)])
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "caption": text}) for name, text in rows]
        (tree / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    if kind == "nested":
        (tree / "bird" / "metadata.csv").write_text('file_name,text\n1 a.png,"text 0, nested"\n')
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows[1:]]
        (tree / "metadata.jsonl").write_text("\n".join(lines))
    source = make(tree, captions=True)
    assert [source[index]["caption"] for index in range(3)] == [f"text {number}, {kind}" for number in range(3)]
    assert "gone.png" in caplog.text
    assert pickle.loads(pickle.dumps(source))[2]["caption"] == f"text 2, {kind}"  # in a worker


@pytest.mark.parametrize(
    ("name", "content"),
    [("jsonl", b"no json"), ("jsonl", b'{"file_name": "a"}'), ("jsonl", b'{"file_name": "a", "text": "caf\xe9"}'),
     ("jsonl", b"[1]"), ("jsonl", b'{"file_name": "a", "text": null}'), ("csv", b"a"), ("csv", b"a,caf\xe9"),
     ("csv", b'a,"b')],
)  # fmt: skip
def test_a_bad_line_is_reported_by_number(tree, name, content):
    """It is if captions are requested: files of this name may also describe something else."""
    first = {"jsonl": b'{"file_name": "a", "text": "b"}', "csv": b"file_name,text"}[name]
    (tree / f"metadata.{name}").write_bytes(first + b"\n" + content)
    make(tree)
    with refused("data.path") as caught:
        make(tree, captions=True)
    assert f"metadata.{name}, line " in caught.value.problem


def test_captions_in_parquet_are_refused_by_name(tree):
    (tree / "metadata.parquet").touch()
    make(tree)
    with refused("data.captions") as caught:
        make(tree, captions=True)
    assert "metadata.parquet" in caught.value.problem and "metadata.jsonl" in caught.value.problem


def test_a_changed_metadata_file_is_read_again(tree):
    path = tree / "metadata.jsonl"
    for text in ("old", "new"):
        path.write_text(json.dumps({"file_name": "bird/1 a.png", "text": text}))
        os.utime(path, ns=(len(text), 1 if text == "old" else 2))
        assert make(tree, captions=True, on_error="skip")[0]["caption"] == text


def test_links(tree, tmp_path):
    """Checks that links are followed, also out of the folder, that cycles end, and that broken links are reported."""
    outside = save(tmp_path / "elsewhere" / "z.png", (3, 0, 0))
    (tree / "bird" / "out.png").symlink_to(outside)
    (tree / "dog").symlink_to(outside.parent)
    (tree / "bird" / "again").symlink_to(tree)
    source = make(tree)
    assert source.spec.class_names == ("bird", "cät", "dog") and reds(source).count(3) == 2
    (tree / "bird" / "0.png").symlink_to(tmp_path / "nowhere.png")
    (tree / "loop").symlink_to("loop")
    (tree / "bird" / "loop.png").symlink_to("loop.png")
    source = make(tree)
    for name, index in (("bird/0.png", 0), ("bird/loop.png", 3)):
        with refused("data") as caught:
            source[index]
        assert name in caught.value.problem


def test_pipes_and_hidden_files_are_ignored(tree):
    os.mkfifo(tree / "bird" / "pipe.png")
    save(tree / "bird" / ".thumb.png")
    save(tree / ".cache" / "x.png")
    assert reds(make(tree)) == [0, 1, 2]


def test_other_files_are_counted(tree):
    (tree / "bird" / "notes.md").touch()
    (tree / "bird" / "README").touch()
    (tree / "bird" / "1 a.txt").touch()
    assert make(tree).index.ignored == {".md": 1, "": 1}


def test_other_image_formats_are_reported(tree, caplog):
    """Those with another extension are left out with a warning, when the folder is opened."""
    save(tree / "bird" / "2.ico")
    (tree / "bird" / "3.HEIC").touch()
    assert reds(make(tree)) == [0, 1, 2] and "1 .ico" in caplog.text and "1 .heic" in caplog.text
    (tree / "bird" / "2.ico").rename(tree / "bird" / "2.png")
    with refused("data") as caught:
        make(tree)[1]
    assert "2.png" in caught.value.problem and "ICO" in caught.value.problem


def test_the_first_picture_of_any_format_is_read(tree):
    """A phone's JPEG with a second picture, and formats that may hold several."""
    formats = ["mpo.jpg", "gif.gif", "tiff.tif", "bmp.bmp", "apng.png", "webp.webp"]
    for number, name in enumerate(formats):
        several = {} if name == "bmp.bmp" else {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "white")]}
        kind = "MPO" if name == "mpo.jpg" else None
        save(tree / "other" / name, (10 * number, 0, 0), format=kind, **several)
    source = make(tree)
    found = {source.index.path(index).rpartition("/")[2]: red for index, red in enumerate(reds(source))}
    for number, name in enumerate(formats):
        assert abs(found[name] - 10 * number) < 5, name


def test_data_of_twelve_bits(tree, caplog):
    """They are dark unless the number of bits is given, which a warning says when the folder is opened."""
    values = np.full((8, 8), 4095, np.uint16)
    for path in (tree / "bird" / "1 a.png", tree / "bird" / "deep" / "x.tif", tree / "cät" / "ü.png"):
        Image.fromarray(values).save(path)
    (tree / "bird" / "deep" / "x.webp").unlink()
    assert reds(make(tree)) == [16, 16, 16] and "data.bits, such as 12" in caplog.text
    caplog.clear()
    assert reds(make(tree, bits=12)) == [255, 255, 255] and not caplog.text
    with refused("data") as caught:
        make(tree, bits=8)[0]
    assert "255" in caught.value.problem and "4,095" in caught.value.problem
    with refused("data.bits"):
        make(tree, bits=17)


@pytest.mark.parametrize("names", [("train", "val"), ("train",), ("Test", "valid", "train")])
def test_splits_are_not_classes(tmp_path, names, caplog):
    for name in names:
        save(tmp_path / name / "cat" / "1.png")
    with refused("data.path") as caught:
        make(tmp_path)
    assert all(name in caught.value.problem for name in (*names, "labels=False"))
    assert make(tmp_path / names[0]).spec.class_names == ("cat",)
    caplog.clear()
    assert make(tmp_path, labels=False).spec.num_classes == 0
    assert bool(caplog.text) == (len(names) > 1)


def test_numbers_are_ordered_by_value(tmp_path):
    for number in (10, 2, 0, 1):
        save(tmp_path / str(number) / "1.png", (number, 0, 0))
    source = make(tmp_path)
    assert source.spec.class_names == ("0", "1", "2", "10")
    for example in (source[index] for index in range(4)):
        assert source.spec.class_names[example["cond"]["label"]] == str(example["x"][0, 0, 0])
        assert example["cond"]["label"].dtype == np.int32
    assert make(tmp_path, class_order="name").spec.class_names == ("0", "1", "10", "2")
    save(tmp_path / "a10" / "1.png")  # with other names, the order of names
    assert make(tmp_path).spec.class_names == ("0", "1", "10", "2", "a10")


def test_class_names_have_one_spelling(tree, caplog):
    """It is that of Linux, for a folder from macOS; a directory without images is no class, which a warning says."""
    (tree / "cät").rename(tree / unicodedata.normalize("NFD", "cät"))
    save(tree / "dog" / ".hidden.png")
    assert make(tree).spec.class_names == ("bird", unicodedata.normalize("NFC", "cät"))
    assert "dog" in caplog.text
    with open(os.fsencode(tree) + b"/\xff.png", "wb") as file:
        Image.new("RGB", (8, 8)).save(file, "PNG")
    for name in (b"\xfe", b"\xff"):
        os.mkdir(os.path.join(os.fsencode(tree), name))
        os.link(os.fsencode(tree) + b"/\xff.png", os.path.join(os.fsencode(tree), name, b"a.png"))
    os.remove(os.fsencode(tree) + b"/\xff.png")
    assert len(make(tree).spec.class_names) == 4
    json.dumps(make(tree).spec.class_names).encode()


def test_folders_without_images(tmp_path):
    (tmp_path / "a.csv").touch()
    for path in (tmp_path / "nothing", tmp_path / "a.csv"):
        with refused("data.path"):
            make(path)
    with refused("data.path") as caught:
        make(tmp_path)
    assert "1 .csv" in caught.value.problem


def test_skipping_substitutes_the_next_readable_image(tree, caplog):
    (tree / "bird" / "1 a.png").write_bytes(b"")
    (tree / "bird" / "deep" / "x.webp").write_bytes(b"x")
    with refused("data") as caught:
        make(tree)[0]
    assert "1 a.png" in caught.value.problem and "on_error='skip'" in caught.value.problem
    source = make(tree, on_error="skip")
    with caplog.at_level(logging.WARNING, "diffusion"):
        assert reds(source) == [2, 2, 2]
        assert [bool(source[index]["skipped"]) for index in range(3)] == [True, True, False]
    assert int(source[0]["cond"]["label"]) == 1
    assert sum("1 a.png" in message for message in caplog.messages) == 1  # each image is reported once
    (tree / "cät" / "ü.png").write_bytes(b"x")
    with refused("data.path"):
        make(tree, on_error="skip")[1]


def test_each_image_has_the_size_of_the_nearest_aspect_ratio(tmp_path):
    sizes = {"a": (100, 50), "b": (50, 100), "c": (60, 50), "d": (400, 100)}  # width, height
    for name, size in sizes.items():
        save(tmp_path / "all" / f"{name}.png", size=size)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    save(tmp_path / "all" / "e.jpg", size=(100, 50), exif=rotated)  # 50 x 100 after rotation
    (tmp_path / "all" / "f.png").write_bytes(b"")
    source = make(tmp_path, size=((8, 16), (8, 8), (16, 8)), on_error="skip")
    assert source.buckets.tolist() == [0, 2, 1, 0, 2, 0]
    assert [source[index]["x"].shape[:2] for index in range(5)] == [(8, 16), (16, 8), (8, 8), (8, 16), (16, 8)]
    assert source[5]["x"].shape == (8, 16, 3) and source[5]["skipped"]  # replaced by a, the next of its bucket


def test_buckets_are_made_for_a_size(tmp_path):
    for name, size in {"a": (100, 100), "b": (100, 50), "c": (48, 100), "d": (600, 100), "e": (99, 100)}.items():
        save(tmp_path / "all" / f"{name}.png", size=size)  # width, height
    source = make(tmp_path, size=16, buckets=4)
    shapes = [source[index]["x"].shape[:2] for index in range(5)]
    assert shapes == [(16, 16), (12, 20), (20, 12), (8, 32), (16, 16)]
    assert source.spec.shape == (16, 16, 3) and [source.shapes[number] for number in source.buckets] == shapes
    with refused("data.buckets"):
        make(tmp_path, size=18, buckets=4)
    with refused("data.buckets"):
        make(tmp_path, size=((16, 16), (8, 32)), buckets=4)


def test_batches_of_buckets_with_size_conditions(tmp_path):
    """A batch has one size, which is the target of all its examples, for any number of processes and workers."""
    for number, size in enumerate([(64, 64)] * 5 + [(96, 64)] * 3 + [(64, 96)]):
        save(tmp_path / "all" / f"{number}.png", size=size)  # width, height
    source = make(tmp_path, size=16, buckets=4, crop="random", flip=True, size_conditions="sdxl")
    one = Batches(source, batch_size=2, seed=3)
    batches = [next(one) for _ in range(9)]
    for batch in batches:
        np.testing.assert_array_equal(batch["cond"]["time_ids"][:, 4:], np.tile(batch["x"].shape[1:3], (2, 1)))
    assert {batch["x"].shape[1:3] for batch in batches} == {(16, 16), (12, 20), (20, 12)}
    resumed = Batches(source, batch_size=2, seed=3, position={"examples": 8, "size": 9}, workers=1)
    halves = [Batches(source, batch_size=2, seed=3, process=process, processes=2) for process in range(2)]
    for number, batch in enumerate(batches):
        parts = [next(half) for half in halves]
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda *a: np.concatenate(a), *parts), batch)
        if number >= 4:
            jax.tree.map(np.testing.assert_array_equal, next(resumed), batch)
    for stream in (one, resumed, *halves):
        stream.close()


@pytest.mark.parametrize("flip", [False, True])
def test_size_conditions_say_what_was_cut_off(tmp_path, flip):
    """Columns of an image of 8 rows count up, so that the example shows where it was cut."""
    columns = np.tile(np.arange(40, dtype=np.uint8), (8, 1))
    (tmp_path / "all").mkdir()
    Image.fromarray(columns).save(tmp_path / "all" / "a.png")
    source = make(tmp_path, size=(8, 16), channels=1, crop="random", flip=flip, size_conditions="sdxl")
    assert source.spec.conditions["time_ids"].shape == (6,)
    np.testing.assert_array_equal(source[0]["cond"]["time_ids"], [8, 40, 0, 12, 8, 16])
    lefts, mirrored = set(), 0
    for seed in range(60):
        example = source.draw(0, np.random.default_rng(seed))
        row, (height, width, _, left, *target) = example["x"][4, :, 0].astype(int), example["cond"]["time_ids"]
        if row[0] > row[-1]:  # counted from the right edge of the image
            mirrored += 1
            row = 39 - row
        zoom = 15 / (row[-1] - row[0])  # about
        assert (height, width, *target) == (8, 40, 8, 16) and abs(left - row[0] * zoom) <= 2, (left, row)
        lefts.add(left)
    assert len(lefts) > 10 and (mirrored > 10) == flip
    pixart = make(tmp_path, size=(8, 16), channels=1, labels=False, size_conditions="pixart")
    assert pixart[0]["cond"]["resolution"].tolist() == [8, 40] and pixart[0]["cond"]["aspect_ratio"] == 0.5
    assert {name: np.shape(value) for name, value in pixart[0]["cond"].items()} == {
        name: condition.shape for name, condition in pixart.spec.conditions.items()
    }


def test_the_index_is_stored(tree, monkeypatch):
    make(tree)
    monkeypatch.setattr(file_index, "_walk", None)
    assert reds(make(tree)) == [0, 1, 2]


def test_one_process_builds_the_index_and_the_others_wait(tree, monkeypatch):
    """Any process of a job may be the one, because each may have its own disk."""
    walk, walks = file_index._walk, []

    def slow_walk(root, *args):
        if not args:
            walks.append(root)
            time.sleep(0.2)
        return walk(root, *args)

    monkeypatch.setattr(file_index, "_walk", slow_walk)
    monkeypatch.setattr(files, "writes", lambda: False)
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(lambda _: make(tree, size=((8, 8), (8, 16))), range(4)))
    assert all(reds(source) == [0, 1, 2] for source in sources) and len(walks) == 1


def test_the_index_is_rebuilt_when_files_are_added_or_removed(tree):
    make(tree, size=((8, 8), (8, 16)))
    save(tree / "bird" / "deep" / "y.png", (9, 0, 0), size=(16, 8))
    source = make(tree, size=((8, 8), (8, 16)))
    assert reds(source) == [0, 1, 9, 2] and source.buckets.tolist() == [0, 0, 1, 0]
    (tree / "bird" / "1 a.png").unlink()
    assert reds(make(tree)) == [1, 9, 2]


def test_a_corrupt_index_is_rebuilt(tree):
    make(tree)
    (tree / ".index" / "index.json").write_text("{")
    assert len(make(tree)) == 3


def test_the_index_may_be_stored_elsewhere(tree, tmp_path):
    source = make(tree, index=str(tmp_path / "stored"))
    assert (tmp_path / "stored" / "index.json").exists() and not (tree / ".index").exists()
    assert reds(source) == [0, 1, 2]
    (tmp_path / "file").touch()
    with refused("data.index"):
        make(tree, index=str(tmp_path / "file" / "x"))


@pytest.mark.parametrize("options", [{"captions": True}, {"size": ((8, 8), (8, 16))}])
def test_an_index_that_cannot_be_written_is_named(tree, monkeypatch, options):
    """Captions and sizes are added to an index when they are first needed."""
    (tree / "metadata.csv").write_text("file_name,text\n")
    make(tree)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with refused("data.index") as caught:
        make(tree, **options)
    assert "No space left" in caught.value.problem and ".index" in caught.value.problem


def test_a_worker_maps_the_index_itself(tree):
    """Checks that the data sent to a worker process do not grow with the folder."""
    few = len(pickle.dumps(make(tree)))
    for number in range(200):
        (tree / "bird" / f"{number}.png").touch()
    source = make(tree)
    assert len(pickle.dumps(source)) < few + 20
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == 203 and again.index.path(150) == source.index.path(150)


def test_a_large_folder_is_cheap(tmp_path):
    """Checks, with 10,000 files, limits of 3 s to build the index, 0.1 s to open it and 200 bytes per image."""
    for top in range(10):
        folder = tmp_path / f"class {top}"
        folder.mkdir()
        for number in range(1000):
            (folder / f"image {number:06}.png").touch()
    begin = time.perf_counter()
    index = FileIndex(str(tmp_path))
    built = time.perf_counter()
    FileIndex(str(tmp_path))
    opened = time.perf_counter()
    assert len(index) == 10_000 and built - begin < 3 and opened - built < 0.1
    assert sum(array.nbytes for array in (index.paths.data, index.paths.ends, index.labels)) < 200 * len(index)
    assert isinstance(index.paths.data, np.memmap)
