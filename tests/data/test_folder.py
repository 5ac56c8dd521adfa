"""Folders of images as people have them, and the kept list of their files."""

import json
import os
import pickle
import time

import numpy as np
import pytest
from PIL import Image

from diffusion.core.build import build
from diffusion.core.types import InputError
from diffusion.data import file_index
from diffusion.data.file_index import FileIndex


def save(path, colour=(10, 20, 30), size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def make(path, **keywords):
    return build("data", {"name": "folder", "path": str(path), "size": 8, **keywords})


@pytest.fixture
def tree(tmp_path):
    """Three images in two classes; their reds are 0, 1, 2 in the order of their names."""
    root = tmp_path / "images"
    save(root / "bird" / "1 a.png", (0, 0, 0))
    save(root / "bird" / "deep" / "x.webp", (1, 0, 0), lossless=True)
    save(root / "cät" / "ü.png", (2, 0, 0))
    return root


def reds(source):
    return [round((float(source[index]["x"][0, 0, 0]) + 1) * 127.5) for index in range(len(source))]


def test_images_labels_and_names(tree):
    source = make(tree)
    assert reds(source) == [0, 1, 2] and source.spec.shape == (8, 8, 3)
    assert [int(source[index]["cond"]["label"]) for index in range(3)] == [0, 0, 1]
    assert source.class_names == ("bird", "cät") and source.spec.num_classes == 2
    assert source[0]["x"].dtype == np.float32 and source[0]["cond"]["label"].dtype == np.int32


def test_without_labels(tree):
    save(tree / "loose.jpg")
    source = make(tree, labels=False)
    assert len(source) == 4 and source[0]["cond"] == {} and source.spec.num_classes == 0
    with pytest.raises(InputError, match=r"data.labels: .*loose.jpg lies in no directory.*labels=False"):
        make(tree)


@pytest.mark.parametrize("index", [-1, 3])
def test_no_such_example(tree, index):
    with pytest.raises(IndexError, match="there are 3 examples"):
        make(tree)[index]


def test_names_that_are_no_text(tree):
    path = os.fsencode(tree) + b"/bird/\xff\xfe \n.png"
    with open(path, "wb") as file:
        Image.new("RGB", (8, 8), (7, 0, 0)).save(file, "PNG")
    assert 7 in reds(make(tree))


def test_captions_beside_the_images(tree):
    (tree / "bird" / "1 a.txt").write_text(" a bird, a naïve one\n")
    source = make(tree, captions=True)
    assert source[0]["caption"] == "a bird, a naïve one" and source.spec.captions
    with pytest.raises(InputError, match=r"x.webp has no caption: .*x.txt: No such file"):
        source[1]
    (tree / "bird" / "deep" / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"x.webp has a caption that is not UTF-8: .*x.txt, byte 3"):
        source[1]
    assert "caption" not in make(tree)[0]


def test_captions_of_one_file(tree):
    lines = [{"file_name": "cät/ü.png", "text": "ein Kätzchen"}, {"file_name": "bird/1 a.png", "text": "a bird"}]
    (tree / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = make(tree, captions=True)
    assert source[0]["caption"] == "a bird" and source[2]["caption"] == "ein Kätzchen"
    with pytest.raises(InputError, match=r"x.webp has no caption in metadata.jsonl"):
        source[1]


@pytest.mark.parametrize("line", [b"no json", b'{"file_name": "a"}', b'{"file_name": "a", "text": "caf\xe9"}', b"[1]"])
def test_a_bad_line_is_named(tree, line):
    (tree / "metadata.jsonl").write_bytes(b'{"file_name": "a", "text": "b"}\n' + line)
    with pytest.raises(InputError, match=r"metadata.jsonl, line 2: .*write {\"file_name\""):
        make(tree)


def test_a_new_metadata_file_is_seen(tree):
    path = tree / "metadata.jsonl"
    path.write_text('{"file_name": "bird/1 a.png", "text": "old"}')
    assert make(tree, captions=True)[0]["caption"] == "old"
    path.write_text('{"file_name": "bird/1 a.png", "text": "new"}')
    os.utime(path, ns=(1, 1))
    assert make(tree, captions=True)[0]["caption"] == "new"


def test_links(tree, tmp_path):
    """Links are followed, also out of the folder; a circle ends, and what leads nowhere is named."""
    outside = save(tmp_path / "elsewhere" / "z.png", (3, 0, 0))
    (tree / "bird" / "out.png").symlink_to(outside)
    (tree / "dog").symlink_to(outside.parent)
    (tree / "bird" / "again").symlink_to(tree)
    source = make(tree)
    assert source.class_names == ("bird", "cät", "dog") and reds(source).count(3) == 2
    (tree / "bird" / "0.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"bird/0.png cannot be opened: No such file"):
        make(tree)[0]


def test_pipes_and_hidden_files_are_left_out(tree):
    os.mkfifo(tree / "bird" / "pipe.png")
    save(tree / "bird" / ".thumb.png")
    save(tree / ".cache" / "x.png")
    assert reds(make(tree)) == [0, 1, 2]


def test_other_files_are_counted(tree):
    (tree / "bird" / "notes.md").touch()
    (tree / "bird" / "README").touch()
    (tree / "bird" / "1 a.txt").touch()
    assert make(tree).index.ignored == {".md": 1, "": 1}


def test_other_image_formats_are_named(tree):
    save(tree / "bird" / "2.gif")
    with pytest.raises(InputError, match=r"2.gif is a GIF file; JPEG, PNG and WebP are read; mend or remove it"):
        make(tree)[1]


def test_nothing_to_read(tmp_path):
    with pytest.raises(InputError, match=r"data.path: there is no folder .*nothing"):
        make(tmp_path / "nothing")
    (tmp_path / "a.csv").touch()
    with pytest.raises(InputError, match=r"data.path: .* has no images, but other files: 1 .csv"):
        make(tmp_path)
    with pytest.raises(InputError, match=r"data.path: there is no folder"):
        make(tmp_path / "a.csv")


def test_skipping_takes_the_next_that_can_be_read(tree, capsys):
    (tree / "bird" / "1 a.png").write_bytes(b"")
    (tree / "bird" / "deep" / "x.webp").write_bytes(b"x")
    with pytest.raises(InputError, match=r"^data: .*1 a.png is empty; mend or remove it, or set data.on_error='skip'$"):
        make(tree)[0]
    source = make(tree, on_error="skip")
    assert reds(source) == [2, 2, 2] and [bool(source[index]["skipped"]) for index in range(3)] == [True, True, False]
    assert int(source[0]["cond"]["label"]) == 1
    assert capsys.readouterr().err.count("1 a.png is empty") == 1  # told once
    (tree / "cät" / "ü.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"data.path: no image in .* can be read"):
        make(tree, on_error="skip")[1]


def test_each_image_has_the_size_of_the_nearest_ratio(tmp_path):
    sizes = {"a": (100, 50), "b": (50, 100), "c": (60, 50), "d": (400, 100)}  # width, height
    for name, size in sizes.items():
        save(tmp_path / "all" / f"{name}.png", size=size)
    turned = Image.Exif()
    turned[0x0112] = 6
    save(tmp_path / "all" / "e.jpg", size=(100, 50), exif=turned)  # shown upright: 50 x 100
    (tmp_path / "all" / "f.png").write_bytes(b"")
    source = make(tmp_path, size=((8, 16), (8, 8), (16, 8)), on_error="skip")
    assert source.buckets.tolist() == [0, 2, 1, 0, 2, 0]
    assert [source[index]["x"].shape[:2] for index in range(5)] == [(8, 16), (16, 8), (8, 8), (8, 16), (16, 8)]
    assert source[5]["x"].shape == (8, 16, 3) and source[5]["skipped"]  # a's, the next of its bucket


def test_the_list_is_kept(tree, monkeypatch):
    make(tree)
    monkeypatch.setattr(file_index, "_walk", None)
    assert reds(make(tree)) == [0, 1, 2]


def test_the_list_is_made_anew_when_files_come_and_go(tree):
    make(tree, size=((8, 8), (8, 16)))
    save(tree / "bird" / "deep" / "y.png", (9, 0, 0), size=(16, 8))
    source = make(tree, size=((8, 8), (8, 16)))
    assert reds(source) == [0, 1, 9, 2] and source.buckets.tolist() == [0, 0, 1, 0]
    (tree / "bird" / "1 a.png").unlink()
    assert reds(make(tree)) == [1, 9, 2]


def test_a_damaged_list_is_made_anew(tree):
    make(tree)
    (tree / ".index" / "index.json").write_text("{")
    assert len(make(tree)) == 3


def test_the_list_may_lie_elsewhere(tree, tmp_path):
    source = make(tree, index=str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "index.json").exists() and not (tree / ".index").exists()
    assert reds(source) == [0, 1, 2]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"data.index: .* cannot be written: .*; give another folder to keep the list"):
        make(tree, index=str(tmp_path / "file" / "x"))


def test_a_worker_maps_the_list_itself(tree):
    """What goes to a worker's process does not grow with the folder."""
    few = len(pickle.dumps(make(tree)))
    for number in range(200):
        (tree / "bird" / f"{number}.png").touch()
    source = make(tree)
    assert len(pickle.dumps(source)) < few + 20
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == 203 and again.index.path(150) == source.index.path(150)


def test_a_large_folder_costs_little(tmp_path):
    """A twentieth of 200,000 files: the list in less than 3 s, its start in less than 0.1 s, 200 bytes an image."""
    for top in range(10):
        folder = tmp_path / f"class {top}"
        folder.mkdir()
        for number in range(1000):
            (folder / f"image {number:06}.png").touch()
    begin = time.perf_counter()
    index = FileIndex(str(tmp_path))
    built = time.perf_counter()
    FileIndex(str(tmp_path))
    kept = time.perf_counter()
    assert len(index) == 10_000 and built - begin < 3 and kept - built < 0.1
    assert sum(array.nbytes for array in (index.paths.data, index.paths.ends, index.labels)) < 200 * len(index)
    assert isinstance(index.paths.data, np.memmap)
