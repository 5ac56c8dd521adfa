"""A sharded data set of decoded and resized examples, written once from any other source, for fast training."""

import contextlib
import dataclasses
import glob
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from diffusion.core import files, images
from diffusion.core.types import ArraySpec, InputError, Source, Spec, class_labels, earlier_kind

FORMAT = 1
INFO = "info.json"
SHARD_BYTES = 1 << 28
LOCATION_KEYWORDS = ("path",)  # see pipeline.location_keywords


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


# Checks for the entries of `info.json`, which may have been downloaded with the data.
_CHECKS = {
    "count": _is_count,
    "num_classes": _is_count,
    "dtype": lambda name: name in ("uint8", "float32"),
    "kind": lambda kind: kind in (None, "image", "latent", "video", "points"),  # older data sets have none
    "shape": lambda shape: isinstance(shape, list) and shape and all(_is_count(size) and size for size in shape),
    "class_names": lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names),
    "low": lambda number: isinstance(number, float | int),
    "high": lambda number: isinstance(number, float | int),
    "captions": lambda has: isinstance(has, bool),
}


class ArrayRecord:
    """Examples with `label` and `caption` if the data set has them and they are requested.

    A record holds `x` in the dtype of the data set, the label as int32 if there are classes, and the caption in UTF-8
    if there are captions, as `info.json` next to the shards states. The uint8 values 0 to 255 stand for -1 to 1.

    Attributes:
      encoder: SHA-256 of the autoencoder whose latents the examples are; None if they are the data themselves.
      decoded_spec: The spec of what the autoencoder decodes them to; `spec` without an autoencoder.
    """

    def __init__(self, path: str, info: Mapping[str, Any], flip: bool, labels: bool, captions: bool):
        self.records = ArrayRecordDataSource(sorted(glob.glob(os.path.join(glob.escape(path), "*.array_record"))))
        self.flip, self.labels, self.captions = flip, labels, captions
        self.dtype, self.labelled = np.dtype(info["dtype"]), bool(info["num_classes"])
        self.class_names = tuple(info["class_names"]) if labels else ()
        x = ArraySpec(tuple(info["shape"]), info["kind"], info["low"], info["high"], info["dtype"])
        self.spec = self.decoded_spec = Spec(x, class_labels(info["num_classes"] if labels else 0), captions)
        self.encoder = info.get("encoder")
        if self.encoder is not None:
            decoded = info["decoded"]
            self.decoded_spec = dataclasses.replace(
                self.spec, x=ArraySpec(**{**decoded, "shape": tuple(decoded["shape"])})
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        record, count = self.records[index], math.prod(self.spec.shape)
        x = np.frombuffer(record, self.dtype, count).reshape(self.spec.shape).copy()
        rest = count * self.dtype.itemsize
        cond = {"label": np.frombuffer(record, "<i4", 1, rest)[0]} if self.labels else {}
        example = {"x": x, "cond": cond}
        return {**example, "caption": record[rest + 4 * self.labelled :].decode()} if self.captions else example

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the example. With `flip`, it is mirrored with probability 1/2."""
        example = self[index]
        return {**example, "x": example["x"][:, ::-1]} if self.flip and rng.random() < 0.5 else example


def make(path: str, flip: bool = False, labels: bool = True, captions: bool = False) -> ArrayRecord:
    """Opens a data set written by `python -m experiments.prepare_data --config=... --out=PATH`.

    Args:
      path: The folder of the data set.
      flip: Whether to mirror half of the images left to right in training.
      labels: Whether to return labels, if the data set has classes.
      captions: Whether to return captions, which the data set must have.
    """
    try:
        with open(os.path.join(path, INFO), encoding="utf-8") as file:
            info = json.load(file)
        version = info["format"]
    except (OSError, ValueError, KeyError, TypeError):
        command = f"python -m experiments.prepare_data --config=... --out={path}"
        raise InputError("path", f"{path} is not a prepared data set; write one: {command}") from None
    if version != FORMAT:
        raise InputError("path", f"{path} must have format {FORMAT}, got {version}; prepare it again")
    invalid = [name for name, is_valid in _CHECKS.items() if not is_valid(info.get(name))]
    if invalid:
        raise InputError("path", f"{os.path.join(path, INFO)} has no valid {invalid[0]!r}; prepare the data set again")
    info.setdefault("kind", earlier_kind(info["shape"], info["low"], info["high"]))
    if captions and not info["captions"]:
        raise InputError("captions", f"{path} has no captions; prepare it again with data.captions=True")
    try:
        found = ArrayRecord(path, info, flip, labels and info["num_classes"] > 0, captions)
    except (TypeError, KeyError, InputError):
        raise InputError(
            "path", f"{os.path.join(path, INFO)} does not describe its latents; encode them again"
        ) from None
    if len(found) != info["count"]:
        raise InputError("path", f"{path} must have {info['count']:,} examples, got {len(found):,}; copy all files")
    return found


def write(source: Source, examples: Iterable[Mapping[str, Any]], out: str) -> int:
    """Writes examples as a data set in a new folder. If writing fails, no folder is left behind.

    Args:
      source: The source of the examples.
      examples: The examples `source[i]`; those with `skipped` are left out.
      out: Path of the new folder.

    Returns:
      The number of examples written.
    """
    spec = source.spec
    check_fits(source)
    dtype = np.dtype(np.uint8 if spec.is_image and (spec.x.low, spec.x.high) == (0, 255) else np.float32)
    each = max(1, SHARD_BYTES // (math.prod(spec.shape) * dtype.itemsize))
    if os.path.exists(out):
        raise InputError("--out", f"{out} already exists; remove it or give another folder")
    parent = files.make_folder(os.path.dirname(os.path.abspath(out)), "--out")
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as folder:
        readable, count = (example for example in examples if not example.get("skipped", False)), 0
        while written := write_shard(folder, count // each, itertools.islice(readable, each), dtype):
            count += written
        write_info(folder, {**describe(source, dataclasses.replace(spec.x, dtype=dtype.name)), "count": count})
        os.chmod(folder, 0o755)
        os.rename(folder, out)
        os.mkdir(folder)  # for TemporaryDirectory to remove
    return count


def check_fits(source: Source) -> None:
    """Checks that records can hold the examples of a source.

    Raises:
      InputError: They have several sizes, or conditions other than a label.
    """
    if hasattr(source, "buckets"):
        raise InputError("data.size", "must be a single size, as all records of a data set have one shape")
    others = source.spec.conditions.keys() - {"label"}
    if others:
        raise InputError("data", f"records hold no condition other than the label, got {', '.join(sorted(others))}")


def describe(source: Source, x: ArraySpec) -> dict[str, Any]:
    """Returns what `info.json` says of the examples of a source whose data are stored as `x`, without their count."""
    spec = source.spec
    return {
        "format": FORMAT,
        "class_names": list(getattr(source, "class_names", ())),
        "num_classes": spec.num_classes,
        "captions": spec.captions,
        **dataclasses.asdict(x),
    }


def write_info(folder: str, info: Mapping[str, Any]) -> None:
    """Writes `info.json`, without which a folder is not a data set."""
    with files.replace(os.path.join(folder, INFO)) as file:
        json.dump(info, file, indent=2)


def write_shard(folder: str, number: int, examples: Iterable[Mapping[str, Any]], dtype: np.dtype) -> int:
    """Writes one shard, which exists only once it is complete, and returns the number of examples; none for 0."""
    path, count = shard_path(folder, number), 0
    writer = ArrayRecordWriter(f"{path}.partial", "group_size:1,uncompressed")
    try:
        for example in examples:
            writer.write(_record(example, dtype))
            count += 1
        writer.close()
        if count:
            os.replace(f"{path}.partial", path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{path}.partial")
    return count


def shard_path(folder: str, number: int) -> str:
    """Returns the path of a shard."""
    return os.path.join(folder, f"{number:05d}.array_record")


def _record(example: Mapping[str, Any], dtype: np.dtype) -> bytes:
    x = example["x"]
    if dtype == np.uint8 and x.dtype != np.uint8:
        x = images.to_uint8(x)
    label = np.array(example["cond"]["label"], "<i4").tobytes() if "label" in example["cond"] else b""
    return x.astype(dtype).tobytes() + label + example.get("caption", "").encode()
