"""Converts between networks of this library and models of diffusers: `networks.unet` and `UNet2DModel`, `networks.dit`
and `DiTTransformer2DModel` (`Transformer2DModel` before diffusers 0.29). Names and conventions are those of diffusers
0.42.

A model is a folder with `config.json` and safetensors. A pipeline consists of such a folder, a folder for the noise
schedule, and `model_index.json`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from diffusion.core import model_folder, tensors
from diffusion.core.build import build_network, defaults, find
from diffusion.core.tensors import Pair
from diffusion.core.types import InputError, Params, Spec
from diffusion.interop import diffusers_dit, diffusers_unet

_NETWORKS = {"unet": diffusers_unet, "dit": diffusers_dit}
_CLASSES = {"UNet2DModel": "unet", "DiTTransformer2DModel": "dit", "Transformer2DModel": "dit"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its weights.

    Attributes:
      network: The section `network` of a config, `{"name": "unet", ...}`.
      spec: The specification of the data. The range of the raw values is not known and has its default.
      params: The parameters, float32.
    """

    network: Mapping[str, Any]
    spec: Spec
    params: Params


def read(path: str, *, null_class: bool = False, variant: str | None = None) -> Model:
    """Reads a model folder.

    Args:
      path: The folder.
      null_class: Whether the last row of a U-Net's table of classes is the null class.
      variant: The variant of the weights; see `model_folder.read_tensors`.

    Raises:
      InputError: if the folder cannot be read, the model is not supported, or a tensor is missing, unknown or of the
        wrong shape.
    """
    config = model_folder.read_json(path, "config.json")
    kind = config.get("_class_name")
    if kind not in _CLASSES:
        raise InputError("folder", f"{path} contains a {kind}; only UNet2DModel and DiTTransformer2DModel can be read")
    foreign = {tensors.current_name(name): tensor for name, tensor in model_folder.read_tensors(path, variant).items()}
    converter = _NETWORKS[_CLASSES[kind]]
    network, spec = converter.network_of(config, foreign, null_class)
    try:
        built = build_network(network, spec, field="config.json")
    except InputError as error:
        field = error.field.removeprefix("config.json.")
        raise InputError(f"config.json.{converter.NAMES.get(field, field)}", error.problem) from None
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    return Model(network, spec, tensors.to_native(pairs(network, spec), foreign, shapes))


def write(path: str, model: Model) -> None:
    """Writes a model folder. Raises InputError naming the option that diffusers' model does not support."""
    name = model.network["name"]
    if name not in _NETWORKS:
        raise InputError("network.name", f"must be 'unet' or 'dit' to be written for diffusers, got {name!r}")
    config = _NETWORKS[name].config_of(with_defaults(model.network), model.spec, model.params)
    model_folder.write(path, config, tensors.to_foreign(pairs(model.network, model.spec), model.params))


def with_defaults(network: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section `network` of a config with the default of every option that it does not set."""
    make = find("networks", network["name"], field="network.name")
    return defaults(make, later=("shape", "num_classes", "conditions")) | dict(network)


def pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    """Returns the table of arrays and tensors of a network."""
    return _NETWORKS[network["name"]].pairs(with_defaults(network), spec)
