"""Reads and writes model folders of Hugging Face's libraries: `config.json`, and tensors as safetensors in one file or
in several files with an index.

A part of a single file of Stable Diffusion (`single_file`) is read like a folder, by its path: `sd.safetensors/unet`.
"""

import json
import os
import re
from collections.abc import Mapping
from glob import escape, glob
from typing import Any

import numpy as np

from diffusion.core import files, single_file, tensor_file
from diffusion.core.types import InputError

VERSION = "0.42.1"  # of diffusers, recorded in the files that are written
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_json(folder: str, name: str) -> dict[str, Any]:
    """Reads the JSON object in file `name` of a folder. Raises InputError if there is none."""
    path = os.path.join(folder, name)
    if found := single_file.split(folder):
        file, part = single_file.read(found[0]), found[1]
        return file.config(part or name.removesuffix(".json"))
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError("folder", f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError("folder", f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError("folder", f"{path} must contain a JSON object")
    return content


def names(folder: str) -> list[str]:
    """Returns the names of what is in a folder; none if there is no folder."""
    if found := single_file.split(folder):
        return single_file.read(found[0]).names(found[1])
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def read_tensors(folder: str, variant: str | None = None) -> dict[str, np.ndarray]:
    """Reads all tensors of a model folder of diffusers, by name, and converts them to float32.

    Args:
      folder, variant: See `open_tensors`.

    Raises:
      InputError: See `open_tensors`; or a number is not finite.
    """
    return tensor_file.to_float32(open_tensors(folder, variant))


def open_tensors(folder: str, variant: str | None = None, weights: str = WEIGHTS) -> dict[str, np.ndarray]:
    """Returns all tensors of a model folder, by name, as views of its files in the dtypes that they are stored with.

    Args:
      folder: The folder, or a part of a single file.
      variant: The variant of the weights, such as `fp16` in `diffusion_pytorch_model.fp16.safetensors`. None: the
        weights without a variant, or the only ones.
      weights: The name of the file of the weights, if they are in one file and have no variant. The index of several
        files is `WEIGHTS.index.json`, and that of a variant `WEIGHTS.index.VARIANT.json`.

    Raises:
      InputError: if there are none, if there are only pickles (loading a pickle can run arbitrary code), if there are
        several variants to choose from, or if a file is corrupt or a pointer of Git LFS.
    """
    if found := single_file.split(folder):
        if variant is not None:
            raise InputError("variant", f"must be None: the file {found[0]} has no variants")
        return single_file.read(found[0]).tensors(found[1])
    tensors = {}
    for name in _weight_files(folder, variant, weights):
        tensors |= tensor_file.read(os.path.join(folder, name), "folder")
    return tensors


def _weight_files(folder: str, variant: str | None, weights: str) -> list[str]:
    """Returns the names of the safetensors files of a variant."""
    found = _variants(folder, weights)
    others = sorted(os.path.basename(path) for path in glob(os.path.join(escape(folder), "*.safetensors")))
    if not found and len(others) == 1:
        found[None] = others
    if variant in found:
        return found[variant]
    if variant is None and len(found) == 1:
        return next(iter(found.values()))
    if found:
        known = ", ".join(str(name) for name in found if name) or "none"
        problem = f"has no variant {variant!r}" if variant else "has several variants of the weights, and none without"
        raise InputError("folder", f"{folder} {problem}; choose the variant among: {known}")
    pickles = [path for pattern in PICKLES for path in glob(os.path.join(escape(folder), pattern))]
    if pickles:
        raise InputError("folder", f"{pickles[0]} is a pickle, which can run arbitrary code when it is loaded; save "
                         "the model as safetensors, by save_pretrained(..., safe_serialization=True)")  # fmt: skip
    if others:
        raise InputError("folder", f"{folder} has {len(others)} safetensors files and no index, {weights}.index.json")
    raise InputError("folder", f"{folder} does not contain {weights}")


def has_variant(folder: str, variant: str | None, weights: str = WEIGHTS) -> bool:
    """Returns whether a model folder has a variant of the weights; see `open_tensors`."""
    return variant in _variants(folder, weights)


def _variants(folder: str, weights: str) -> dict[str | None, list[str]]:
    """Returns the names of the files of each variant of the weights."""
    stem = re.escape(weights.removesuffix(".safetensors"))
    names = sorted(os.path.basename(path) for path in glob(os.path.join(escape(folder), "*")))
    found: dict[str | None, list[str]] = {}
    for name in names:
        if match := re.fullmatch(rf"{stem}(?:\.([^.-]+))?\.safetensors", name):
            found.setdefault(match[1], [name])
    for name in names:
        if match := re.fullmatch(rf"{stem}\.safetensors\.index(?:\.([^.]+))?\.json", name):
            found[match[1]] = _shards(folder, name)
    return found


def _shards(folder: str, index: str) -> list[str]:
    """Returns the names of the files that an index lists. Raises InputError for one outside of the folder."""
    weight_map, path = read_json(folder, index).get("weight_map"), os.path.join(folder, index)
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError("folder", f"{path} must contain a weight_map of names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
            raise InputError("folder", f"{path} lists {name!r}; it must list files in the same folder, without a path")
    return names


def write(folder: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], weights: str = WEIGHTS) -> None:
    """Writes a model folder, with the tensors in the file `weights`.

    `config.json` is written last, so a folder that contains it is complete.
    """
    os.makedirs(folder, exist_ok=True)
    tensor_file.write(os.path.join(folder, weights), tensors, None, {"format": "pt"})
    write_json(folder, "config.json", config)


def write_json(folder: str, name: str, content: Mapping[str, Any]) -> None:
    """Writes a JSON object to file `name` of a folder."""
    os.makedirs(folder, exist_ok=True)
    with files.replace(os.path.join(folder, name)) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
