"""Reads and writes model folders of Hugging Face's libraries: `config.json`, and tensors as safetensors in one file or
in several files with an index."""

import json
import os
from collections.abc import Mapping
from glob import escape, glob
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from diffusion.core import files
from diffusion.core.types import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_json(folder: str, name: str) -> dict[str, Any]:
    """Reads the JSON object in file `name` of a folder. Raises InputError if there is none."""
    path = os.path.join(folder, name)
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


def read_tensors(folder: str) -> dict[str, np.ndarray]:
    """Reads all tensors of a model folder, by name, and converts them to float32.

    Raises:
      InputError: if there are none, if there are only pickles (loading a pickle can run arbitrary code), or if a file
        is corrupt.
    """
    index = f"{WEIGHTS}.index.json"
    if os.path.exists(os.path.join(folder, index)):
        weight_map = read_json(folder, index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError("folder", f"{os.path.join(folder, index)} must contain a weight_map of names to files")
        names = sorted(set(weight_map.values()))
    else:
        names = [os.path.basename(path) for path in sorted(glob(os.path.join(escape(folder), "*.safetensors")))]
        names = [WEIGHTS] if WEIGHTS in names else names[:1]
    if not names:
        pickles = [path for pattern in PICKLES for path in glob(os.path.join(escape(folder), pattern))]
        if pickles:
            problem = (
                f"{pickles[0]} is a pickle, which can run arbitrary code when it is loaded; save the model as "
                "safetensors, by save_pretrained(..., safe_serialization=True)"
            )
        else:
            problem = f"{folder} does not contain {WEIGHTS}"
        raise InputError("folder", problem)
    tensors = {}
    for name in names:
        path = os.path.join(folder, os.path.basename(name))  # an index must not refer to files elsewhere
        try:
            loaded = safetensors.numpy.load_file(path)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise InputError("folder", f"{path} cannot be read: {error}") from None
        tensors |= {key: value.astype(np.float32) for key, value in loaded.items()}
    return tensors


def write(folder: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a model folder. `config.json` is written last, so a folder that contains it is complete."""
    os.makedirs(folder, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with files.replace(os.path.join(folder, WEIGHTS), "wb") as file:
        file.write(safetensors.numpy.save(contiguous, metadata={"format": "pt"}))
    write_json(folder, "config.json", config)


def write_json(folder: str, name: str, content: Mapping[str, Any]) -> None:
    """Writes a JSON object to file `name` of a folder."""
    os.makedirs(folder, exist_ok=True)
    with files.replace(os.path.join(folder, name)) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
