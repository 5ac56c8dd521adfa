"""Converts between networks of this library and models of diffusers: `networks.unet` and `UNet2DModel`, `networks.dit`
and `DiTTransformer2DModel`. Names and conventions are those of diffusers 0.42.

A model is a folder with `config.json` and safetensors. A pipeline consists of such a folder, a folder for the noise
schedule, and `model_index.json`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from diffusion.core.build import build_network, defaults, find
from diffusion.core.types import ArraySpec, InputError, Params, Spec, class_labels
from diffusion.interop import model_folder, tensors
from diffusion.interop.tensors import Pair, conv, copies, fused, linear, norm, pointwise, same, stacked
from diffusion.layers.norms import default_groups

VERSION = "0.42.1"  # of diffusers, recorded in the files that are written
# Names of attention layers before diffusers 0.13, and their present names.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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


def read(path: str, *, null_class: bool = False) -> Model:
    """Reads a model folder.

    Args:
      path: The folder.
      null_class: Whether the last row of a U-Net's table of classes is the null class.

    Raises:
      InputError: if the folder cannot be read, the model is not supported, or a tensor is missing, unknown or of the
        wrong shape.
    """
    config = model_folder.read_json(path, "config.json")
    kind = config.get("_class_name")
    if kind == "UNet2DModel":
        network, spec = _read_unet({**_UNET_DEFAULTS, **config}, null_class)
    elif kind == "DiTTransformer2DModel":
        network, spec = _read_dit({**_DIT_DEFAULTS, **config})
    else:
        raise InputError("folder", f"{path} contains a {kind}; only UNet2DModel and DiTTransformer2DModel can be read")
    try:
        built = build_network(network, spec, field="config.json")
    except InputError as error:
        field = error.field.removeprefix("config.json.")
        raise InputError(f"config.json.{_FOREIGN_NAMES.get(field, field)}", error.problem) from None
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    foreign = {_current_name(name): tensor for name, tensor in model_folder.read_tensors(path).items()}
    return Model(network, spec, tensors.to_native(pairs(network, spec), foreign, shapes))


def write(path: str, model: Model) -> None:
    """Writes a model folder. Raises InputError naming the option that diffusers' model does not support."""
    network = with_defaults(model.network)
    if network["name"] == "unet":
        config = _unet_config(network, model.spec, tensors.sizes(model.params, "scale"))
    elif network["name"] == "dit":
        config = _dit_config(network, model.spec)
    else:
        raise InputError(
            "network.name", f"must be 'unet' or 'dit' to be written for diffusers, got {network['name']!r}"
        )
    model_folder.write(path, config, tensors.to_foreign(pairs(network, model.spec), model.params))


def _current_name(name: str) -> str:
    """Returns the present name of a tensor that may have a name from before diffusers 0.13."""
    head, _, tail = name.rpartition(".")
    stem, _, last = head.rpartition(".")
    return f"{stem}.{OLD_NAMES[last]}.{tail}" if last in OLD_NAMES and ".attentions." in name else name


def with_defaults(network: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section `network` of a config with the default of every option that it does not set."""
    make = find("networks", network["name"], field="network.name")
    return defaults(make, later=("shape", "num_classes", "conditions")) | dict(network)


def pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    """Returns the table of arrays and tensors of a network."""
    return {"unet": _unet_pairs, "dit": _dit_pairs}[network["name"]](with_defaults(network), spec)


def _spec(size: tuple[int, int], channels: int, num_classes: int) -> Spec:
    kind = "image" if channels in (1, 3) else "latent"
    return Spec(ArraySpec((*size, channels), kind), class_labels(num_classes))


def _check_foreign(config: Mapping[str, Any], **supported: Any) -> None:
    """Raises InputError if an entry of `config.json` has a value that this library's network does not support."""
    for name, value in supported.items():
        values = value if isinstance(value, tuple) else (value,)
        if config[name] not in values:
            expected = " or ".join(repr(value) for value in values)
            raise InputError(f"config.json.{name}", f"must be {expected} to be read, got {config[name]!r}")


def _check_native(network: Mapping[str, Any], **supported: Any) -> None:
    """Raises InputError if an option of a network has a value that diffusers' model does not support."""
    for name, value in supported.items():
        if network[name] != value:
            problem = f"must be {value!r} to be written for diffusers, got {network[name]!r}"
            raise InputError(f"network.{name}", problem)


def _outputs(config: Mapping[str, Any]) -> int:
    """Returns the number of output values per channel of x."""
    channels, out = config["in_channels"], config["out_channels"] or config["in_channels"]
    if out not in (channels, 2 * channels):
        raise InputError("config.json.out_channels", f"must be {channels} or {2 * channels} to be read, got {out}")
    return out // channels


def _size(config: Mapping[str, Any], levels: int = 1) -> tuple[int, int]:
    """Returns the height and the width of the images, which are halved once per level after the first."""
    size = config["sample_size"]
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError("config.json.sample_size", f"must be the side, or the height and width, of images, got {size}")
    if any(side % (1 << levels - 1) for side in sides):
        raise InputError("config.json.sample_size", f"must be divisible by {1 << levels - 1} to be read, got {size}")
    return sides


# UNet2DModel

_UNET_DEFAULTS = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
}  # fmt: skip
# For each type of block: whether it has attention, and how it resamples (None: given by `downsample_type` or
# `upsample_type`).
_FOREIGN_NAMES = {"head_dim": "attention_head_dim", "groups": "norm_num_groups", "channel_mult": "block_out_channels",
                  "middle_attention_groups": "attn_norm_num_groups", "width": "block_out_channels"}  # fmt: skip
