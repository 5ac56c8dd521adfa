"""Folders of images: labels, captions, unreadable files, buckets, and the stored index of the files."""

import json
import logging
import os
import pickle
import time

import numpy as np
import pytest
from PIL import Image

from diffusion.core.build import build
from diffusion.data import file_index
from diffusion.data.file_index import FileIndex
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
    assert source.class_names == ("bird", "cät") and source.spec.num_classes == 2
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


def test_captions_next_to_the_images(tree):
    (tree / "bird" / "1 a.txt").write_text(" a bird, a naïve one\n")
    source = make(tree, captions=True)
    assert source[0]["caption"] == "a bird, a naïve one" and source.spec.captions
    with refused("data") as caught:
        source[1]
    assert "x.webp" in caught.value.problem and "x.txt" in caught.value.problem
    (tree / "bird" / "deep" / "x.txt").write_bytes(b"caf\xe9")
    with refused("data") as caught:
        source[1]
    assert "x.webp" in caught.value.problem and "UTF-8" in caught.value.problem
    assert "caption" not in make(tree)[0]


def test_captions_in_one_file(tree):
    lines = [{"file_name": "cät/ü.png", "text": "ein Kätzchen"}, {"file_name": "bird/1 a.png", "text": "a bird"}]
    (tree / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = make(tree, captions=True)
    assert source[0]["caption"] == "a bird" and source[2]["caption"] == "ein Kätzchen"
    with refused("data") as caught:
        source[1]
    assert "x.webp" in caught.value.problem


@pytest.mark.parametrize("line", [b"no json", b'{"file_name": "a"}', b'{"file_name": "a", "text": "caf\xe9"}', b"[1]"])
def test_a_bad_line_is_reported_by_number(tree, line):
    (tree / "metadata.jsonl").write_bytes(b'{"file_name": "a", "text": "b"}\n' + line)
    with refused("data.path") as caught:
        make(tree)
    assert "metadata.jsonl, line 2" in caught.value.problem


def test_a_changed_metadata_file_is_read_again(tree):
    path = tree / "metadata.jsonl"
    path.write_text('{"file_name": "bird/1 a.png", "text": "old"}')
    assert make(tree, captions=True)[0]["caption"] == "old"
    path.write_text('{"file_name": "bird/1 a.png", "text": "new"}')
    os.utime(path, ns=(1, 1))
    assert make(tree, captions=True)[0]["caption"] == "new"


def test_links(tree, tmp_path):
    """Checks that links are followed, also out of the folder, that cycles end, and that broken links are reported."""
    outside = save(tmp_path / "elsewhere" / "z.png", (3, 0, 0))
    (tree / "bird" / "out.png").symlink_to(outside)
    (tree / "dog").symlink_to(outside.parent)
    (tree / "bird" / "again").symlink_to(tree)
    source = make(tree)
    assert source.class_names == ("bird", "cät", "dog") and reds(source).count(3) == 2
    (tree / "bird" / "0.png").symlink_to(tmp_path / "nowhere.png")
    with refused("data") as caught:
        make(tree)[0]
    assert "bird/0.png" in caught.value.problem


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


def test_other_image_formats_are_reported(tree):
    save(tree / "bird" / "2.gif")
    with refused("data") as caught:
        make(tree)[1]
    assert "2.gif" in caught.value.problem and "GIF" in caught.value.problem


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


def test_the_index_is_stored(tree, monkeypatch):
    make(tree)
    monkeypatch.setattr(file_index, "_walk", None)
    assert reds(make(tree)) == [0, 1, 2]


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
