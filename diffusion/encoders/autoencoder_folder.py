"""Reads and writes model folders of autoencoders: `AutoencoderKL`, `VQModel` and `AutoencoderTiny` of diffusers.

The options of the networks are named like the entries of `config.json`, and their parameters like the tensors:
`encoder/down_blocks_0/resnets_1/conv1/kernel` is `encoder.down_blocks.0.resnets.1.conv1.weight`.
"""

import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks, model_folder, single_file, tensors, trees
from diffusion.core.build import build, defaults, find
from diffusion.core.types import Array, Autoencoder, InputError, Params
from diffusion.encoders.tiling import one_by_one, tiled
from diffusion.layers.autoencoder import AutoencoderApply

logger = logging.getLogger(__name__)

_CLASSES = {"autoencoder_kl": "AutoencoderKL", "autoencoder_vq": "VQModel", "autoencoder_tiny": "AutoencoderTiny"}
FSQ = "FSQModel"  # a VQModel without a codebook, which diffusers does not have
_TRUNK = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (64,), "layers_per_block": 1, "act_fn": "silu",
    "sample_size": 32, "norm_num_groups": 32, "mid_block_add_attention": True, "scaling_factor": 0.18215,
}  # fmt: skip
# The known entries of `config.json`, with the values that an absent entry stands for. Those that are neither options of
# the network nor in `_SUPPORTED` do not change its function: `force_upcast` is for float16, which is not offered.
_ENTRIES = {
    "autoencoder_kl": _TRUNK | {
        "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True, "force_upcast": True,
        "shift_factor": None, "latents_mean": None, "latents_std": None,
    },
    "autoencoder_vq": _TRUNK | {
        "latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None, "norm_type": "group",
        "lookup_from_codebook": False, "force_upcast": False,
    },
    "autoencoder_tiny": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "encoder_block_out_channels": (64, 64, 64, 64),
        "num_encoder_blocks": (1, 3, 3, 3), "decoder_block_out_channels": (64, 64, 64, 64),
        "num_decoder_blocks": (3, 3, 3, 1), "act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2,
        "latent_magnitude": 3, "latent_shift": 0.5, "force_upcast": False, "scaling_factor": 1.0, "shift_factor": 0.0,
    },
}  # fmt: skip
# The values with which an entry can be read.
_SUPPORTED = {
    "autoencoder_kl": {"act_fn": ("silu", "swish")},
    "autoencoder_vq": {"act_fn": ("silu", "swish"), "norm_type": ("group",)},
    "autoencoder_tiny": {"act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)},
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """The map between the latents of a network and those of unit scale: `(z - shift) * factor`.

    Attributes:
      scaling_factor: A number.
      shift_factor: A number; None: 0.
      latents_mean, latents_std: In place of `shift_factor`, numbers per channel: `(z - mean) * scaling_factor / std`.
    """

    scaling_factor: float = 1.0
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def check(self, channels: int, parent: str = "") -> None:
        """Raises InputError, whose field begins with `parent`, for a number that is not finite or, where it must be,
        not positive, and for another number of channels."""
        for name, value in dataclasses.asdict(self).items():
            if value is None and name != "scaling_factor":
                continue
            values, count = value if isinstance(value, tuple) else (value,), channels if "latents" in name else 1
            if len(values) != count or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
                raise InputError(f"{parent}{name}", f"must be finite, {count} in number, got {value}")
            if name in ("scaling_factor", "latents_std") and min(values) <= 0:
                raise InputError(f"{parent}{name}", f"must be positive, got {value}")

    @property
    def shift(self) -> Any:
        """What is subtracted."""
        return np.float32(self.shift_factor or 0.0 if self.latents_mean is None else self.latents_mean)

    @property
    def factor(self) -> Any:
        """What is multiplied by."""
        return np.float32(self.scaling_factor / np.asarray(1.0 if self.latents_std is None else self.latents_std))


@dataclasses.dataclass(frozen=True)
class Stored:
    """An autoencoder in a model folder.

    Attributes:
      network: The section `network` of a config, `{"name": "autoencoder_kl", ...}`.
      params: The parameters, float32, or their shapes.
      shape: The shape of one image.
      scale: The scale of the latents.
    """

    network: Mapping[str, Any]
    params: Params
    shape: tuple[int, ...]
    scale: Scale = Scale()


def read(
    path: str, name: str, shape: tuple[int, ...], variant: str | None = None, dtype: str = "float32",
    weights: bool = True,
) -> tuple[Stored, AutoencoderApply]:  # fmt: skip
    """Reads a model folder; also returns the functions of its network.

    Args:
      path: The folder, or that of a pipeline, which has the model in `vae` or `vqvae`, or a single file.
      name: The network that the folder must contain.
      shape: The shape of one image, `(H, W, C)`.
      variant: The variant of the weights; see `model_folder.read_tensors`.
      dtype: The compute dtype.
      weights: Whether to read the parameters. Without them the folder needs `config.json` alone, and their shapes are
        returned.

    Raises:
      InputError: for `path`; the folder cannot be read, the model is not supported or is not for these images, or a
        tensor is missing, unknown, of the wrong shape or not finite.
    """
    try:
        path = model_of(path)
        return _read(path, name, shape, variant, dtype, weights)
    except InputError as error:
        problem = error.problem if error.field == "folder" else f"{path}: {error}"
        raise InputError("path", problem) from None


def model_of(path: str) -> str:
    """Returns the model folder in that of a pipeline, or its path in a single file; otherwise the folder itself."""
    if single_file.split(path) == (path, ""):
        return os.path.join(path, "vae")
    names = model_folder.names(path)
    part = next((part for part in ("vae", "vqvae") if part in names and "model_index.json" in names), None)
    return os.path.join(path, part) if part else path


def factor_of(path: str) -> int:
    """Returns by how much the autoencoder in a folder, or in that of a pipeline, reduces height and width."""
    config = model_folder.read_json(model_of(path), "config.json")
    network = next((name for name, kind in _CLASSES.items() if kind == config.get("_class_name")), "autoencoder_kl")
    entries = _ENTRIES[network] | config
    channels = entries.get("block_out_channels") or entries.get("encoder_block_out_channels")
    if not isinstance(channels, (list, tuple)):
        raise InputError(
            "folder", f"{path}: config.json.block_out_channels must be a list of numbers, got {channels!r}"
        )
    return 2 ** (len(channels) - 1)


def _read(
    path: str, name: str, shape: tuple[int, ...], variant: str | None, dtype: str, weights: bool
) -> tuple[Stored, AutoencoderApply]:
    if os.path.isdir(os.path.join(path, "checkpoints")):
        command = f"python -m experiments.convert --from={path} --to=..."
        raise InputError("folder", f"{path} is a run; convert it and give the folder that is written: {command}")
    if not (os.path.isdir(path) or single_file.split(path)):
        problem = "write it with experiments.convert, or give the folder of a downloaded model"
        raise InputError("folder", f"there is no folder {path}; {problem}")
    config = model_folder.read_json(path, "config.json")
    kind = str(config.get("_class_name"))
    kinds = {known: network for network, known in _CLASSES.items()} | {FSQ: "autoencoder_vq"}
    if kinds.get(kind) != name:
        fitting = " or ".join(known for known in kinds if kinds[known] == name)
        fix = f"set autoencoder.name to {kinds[kind][12:]}" if kind in kinds else f"give the folder of a {fitting}"
        raise InputError("folder", f"{path} contains a model of the class {kind}; {fix}")
    entries = _ENTRIES[name] | ({"fsq_levels": None} if kind == FSQ else {})
    unknown = [key for key in config if key not in entries and key[0] != "_"]
    if unknown:
        logger.warning("%s: config.json has the unknown entries %s, which are ignored", path, ", ".join(unknown))
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in (entries | config).items()}
    _check(config, name, shape)
    options = defaults(find("networks", name, field="path"), later=("num_classes", "conditions", "dtype"))
    network = {"name": name, **{key: config[key] for key in options if key in entries}}
    built = build("networks", {**network, "dtype": dtype}, field="config.json", shape=shape)
    scale = Scale(**{field.name: config[field.name] for field in dataclasses.fields(Scale) if field.name in entries})
    scale.check(built.apply.latent_shape[-1], "config.json.")
    like = jax.eval_shape(built.init, jax.random.key(0))
    if not weights:
        return Stored(network, like, shape, scale), built.apply
    foreign = {}
    for key, tensor in model_folder.read_tensors(path, variant).items():
        if ".attentions." in key and tensor.shape[2:] == (1, 1):  # files of latent diffusion have 1x1 convolutions
            tensor = tensor[:, :, 0, 0]
        foreign[tensors.current_name(key)] = tensor
    return Stored(network, tensors.to_native(_pairs(like), foreign, like), shape, scale), built.apply


def _check(config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> None:
    """Raises InputError for an entry of `config.json` that is not supported, or that is not for images of a shape."""
    for key, values in _SUPPORTED[name].items():
        if config[key] not in values:
            expected = " or ".join(map(repr, values))
            raise InputError(f"config.json.{key}", f"must be {expected} to be read, got {config[key]!r}")
    field = "block_out_channels" if "block_out_channels" in _ENTRIES[name] else "encoder_block_out_channels"
    if not isinstance(config[field], tuple):
        raise InputError(f"config.json.{field}", f"must be a list of numbers, got {config[field]!r}")
    levels = len(config[field])
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if key in _ENTRIES[name] and config[key] != (kind,) * levels:
            raise InputError(f"config.json.{key}", f"must be {levels} times {kind!r} to be read, got {config[key]!r}")
    checks.images(name, shape)
    if not config["in_channels"] == config["out_channels"] == shape[-1]:
        problem = f"is {config['in_channels']} and out_channels {config['out_channels']}, and the number of channels of"
        raise InputError(
            "config.json.in_channels", f"{problem} the data is {shape[-1]}; use other data or another model"
        )
    if levels and any(side % 2 ** (levels - 1) for side in shape[:2]):
        problem = f"has {levels} levels, so that {2 ** (levels - 1)} must divide height and width; the data have"
        raise InputError(f"config.json.{field}", f"{problem} {shape[0]} x {shape[1]}: crop or resize them")


def write(path: str, stored: Stored) -> None:
    """Writes a model folder, which diffusers can read unless the network quantises by rounding (`fsq_levels`).

    Raises:
      InputError: The network is no autoencoder, or the folder cannot hold the scale.
    """
    name = stored.network["name"]
    if name not in _CLASSES:
        raise InputError("network.name", f"must be one of {', '.join(_CLASSES)}, got {name!r}")
    options = defaults(find("networks", name, field="network.name")) | dict(stored.network)
    built = build("networks", stored.network, field="network", shape=stored.shape)
    stored.scale.check(built.apply.latent_shape[-1])
    scale = {key: value for key, value in dataclasses.asdict(stored.scale).items() if value is not None}
    for key in scale.keys() - _ENTRIES[name].keys():
        raise InputError(key, f"must be None for a {_CLASSES[name]}, got {scale[key]}")
    config = {key: options.get(key, default) for key, default in _ENTRIES[name].items()} | scale
    config |= {"in_channels": stored.shape[-1], "out_channels": stored.shape[-1]}
    if "block_out_channels" in config:
        levels = len(config["block_out_channels"])
        types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        config |= {"sample_size": max(stored.shape[:2]), **types}
    fsq = {"fsq_levels": options["fsq_levels"]} if options.get("fsq_levels") else {}
    about = {"_class_name": FSQ if fsq else _CLASSES[name], "_diffusers_version": model_folder.VERSION}
    model_folder.write(path, {**about, **config, **fsq}, tensors.to_foreign(_pairs(stored.params), stored.params))


def _pairs(params: Params) -> list[tensors.Pair]:
    """Returns the table of arrays and tensors, which follows from the paths and ranks of the arrays."""
    pairs = []
    for path, array in jax.tree.leaves_with_path(params):
        *parents, last = (key.key for key in path)
        foreign = ".".join(re.sub(r"_(\d+)$", r".\1", name) for name in parents)
        foreign += ".bias" if last == "bias" else ".weight"
        native = "/".join([*parents, last])
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}[array.ndim] if last == "kernel" else range(array.ndim)
        pairs.append(tensors.permuted(native, foreign, *axes))
    return pairs


def frozen(
    path: str, name: str, shape: tuple[int, ...], *, variant: str | None, tile: int | None, overlap: float,
    slices: bool, dtype: str, weights: bool,
) -> Autoencoder:  # fmt: skip
    """Returns the autoencoder in a model folder; see `encoders.autoencoders.kl.make` for the arguments, and `read`."""
    stored, apply = read(path, name, shape, variant, dtype, weights)
    shift, factor, halved = stored.scale.shift, stored.scale.factor, apply.factor

    def encode(params: Params, x: Array) -> Array:
        return apply.encode(params, x)

    def decode(params: Params, z: Array) -> Array:
        return apply.decode(params, z / factor + shift)

    if tile is not None:
        inner = round(tile * overlap)
        if tile < 1 or tile % halved or inner % halved or inner != tile * overlap or not 0 <= overlap <= 0.5:
            problem = f"must be a multiple of {halved}, and so must tile * overlap, with an overlap in [0, 0.5]"
            raise InputError("tile", f"{problem}; got {tile} and {overlap}")
        pixels, latents = (tile, inner), (tile // halved, inner // halved)
        encode = _by_parts(encode, lambda f, x: tiled(f, x, *pixels, *latents))
        decode = _by_parts(decode, lambda f, z: tiled(f, z, *latents, *pixels))
    if slices:
        encode = _by_parts(encode, lambda f, x: one_by_one(f)(x))
        decode = _by_parts(decode, lambda f, z: one_by_one(f)(z))

    def sample(moments: Array, key: Array | None) -> Array:
        return (apply.sample(moments, key) - shift) * factor

    if not weights:
        return Autoencoder(stored.params, encode, decode, apply.latent_shape, sample=sample)
    params = jax.tree.map(jnp.asarray, stored.params)
    return Autoencoder(params, encode, decode, apply.latent_shape, digest(stored), sample)


def _by_parts(function: Callable[[Params, Array], Array], apply: Callable) -> Callable[[Params, Array], Array]:
    """Returns `function(params, x)` with `apply(lambda part: function(params, part), x)` in its place."""
    return lambda params, x: apply(lambda part: function(params, part), x)


def digest(stored: Stored) -> str:
    """Returns the SHA-256 of the weights, float32, and of the scale. It does not depend on how the weights are
    distributed over files."""
    scale = np.ravel([stored.scale.shift]).tobytes() + np.ravel([stored.scale.factor]).tobytes()
    return trees.sha256(stored.params, scale)
