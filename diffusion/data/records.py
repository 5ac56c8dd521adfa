"""Writes array records: shards of examples, and `info.json`, which describes them.

`data.sources.array_record` reads them.
"""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from diffusion.core import files, images
from diffusion.core.types import ArraySpec, InputError, Source
from diffusion.data import text_records
from diffusion.data.pipeline import is_encoded

FORMAT = 1
INFO = "info.json"
SHARD_BYTES = 1 << 28


def write(source: Source, examples: Iterable[Mapping[str, Any]], out: str, num: int = 0) -> int:
    """Writes examples as a data set in a new folder. If writing fails, no folder is left behind.

    Args:
      source: The source of the examples.
      examples: The examples `source[i]`; those with `skipped` are left out.
      out: Path of the new folder.
      num: Number of examples, if it is known, to check in advance whether there is space for them.

    Returns:
      The number of examples written.
    """
    spec = source.spec
    check_fits(source)
    dtype = np.dtype(np.uint8 if spec.is_image and (spec.x.low, spec.x.high) == (0, 255) else np.float32)
    each = max(1, SHARD_BYTES // (math.prod(spec.shape) * dtype.itemsize))
    if os.path.exists(out):
        raise InputError("--out", f"{out} already exists; remove it or give another folder")
    with files.new_folder(out, "--out", num * math.prod(spec.shape) * dtype.itemsize) as folder:
        readable, count = (example for example in examples if not example.get("skipped", False)), 0
        while written := write_shard(folder, count // each, itertools.islice(readable, each), dtype):
            count += written
        write_info(folder, {**describe(source, dataclasses.replace(spec.x, dtype=dtype.name)), "count": count})
    return count


def check_fits(source: Source) -> None:
    """Checks that records can hold the examples of a source.

    Raises:
      InputError: They have several sizes, or conditions other than a label, or were encoded in advance.
    """
    if is_encoded(source):
        raise InputError("data", "has been encoded already; give the images, or copy its folder")
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
        "class_names": list(spec.class_names),
        "num_classes": spec.num_classes,
        "captions": spec.captions,
        **dataclasses.asdict(x),
    }


def write_info(folder: str, info: Mapping[str, Any]) -> None:
    """Writes `info.json`, without which a folder is not a data set."""
    files.write_json(os.path.join(folder, INFO), info)


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


def read_shard(path: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields the data of the examples of a shard of float32 arrays of a shape."""
    shard = ArrayRecordDataSource([path])
    for index in range(len(shard)):
        yield np.frombuffer(shard[index], "<f4", math.prod(shape)).reshape(shape)


def shard_path(folder: str, number: int) -> str:
    """Returns the path of a shard."""
    return os.path.join(folder, f"{number:05d}.array_record")


def _record(example: Mapping[str, Any], dtype: np.dtype) -> bytes:
    x = example["x"]
    if dtype == np.uint8 and x.dtype != np.uint8:
        x = images.to_uint8(x)
    label = np.array(example["cond"]["label"], "<i4").tobytes() if "label" in example["cond"] else b""
    texts = text_records.packed(example["texts"]) if "texts" in example else b""
    return x.astype(dtype).tobytes() + label + texts + example.get("caption", "").encode()
