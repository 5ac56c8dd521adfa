"""Prepared data sets: written from any source and read back unchanged."""

import json
import os
import pickle

import numpy as np
import pytest

from diffusion.core import images
from diffusion.core.build import build
from diffusion.core.types import ArraySpec, InputError, Spec, class_labels
from diffusion.data import records
from tests.refusals import refused

RNG = np.random.default_rng(0)


class Examples:
    """8-bit images with labels, class names, captions and skipped examples."""

    spec = Spec(ArraySpec((4, 6, 3), dtype="uint8"), class_labels(3, ("a", "b", "ç")), captions=True)

    def __init__(self, size=7, skipped=()):
        self.pixels, self.skipped = RNG.integers(0, 256, (size, 4, 6, 3), np.uint8), skipped

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        example = {
            "x": self.pixels[index],
            "cond": {"label": np.int32(index % 3)},
            "caption": f"naïve {index}" * (index % 2),
        }
        return {**example, "skipped": np.bool_(index in self.skipped)}


def write(source, out):
    return records.write(source, (source[index] for index in range(len(source))), str(out))


def read(path, **keywords):
    return build("data", {"name": "array_record", "path": str(path), **keywords})


def test_read_back_as_written(tmp_path):
    source = Examples()
    assert write(source, tmp_path / "set") == 7
    found = read(tmp_path / "set", captions=True)
    assert found.spec == source.spec and len(found) == 7 and found.spec.class_names == source.spec.class_names
    for index in range(7):
        example, expected = found[index], source[index]
        np.testing.assert_array_equal(example["x"], expected["x"])
        assert example["x"].dtype == found.spec.x.dtype == "uint8" and example["x"].flags.writeable
        assert example["cond"]["label"] == expected["cond"]["label"] and example["cond"]["label"].dtype == np.int32
        assert example["caption"] == expected["caption"]


def test_labels_and_captions_are_optional(tmp_path):
    write(Examples(), tmp_path / "set")
    found = read(tmp_path / "set", labels=False)
    assert found[1].keys() == {"x", "cond"} and found[1]["cond"] == {} and found.spec == Spec(ArraySpec((4, 6, 3)))
    np.testing.assert_array_equal(found[3]["x"], read(tmp_path / "set")[3]["x"])
    assert read(tmp_path / "set", labels=False, captions=True)[3]["caption"] == "naïve 3"


def test_float_images_are_stored_in_8_bits(tmp_path):
    source = build("data", {"name": "shapes", "length": 2})
    write(source, tmp_path / "set")
    found = read(tmp_path / "set")
    assert found.spec == source.spec and found.spec.x.dtype == "uint8"
    np.testing.assert_array_equal(found[1]["x"], images.to_uint8(source[1]["x"]))


@pytest.mark.parametrize("name", ["digits", "toy"])
def test_other_numbers_are_stored_exactly(tmp_path, name):
    source = build("data", {"name": name, **({"size": 50} if name == "toy" else {})})
    write(source, tmp_path / "set")
    found = read(tmp_path / "set")
    assert found.spec == source.spec
    for index in (0, 3, len(source) - 1):
        np.testing.assert_array_equal(found[index]["x"], source[index]["x"])
    assert found[0]["x"].flags.writeable


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 3 * 4 * 6 * 3)
    source = Examples()
    write(source, tmp_path / "set")
    assert sorted(os.listdir(tmp_path / "set")) == [f"0000{n}.array_record" for n in range(3)] + ["info.json"]
    found = read(tmp_path / "set")
    for index in range(7):
        np.testing.assert_array_equal(found[index]["x"], source[index]["x"])


def test_skipped_examples_are_left_out(tmp_path):
    source = Examples(skipped=(0, 4))
    assert write(source, tmp_path / "set") == 5
    found = read(tmp_path / "set")
    np.testing.assert_array_equal([e["x"] for e in found], [source[index]["x"] for index in (1, 2, 3, 5, 6)])


def test_images_are_mirrored_in_training_only(tmp_path):
    source = Examples()
    write(source, tmp_path / "set")
    found, plain = read(tmp_path / "set", flip=True), source[2]["x"]
    np.testing.assert_array_equal(found[2]["x"], plain)
    drawn = [found.draw(2, np.random.default_rng(seed))["x"] for seed in range(200)]
    mirrored = [np.array_equal(x, plain[:, ::-1]) for x in drawn]
    assert 70 < sum(mirrored) < 130 and all(m or np.array_equal(x, plain) for m, x in zip(mirrored, drawn, strict=True))
    for seed in range(5):
        np.testing.assert_array_equal(read(tmp_path / "set").draw(2, np.random.default_rng(seed))["x"], plain)


def test_pickling(tmp_path):
    write(Examples(), tmp_path / "set")
    found = read(tmp_path / "set")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found))[5]["x"], found[5]["x"])


@pytest.mark.parametrize("index", [-1, 7])
def test_index_out_of_range(tmp_path, index):
    write(Examples(), tmp_path / "set")
    with pytest.raises(IndexError):
        read(tmp_path / "set")[index]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    class Breaks(Examples):
        def __getitem__(self, index):
            if index == 3:
                raise InputError("data", "broken")
            return super().__getitem__(index)

    with refused("data"):
        write(Breaks(), tmp_path / "set")
    assert os.listdir(tmp_path) == []
    write(Examples(), tmp_path / "set")
    with refused("--out"):
        write(Examples(), tmp_path / "set")


def test_bad_data_sets(tmp_path):
    with refused("data.path"):
        read(tmp_path / "set")
    write(Examples(), tmp_path / "set")
    info = tmp_path / "set" / "info.json"
    stored = json.loads(info.read_text())
    for changed in ({**stored, "count": 9}, {**stored, "format": 2}, {**stored, "dtype": "int32"}, []):
        info.write_text(json.dumps(changed))
        with refused("data.path"):
            read(tmp_path / "set")
    info.write_text(json.dumps({**stored, "captions": False}))
    with refused("data.captions"):
        read(tmp_path / "set", captions=True)


def test_damaged_files(tmp_path):
    """Files that are not records are reported when the data set is opened, and a flipped bit by its example."""
    source = Examples()
    write(source, tmp_path / "set")
    file, info = tmp_path / "set" / "00000.array_record", tmp_path / "set" / "info.json"
    whole, stored = file.read_bytes(), json.loads(info.read_text())
    for data in (b"", whole[: len(whole) // 2], b"x" * len(whole), whole[:-10]):
        file.write_bytes(data)
        with refused("data.path") as caught:
            read(tmp_path / "set")
        assert str(tmp_path / "set") in caught.value.problem
    flipped = bytearray(whole)
    flipped[whole.index(source.pixels[3].tobytes())] ^= 255
    file.write_bytes(flipped)
    damaged = read(tmp_path / "set")
    with refused("data") as caught:
        damaged[3]
    assert "example 3" in caught.value.problem
    file.write_bytes(whole)
    for change in ({"shape": [4, 7, 3]}, {"shape": [4, 5, 3]}, {"num_classes": 2, "class_names": []}):
        info.write_text(json.dumps({**stored, **change}))
        with refused("data"):
            read(tmp_path / "set")[2]
    info.write_text(json.dumps({**stored, "class_names": ["a"]}))
    with refused("data.path"):
        read(tmp_path / "set")


def test_several_sizes_are_refused(tmp_path):
    source = Examples()
    source.buckets = np.zeros(7, np.int32)
    with refused("data.size"):
        write(source, tmp_path / "set")
