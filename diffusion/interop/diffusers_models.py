"""Converts between networks of this library and models of diffusers: `networks.unet` and `UNet2DModel`,
`networks.unet_text` and `UNet2DConditionModel`, `networks.dit` and `DiTTransformer2DModel`, or with a text
`PixArtTransformer2DModel` (both `Transformer2DModel` before diffusers 0.29). Names and conventions are those of
diffusers 0.42.

A model is a folder with `config.json` and safetensors. A pipeline consists of such a folder, a folder for the noise
schedule, and `model_index.json`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from diffusion.core import model_folder, tensor_file, tensors
from diffusion.core.build import build_network, defaults, find
from diffusion.core.tensors import Pair
from diffusion.core.types import InputError, Network, Params, Spec
from diffusion.interop import diffusers_dit, diffusers_pixart, diffusers_unet, diffusers_unet_text

Place = Callable[[str, np.ndarray], Any]
Weights = Literal["read", "checked", "named"]

_CLASSES = {
    "UNet2DModel": diffusers_unet,
    "UNet2DConditionModel": diffusers_unet_text,
    "DiTTransformer2DModel": diffusers_dit,
    "PixArtTransformer2DModel": diffusers_pixart,
    "Transformer2DModel": diffusers_dit,  # or PixArt
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its weights.

    Attributes:
      network: The section `network` of a config, `{"name": "unet", ...}`.
      spec: The specification of the data. The range of the raw values is not known and has its default.
      params: The parameters, float32, or their shapes.
      digest: SHA-256 of the tensors that they were read from; empty if none were read.
      built: The network that `network` describes, if it has been built.
      text_encoder: The parameters of a text encoder that was trained with the network, or None.
    """

    network: Mapping[str, Any]
    spec: Spec
    params: Params
    digest: str = ""
    built: Network | None = None
    text_encoder: Params | None = None


def read(
    path: str, *, null_class: bool = False, variant: str | None = None, text_length: int | None = None,
    weights: Weights = "read", place: Place | None = None,
) -> Model:  # fmt: skip
    """Reads a model folder.

    The parameters are read one after the other from the mapped files.

    Args:
      path: The folder.
      null_class: Whether the last row of a U-Net's table of classes is the null class.
      variant: The variant of the weights; see `model_folder.read_tensors`.
      text_length: The number of tokens of a text, which no folder has; None for that of the model: 120 for
        PixArt-alpha, 77 for Stable Diffusion.
      weights: `read`: read the parameters. Otherwise their shapes are returned, after checking the names and shapes of
        the tensors (`named`), and in addition all numbers for their digest (`checked`).
      place: Called with the path of each parameter and its array, a view of the file in the dtype of the file if that
        is possible; what it returns becomes the parameter. None: NumPy arrays, float32.

    Raises:
      InputError: if the folder cannot be read, the model is not supported, or a tensor is missing, unknown, of the
        wrong shape or not finite.
    """
    config = model_folder.read_json(path, "config.json")
    kind = config.get("_class_name")
    if kind not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise InputError("folder", f"{path} contains a {kind}; only these models can be read: {known}")
    found = model_folder.open_tensors(path, variant)
    foreign = {tensors.current_name(name): tensor for name, tensor in found.items()}
    converter = _CLASSES[kind]
    if kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
        converter = diffusers_pixart
    network, spec = converter.network_of(config, foreign, null_class)
    if text_length is not None:
        texts = {name: dataclasses.replace(condition, shape=(text_length, *condition.shape[1:]))
                 for name, condition in spec.conditions.items() if condition.kind == "text"}  # fmt: skip
        spec = dataclasses.replace(spec, conditions={**spec.conditions, **texts})
    try:
        built = build_network(network, spec, field="config.json")
    except InputError as error:
        field = error.field.removeprefix("config.json.")
        raise InputError(f"config.json.{converter.NAMES.get(field, field)}", error.problem) from None
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    tensors.check(pairs(network, spec), foreign, shapes)
    digest = "" if weights == "named" else tensor_file.digest(foreign)
    if weights != "read":
        return Model(network, spec, shapes, digest, built)
    place = place or (lambda path, array: array.astype(np.float32))
    params = tensors.to_native(pairs(network, spec), foreign, shapes, place)
    return Model(network, spec, params, digest, built)


def write(path: str, model: Model) -> str:
    """Writes a model folder and returns the name of its class. Raises InputError naming the option that diffusers'
    model does not support."""
    config = _converter(model.network, model.spec).config_of(with_defaults(model.network), model.spec, model.params)
    model_folder.write(path, config, tensors.to_foreign(pairs(model.network, model.spec), model.params))
    return config["_class_name"]


def with_defaults(network: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section `network` of a config with the default of every option that it does not set."""
    make = find("networks", network["name"], field="network.name")
    return defaults(make, later=("shape", "num_classes", "conditions")) | dict(network)


def pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    """Returns the table of arrays and tensors of a network."""
    return _converter(network, spec).pairs(with_defaults(network), spec)


def _converter(network: Mapping[str, Any], spec: Spec) -> ModuleType:
    """Returns the module that converts a network, whose class in diffusers may depend on the data."""
    has_text = any(condition.kind == "text" for condition in spec.conditions.values())
    converters = {"unet": diffusers_unet, "unet_text": diffusers_unet_text,
                  "dit": diffusers_pixart if has_text else diffusers_dit}  # fmt: skip
    name = network["name"]
    if name not in converters:
        known = ", ".join(converters)
        raise InputError("network.name", f"must be among {known} to be written for diffusers, got {name!r}")
    return converters[name]
