"""A model's folder as Hugging Face's libraries lay it out: `config.json`, and tensors as safetensors in one file or in
several with an index."""

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
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError("folder", f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError("folder", f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError("folder", f"{path} must hold an object")
    return content


def read_tensors(folder: str) -> dict[str, np.ndarray]:
    """All tensors of a model's folder by their names; half precision comes as float32.

    Raises:
      InputError: there are none, or only pickles, which run code when they are read; or a file is damaged.
    """
    index = f"{WEIGHTS}.index.json"
    if os.path.exists(os.path.join(folder, index)):
        places = read_json(folder, index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise InputError("folder", f"{os.path.join(folder, index)} has no weight_map of names to files")
        names = sorted(set(places.values()))
    else:
        names = [os.path.basename(path) for path in sorted(glob(os.path.join(escape(folder), "*.safetensors")))]
        names = [WEIGHTS] if WEIGHTS in names else names[:1]
    if not names:
        pickles = [path for pattern in PICKLES for path in glob(os.path.join(escape(folder), pattern))]
        if pickles:
            problem = (
                f"{pickles[0]} is a pickle, which can run any code when it is read; save the model as safetensors, "
                "by save_pretrained(..., safe_serialization=True)"
            )
        else:
            problem = f"{folder} holds no {WEIGHTS}"
        raise InputError("folder", problem)
    tensors = {}
    for name in names:
        path = os.path.join(folder, os.path.basename(name))  # an index cannot point out of the folder
        try:
            read = safetensors.numpy.load_file(path)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise InputError("folder", f"{path} cannot be read: {error}") from None
        tensors |= {key: value.astype(np.float32) for key, value in read.items()}
    return tensors


def write(folder: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a model's folder; the configuration comes last, so a folder that has one is whole."""
    os.makedirs(folder, exist_ok=True)
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with files.replace(os.path.join(folder, WEIGHTS), "wb") as file:
        file.write(safetensors.numpy.save(whole, metadata={"format": "pt"}))
    write_json(folder, "config.json", config)


def write_json(folder: str, name: str, content: Mapping[str, Any]) -> None:
    os.makedirs(folder, exist_ok=True)
    with files.replace(os.path.join(folder, name)) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