_DOWN = {"DownBlock2D": (False, "conv"), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, "resnet")}
_UP = {"UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, "resnet")}


def _levels(config: Mapping[str, Any], side: str) -> tuple[list[bool], set[str]]:
    """Returns which levels have attention, from the largest image to the smallest, and how the levels resample."""
    kinds, field = {"down": _DOWN, "up": _UP}[side], f"{side}_block_types"
    for name in config[field]:
        if name not in kinds:
            raise InputError(f"config.json.{field}", f"must be among {', '.join(kinds)} to be read, got {name!r}")
    if len(config[field]) != len(config["block_out_channels"]):
        raise InputError(f"config.json.{field}", "must have as many entries as block_out_channels")
    names = list(config[field]) if side == "down" else list(config[field])[::-1]
    resampling = {kinds[name][1] or config[f"{side}sample_type"] for name in names[:-1]}
    return [kinds[name][0] for name in names], resampling


def _read_unet(config: Mapping[str, Any], null_class: bool) -> tuple[dict[str, Any], Spec]:
    widths, classes = config["block_out_channels"], config["num_class_embeds"] or 0
    size = _size(config, len(widths))
    attends, resampling = _levels(config, "down")
    if _levels(config, "up") != (attends, resampling) or len(resampling) > 1:
        problem = "must mirror down_block_types, and all levels must resample in the same way"
        raise InputError("config.json.up_block_types", problem)
    scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
    groups, middle_groups = config["norm_num_groups"], config["attn_norm_num_groups"]
    if middle_groups is None and scale_shift:
        middle_groups = 0  # diffusers then has no norm before the attention in the middle
    _check_foreign(
        config, center_input_sample=False, time_embedding_type="positional",
        time_embedding_dim=(None, 4 * widths[0]), mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1,
        act_fn=("silu", "swish"), freq_shift=(0, 1), resnet_time_scale_shift=("default", "scale_shift"),
        class_embed_type=None, downsample_padding=(0, 1),
    )  # fmt: skip
    network = {
        "name": "unet",
        "width": widths[0],
        "channel_mult": tuple(_ratio(width, widths[0]) for width in widths),
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": tuple(min(size) >> level for level, attend in enumerate(attends) if attend),
        "up_attention": "every",
        "middle_attention": config["add_attention"],
        "middle_attention_groups": None if middle_groups == groups else middle_groups,
        "head_dim": config["attention_head_dim"],
        "scale_shift": scale_shift,
        "resample": "residual" if resampling == {"resnet"} else "conv",
        "asymmetric_padding": config["downsample_padding"] == 0,
        "freq_shift": config["freq_shift"],
        "sin_first": not config["flip_sin_to_cos"],
        "null_class": null_class or not classes,  # has no effect without classes
        "dropout": float(config["dropout"]),
        "groups": groups,
        "epsilon": config["norm_eps"],
        "outputs": _outputs(config),
    }
    return network, _spec(size, config["in_channels"], classes - (null_class and bool(classes)))


def _unet_config(network: Mapping[str, Any], spec: Spec, normed: Collection[int]) -> dict[str, Any]:
    _check_native(
        network, up_attention="every", resample_filter=(1, 1), input_skip=False, rescale=False, embedding="sinusoidal"
    )
    if network["resample"] == "projected":
        problem = "must be 'conv' or 'residual' to be written for diffusers, got 'projected'"
        raise InputError("network.resample", problem)
    *size, channels = spec.shape
    widths = _widths(network)
    if widths[0] != network["width"]:
        problem = f"must begin with 1 to be written for diffusers, got {network['channel_mult']}"
        raise InputError("network.channel_mult", problem)
    groups = {network["groups"] or default_groups(channels) for channels in normed}
    if len(groups) > 1:
        problem = (
            f"must be the same in all layers to be written for diffusers, are {sorted(groups)}; set network.groups"
        )
        raise InputError("network.groups", problem)
    residual = network["resample"] == "residual"
    kinds = {(False, False): "{side}Block2D", (True, False): "Attn{side}Block2D", (True, True): "Attn{side}Block2D",
             (False, True): "Resnet{side}sampleBlock2D"}  # fmt: skip
    types = [kinds[min(size) >> level in network["attention_resolutions"], residual] for level in range(len(widths))]
    middle_groups = network["middle_attention_groups"]
    if middle_groups == 0 and not network["scale_shift"]:
        problem = "must not be 0 to be written for diffusers without scale_shift"
        raise InputError("network.middle_attention_groups", problem)
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        **_UNET_DEFAULTS,
        "sample_size": size[0] if size[0] == size[1] else size,
        "in_channels": channels,
        "out_channels": network["outputs"] * channels,
        "freq_shift": network["freq_shift"],
        "flip_sin_to_cos": not network["sin_first"],
        "down_block_types": [kind.format(side="Down") for kind in types],
        "up_block_types": [kind.format(side="Up") for kind in reversed(types)],
        "block_out_channels": widths,
        "layers_per_block": network["num_res_blocks"],
        "downsample_padding": 0 if network["asymmetric_padding"] else 1,
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "dropout": network["dropout"],
        "attention_head_dim": network["head_dim"],
        "norm_num_groups": min(groups),
        "attn_norm_num_groups": min(groups) if middle_groups is None else middle_groups or None,
        "norm_eps": network["epsilon"],
        "resnet_time_scale_shift": "scale_shift" if network["scale_shift"] else "default",
        "add_attention": network["middle_attention"],
        "num_class_embeds": spec.num_classes + network["null_class"] if spec.num_classes else None,
    }


