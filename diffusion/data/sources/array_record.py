"""A sharded data set of decoded and resized examples, written once from any other source, for fast training."""

import dataclasses
import glob
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from diffusion.core.types import ArraySpec, InputError, Spec, class_labels, earlier_kind
from diffusion.data import text_records
from diffusion.data.captions import captions_of
from diffusion.data.records import FORMAT, INFO

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
    if there are captions, as `info.json` next to the shards states. The uint8 values 0 to 255 stand for -1 to 1. In a
    data set of `experiments.encode`, x is what `Autoencoder.posterior` returns, and where a text encoder has encoded
    the captions, these are the condition `text`.

    Attributes:
      encoder: SHA-256 of the autoencoder that has encoded the examples; None if they are the data themselves.
      text_encoder: Likewise of the text encoder; None if the captions are not read, or are not encoded.
      decoded_spec: The spec of what the autoencoder decodes them to; `spec` without an autoencoder.
    """

    def __init__(self, path: str, info: Mapping[str, Any], flip: bool, labels: bool, captions: bool):
        self.path = path
        self.records = ArrayRecordDataSource(sorted(glob.glob(os.path.join(glob.escape(path), "*.array_record"))))
        self.flip, self.labels, self.captions = flip, labels, captions
        self.dtype, self.labelled, self.captioned = np.dtype(info["dtype"]), bool(info["num_classes"]), info["captions"]
        x = ArraySpec(tuple(info["shape"]), info["kind"], info["low"], info["high"], info["dtype"])
        labelled = class_labels(info["num_classes"], info["class_names"]) if labels else {}
        self.spec = self.decoded_spec = Spec(x, labelled, captions)
        self.text = info.get("text")
        self.text_encoder = self.text["encoder"] if self.text and captions else None
        self.encoder = info.get("encoder")
        if self.encoder is not None:
            decoded = info["decoded"]
            self.decoded_spec = dataclasses.replace(
                self.spec, x=ArraySpec(**{**decoded, "shape": tuple(decoded["shape"])})
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._example(index, None)

    def caption(self, index: int) -> str:
        """Returns the first caption of an example whose captions are encoded."""
        return captions_of(self._read(index))[0]

    def _example(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """Returns an example, with one of its encoded texts: the first without `rng`."""
        example = self._read(index)
        if self.text_encoder is None:
            return example
        texts, cond = example["texts"], example["cond"]
        chosen = 0 if rng is None or len(texts) == 1 else rng.integers(len(texts))
        return {"x": example["x"], "cond": {**cond, "text": texts[chosen]}}

    def _read(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        try:
            return self._decoded(self.records[index])
        except Exception as error:  # the reader raises errors of many types
            problem = f"example {index} of {self.path} cannot be read: {error}"
            raise InputError("data", f"{problem}; copy its files again, or prepare it again") from None

    def _decoded(self, record: bytes) -> dict[str, Any]:
        count = math.prod(self.spec.shape)
        size = count * self.dtype.itemsize + 4 * self.labelled
        if len(record) < size or (len(record) > size and not self.captioned):
            raise ValueError(f"it has {len(record):,} bytes instead of {size:,}")
        x = np.frombuffer(record, self.dtype, count).reshape(self.spec.shape).copy()
        rest = count * self.dtype.itemsize
        cond = {"label": np.frombuffer(record, "<i4", 1, rest)[0]} if self.labels else {}
        if self.labels and not 0 <= cond["label"] < self.spec.num_classes:
            raise ValueError(f"it has the label {cond['label']}, of {self.spec.num_classes} classes")
        example, rest = {"x": x, "cond": cond}, rest + 4 * self.labelled
        if not self.captions:
            return example
        if self.text is not None:
            example["texts"], rest = text_records.unpacked(record, rest, self.text)
        return {**example, "caption": record[rest:].decode()}

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the example, with one of its encoded texts. With `flip`, it is mirrored with probability 1/2."""
        example = self._example(index, rng)
        return {**example, "x": example["x"][:, ::-1]} if self.flip and rng.random() < 0.5 else example


def make(path: str, flip: bool = False, labels: bool = True, captions: bool = False) -> ArrayRecord:
    """Opens a data set written by `experiments.prepare_data --out=PATH` or `experiments.encode --out=PATH`.

    Args:
      path: The folder of the data set.
      flip: Whether to mirror half of the images left to right in training. Latents cannot be mirrored.
      labels: Whether to return labels, if the data set has classes.
      captions: Whether to return captions, or the text in their place if they are encoded. The data set must have
        them.
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
    if len(info["class_names"]) not in (0, info["num_classes"]):
        problem = f"has {len(info['class_names'])} names of {info['num_classes']} classes"
        raise InputError("path", f"{os.path.join(path, INFO)} {problem}; prepare the data set again")
    if "encoder" in info and "latents" not in info:
        raise InputError("path", f"{path} holds latents without their posteriors, as of an earlier version; encode the "
                         "images again")  # fmt: skip
    if flip and info["kind"] == "latent":
        problem = f"must be False, as {path} holds latents, and a mirrored latent is not that of the mirrored image"
        raise InputError("flip", f"{problem}; encode the mirror images too: experiments.encode --flip")
    if captions and not info["captions"]:
        raise InputError("captions", f"{path} has no captions; prepare it again with data.captions=True")
    try:
        found = ArrayRecord(path, info, flip, labels and info["num_classes"] > 0, captions)
    except (TypeError, KeyError, InputError):
        raise InputError(
            "path", f"{os.path.join(path, INFO)} does not describe its latents; encode them again"
        ) from None
    except Exception as error:  # the reader raises errors of many types
        raise InputError("path", f"{path} has a file that cannot be read: {error}; copy all files again") from None
    if len(found) != info["count"]:
        raise InputError("path", f"{path} must have {info['count']:,} examples, got {len(found):,}; copy all files")
    return found
