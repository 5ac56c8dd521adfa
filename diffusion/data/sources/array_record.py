"""A sharded set of our own, written once from any other source: decoded and resized, for fast training."""

import dataclasses
import glob
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from diffusion.core import files
from diffusion.core.types import InputError, Source, Spec

FORMAT = 1
INFO = "info.json"
SHARD_BYTES = 1 << 28


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


# What `info.json` must hold, for it may come from elsewhere.
_KINDS = {
    "count": _is_count,
    "num_classes": _is_count,
    "dtype": lambda name: name in ("uint8", "float32"),
    "shape": lambda shape: isinstance(shape, list) and shape and all(_is_count(size) and size for size in shape),
    "class_names": lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names),
    "low": lambda number: isinstance(number, float | int),
    "high": lambda number: isinstance(number, float | int),
    "captions": lambda has: isinstance(has, bool),
}


class ArrayRecord:
    """Examples with `label` and `caption` where the set has them and they are asked for.

    A record is `x` as the set's dtype, the label as int32 if there are classes, and the caption in UTF-8: `info.json`
    beside the shards says which. uint8 stands for -1 to 1.
    """

    def __init__(self, path: str, info: Mapping[str, Any], flip: bool, labels: bool, captions: bool):
        self.records = ArrayRecordDataSource(sorted(glob.glob(os.path.join(glob.escape(path), "*.array_record"))))
        self.flip, self.labels, self.captions = flip, labels, captions
        self.dtype, self.labelled = np.dtype(info["dtype"]), bool(info["num_classes"])
        self.class_names = tuple(info["class_names"]) if labels else ()
        num_classes = info["num_classes"] if labels else 0
        self.spec = Spec(tuple(info["shape"]), num_classes, info["low"], info["high"], captions)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} examples, no number {index}")
        record, count = self.records[index], math.prod(self.spec.shape)
        x = np.frombuffer(record, self.dtype, count).reshape(self.spec.shape)
        x = x / np.float32(127.5) - np.float32(1) if self.dtype == np.uint8 else x.copy()
        rest = count * self.dtype.itemsize
        cond = {"label": np.frombuffer(record, "<i4", 1, rest)[0]} if self.labels else {}
        example = {"x": x, "cond": cond}
        return {**example, "caption": record[rest + 4 * self.labelled :].decode()} if self.captions else example

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The example, mirrored half of the time if `flip`."""
        example = self[index]
        return {**example, "x": example["x"][:, ::-1]} if self.flip and rng.random() < 0.5 else example


def make(path: str, flip: bool = False, labels: bool = True, captions: bool = False) -> ArrayRecord:
    """A set that `python -m experiments.prepare_data --config=... --out=PATH` has written.

    Args:
      path: of its folder.
      flip: mirror half of the images left to right in training.
      labels: whether to give them, if the set has classes.
      captions: whether to give them; the set must have them.
    """
    try:
        with open(os.path.join(path, INFO), encoding="utf-8") as file:
            info = json.load(file)
        version = info["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError("path", f"{path} is no prepared set; write one: python -m experiments.prepare_data --config=... "
                         f"--out={path}") from None  # fmt: skip
    if version != FORMAT:
        raise InputError("path", f"{path} has format {version}; this code reads {FORMAT}; prepare it anew")
    bad = [name for name, sound in _KINDS.items() if not sound(info.get(name))]
    if bad:
        raise InputError("path", f"{os.path.join(path, INFO)} has no sound {bad[0]!r}; prepare the set anew")
    if captions and not info["captions"]:
        raise InputError("captions", f"{path} has none; prepare it anew with data.captions=True")
    found = ArrayRecord(path, info, flip, labels and info["num_classes"] > 0, captions)
    if len(found) != info["count"]:
        raise InputError("path", f"{path} has {len(found):,} examples of {info['count']:,}; copy all of it")
    return found


def write(source: Source, examples: Iterable[Mapping[str, Any]], out: str) -> int:
    """Writes examples as a set in a new folder, which is there whole or not at all.

    Args:
      source: that they are from.
      examples: `source[i]` each; those with `skipped` are left out.

    Returns:
      How many were written.
    """
    spec = source.spec
    if hasattr(source, "buckets"):
        raise InputError("data.size", "is several; a set of array records has one")
    dtype = np.dtype(np.uint8 if spec.is_image and (spec.low, spec.high) == (0, 255) else np.float32)
    each = max(1, SHARD_BYTES // (math.prod(spec.shape) * dtype.itemsize))
    if os.path.exists(out):
        raise InputError("--out", f"{out} is there already; remove it or give another folder")
    parent = files.make_folder(os.path.dirname(os.path.abspath(out)), "--out")
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as folder:
        writer, count = None, 0
        for example in examples:
            if example.get("skipped", False):
                continue
            if count % each == 0:
                if writer:
                    writer.close()
                name = os.path.join(folder, f"{count // each:05d}.array_record")
                writer = ArrayRecordWriter(name, "group_size:1,uncompressed")
            writer.write(_record(example, dtype))
            count += 1
        if writer:
            writer.close()
        info = {
            "format": FORMAT,
            "count": count,
            "dtype": dtype.name,
            "class_names": getattr(source, "class_names", ()),
            **dataclasses.asdict(spec),
        }
        with files.replace(os.path.join(folder, INFO)) as file:
            json.dump(info, file, indent=2)
        os.chmod(folder, 0o755)
        os.rename(folder, out)
        os.mkdir(folder)  # which the context removes
    return count


def _record(example: Mapping[str, Any], dtype: np.dtype) -> bytes:
    x = np.asarray(example["x"], np.float32)
    if dtype == np.uint8:
        x = np.round((x + 1) * 127.5).clip(0, 255)
    label = np.array(example["cond"]["label"], "<i4").tobytes() if "label" in example["cond"] else b""
    return x.astype(dtype).tobytes() + label + example.get("caption", "").encode()