def _ratio(a: int, b: int) -> float:
    """Returns a / b, as an integer where it is one."""
    return a // b if a % b == 0 else a / b


def _widths(network: Mapping[str, Any]) -> list[int]:
    """Returns the channels of each level."""
    return [round(network["width"] * multiplier) for multiplier in network["channel_mult"]]


def _unet_pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    levels, blocks = len(network["channel_mult"]), network["num_res_blocks"]

    def residual(native: str, foreign: str, projected: bool) -> list[Pair]:
        layers = [
            *norm(f"{native}/norm1", f"{foreign}.norm1"),
            *conv(f"{native}/conv1", f"{foreign}.conv1"),
            *linear(f"{native}/emb", f"{foreign}.time_emb_proj"),
            *norm(f"{native}/norm2", f"{foreign}.norm2"),
            *conv(f"{native}/conv2", f"{foreign}.conv2"),
        ]
        return [*layers, *pointwise(f"{native}/skip", f"{foreign}.conv_shortcut")] if projected else layers

    def attention(native: str, foreign: str, normed: bool = True) -> list[Pair]:
        return [
            *(norm(f"{native}/norm", f"{foreign}.group_norm") if normed else []),
            *fused(f"{native}/qkv", [f"{foreign}.to_{part}" for part in "qkv"]),
            *linear(f"{native}/out", f"{foreign}.to_out.0"),
        ]

    def resampler(native: str, foreign: str) -> list[Pair]:
        if network["resample"] == "residual":
            return residual(f"{native}/residual", foreign, projected=False)
        return conv(f"{native}/conv", f"{foreign}.conv")

    table = [
        *linear("embed/inner", "time_embedding.linear_1"),
        *linear("embed/outer", "time_embedding.linear_2"),
        *conv("conv_in", "conv_in"),
        *norm("norm_out", "conv_norm_out"),
        *conv("conv_out", "conv_out"),
        *residual("middle/first/residual", "mid_block.resnets.0", projected=False),
        *residual("middle/second/residual", "mid_block.resnets.1", projected=False),
    ]
    if spec.num_classes:
        table.append(same("embed/label/embedding", "class_embedding.weight"))
    if network["middle_attention"]:
        normed = network["middle_attention_groups"] != 0
        table += attention("middle/first/attention", "mid_block.attentions.0", normed)
    widths = _widths(network)
    for level, width in enumerate(widths):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        grows = width != widths[max(level - 1, 0)]
        attends = min(spec.shape[:2]) >> level in network["attention_resolutions"]
        for block in range(blocks + 1):
            if block < blocks:
                projected = grows and block == 0
                table += residual(f"down/{level}_{block}/residual", f"{down}.resnets.{block}", projected)
            table += residual(f"up/{level}_{block}/residual", f"{up}.resnets.{block}", projected=True)
            if attends and block < blocks:
                table += attention(f"down/{level}_{block}/attention", f"{down}.attentions.{block}")
            if attends:
                table += attention(f"up/{level}_{block}/attention", f"{up}.attentions.{block}")
        if level + 1 < levels:
            table += resampler(f"down/{level}_down", f"{down}.downsamplers.0")
        if level:
            table += resampler(f"up/{level}_up", f"{up}.upsamplers.0")
    return table


