"""Weights that a converted run refers to: they stay in the folder or the file that they were found in."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion.core import trees
from diffusion.core.types import InputError, Params
from diffusion.interop import diffusers_pipeline


def record(path: str, null_class: bool, variant: str | None, digest: str) -> dict[str, Any]:
    """Returns the section `checkpoint.REFERENCE` of a `meta`.

    Args:
      path, null_class, variant: The arguments of `diffusers_pipeline.read`.
      digest: That of the model that it returned.
    """
    return {"path": path, "null_class": null_class, "variant": variant, "sha256": digest}


def check(section: Mapping[str, Any]) -> None:
    """Raises InputError, for `workdir`, if what a section refers to is not there."""
    if not os.path.exists(section["path"]):
        problem = f"refers to the weights in {section['path']}, which is not there"
        raise InputError("workdir", f"{problem}; move it back, or convert it again from where it is now")


def read(section: Mapping[str, Any], like: Params) -> Params:
    """Reads the weights that a section refers to.

    Args:
      section: See `record`.
      like: The parameters, abstract, with the shardings that they will have. One at a time is in the memory of the
        host, in addition to those that stay there.

    Raises:
      InputError: for `workdir`; the weights cannot be read, or are not those that were converted.
    """
    shardings = {path: leaf.sharding for path, leaf in trees.by_path(like).items()}
    path, sha256 = section["path"], section["sha256"]

    def place(name: str, array: np.ndarray) -> jax.Array:
        # `astype` alone would keep the order of the axes in memory, and the transfer copy the array once more.
        return jax.device_put(np.ascontiguousarray(array.astype(np.float32)), shardings[name])

    try:
        model = diffusers_pipeline.read(
            path, null_class=section["null_class"], variant=section["variant"], place=place
        ).model
    except InputError as error:
        raise InputError("workdir", f"its weights in {path} cannot be read ({error}); restore them") from None
    if model.digest != sha256:
        problem = f"(SHA-256 {sha256[:12]}..., got {model.digest[:12]}...)"
        raise InputError("workdir", f"the weights in {path} are not those that were converted {problem}; restore them")
    return model.params