# DiTTransformer2DModel

_DIT_DEFAULTS = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None, "num_layers": 28,
    "dropout": 0.0, "norm_num_groups": 32, "attention_bias": True, "sample_size": 32, "patch_size": 2,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "upcast_attention": False,
    "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-5,
}  # fmt: skip


def _read_dit(config: Mapping[str, Any]) -> tuple[dict[str, Any], Spec]:
    _check_foreign(config, dropout=0, attention_bias=True, activation_fn="gelu-approximate", upcast_attention=False,
                   norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=(1e-5, 1e-6))  # fmt: skip
    size = _size(config)
    if size[0] != size[1]:
        raise InputError("config.json.sample_size", f"must be square to be read for a transformer, got {size}")
    network = {
        "name": "dit",
        "patch_size": config["patch_size"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "freq_shift": 1,
        "outputs": _outputs(config),
    }
    return network, _spec(size, config["in_channels"], config["num_embeds_ada_norm"])


def _dit_config(network: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    _check_native(network, mlp_ratio=4, positions="sincos", norm="layer", qk_norm=False, mlp="gelu", freq_shift=1)
    if not spec.num_classes:
        raise InputError("data", "must have classes for a DiT to be written for diffusers")
    if spec.shape[0] != spec.shape[1]:
        shape = f"{spec.shape[0]} x {spec.shape[1]}"
        raise InputError("spec.shape", f"must be square for a DiT to be written for diffusers, got {shape}")
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": VERSION,
        **_DIT_DEFAULTS,
        "num_attention_heads": network["num_heads"],
        "attention_head_dim": network["width"] // network["num_heads"],
        "in_channels": spec.shape[2],
        "out_channels": network["outputs"] * spec.shape[2],
        "num_layers": network["depth"],
        "sample_size": spec.shape[0],
        "patch_size": network["patch_size"],
        "num_embeds_ada_norm": spec.num_classes,
        "norm_eps": 1e-6,
    }


def _dit_pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    prefixes = [f"transformer_blocks.{index}." for index in range(network["depth"])]
    p, C, D = network["patch_size"], spec.shape[2], network["width"]
    embedder = [
        *linear("embed/inner", "norm1.emb.timestep_embedder.linear_1"),
        *linear("embed/outer", "norm1.emb.timestep_embedder.linear_2"),
        same("embed/label/embedding", "norm1.emb.class_embedder.embedding_table.weight"),
    ]
    block = [
        *linear("blocks/blocks/modulation", "norm1.linear"),
        *fused("blocks/blocks/qkv", [f"attn1.to_{part}" for part in "qkv"]),
        *linear("blocks/blocks/out", "attn1.to_out.0"),
        *linear("blocks/blocks/up", "ff.net.0.proj"),
        *linear("blocks/blocks/down", "ff.net.2"),
    ]
    patches = Pair(
        "patches_in/kernel",
        ("pos_embed.proj.weight",),
        lambda tensors: tensors[0].transpose(2, 3, 1, 0).reshape(p * p * C, D),
        lambda array: [array.reshape(p, p, C, D).transpose(3, 2, 0, 1)],
    )
    return [
        *copies(embedder, prefixes),  # in diffusers every block has a copy of the embeddings
        *stacked(block, prefixes),
        patches,
        same("patches_in/bias", "pos_embed.proj.bias"),
        *linear("modulation", "proj_out_1"),
        *linear("patches_out", "proj_out_2"),
    ]
