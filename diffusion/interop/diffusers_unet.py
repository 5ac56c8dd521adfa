"""Converts between `networks.unet` and `UNet2DModel` of diffusers: options and tables of tensors."""

from collections.abc import Mapping
from typing import Any

from diffusion.core import model_folder, trees
from diffusion.core.tensors import Pair, Tensors, conv, fused, linear, norm, pointwise, same
from diffusion.core.types import InputError, Params, Spec
from diffusion.interop.config_json import check_entries, check_options, data_spec, image_size, outputs
from diffusion.layers.norms import default_groups

# Entries of `config.json` that correspond to options of the network, for error messages.
NAMES = {"head_dim": "attention_head_dim", "groups": "norm_num_groups", "channel_mult": "block_out_channels",
         "middle_attention_groups": "attn_norm_num_groups", "width": "block_out_channels"}  # fmt: skip
_DEFAULTS = {
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


def network_of(config: Mapping[str, Any], tensors: Tensors, null_class: bool) -> tuple[dict[str, Any], Spec]:
    """Returns the section `network` of a config, and the specification of the data.

    Args:
      config: The content of `config.json`.
      tensors: The weights by name.
      null_class: Whether the last row of the table of classes is the null class.
    """
    config = {**_DEFAULTS, **config}
    widths, classes = config["block_out_channels"], config["num_class_embeds"] or 0
    size = image_size(config, len(widths))
    attends, resampling = _levels(config, "down")
    if _levels(config, "up") != (attends, resampling) or len(resampling) > 1:
        problem = "must mirror down_block_types, and all levels must resample in the same way"
        raise InputError("config.json.up_block_types", problem)
    scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
    groups, middle_groups = config["norm_num_groups"], config["attn_norm_num_groups"]
    if middle_groups is None and scale_shift:
        middle_groups = 0  # diffusers then has no norm before the attention in the middle
    check_entries(
        config, center_input_sample=False, time_embedding_type="positional",
        time_embedding_dim=(None, 4 * widths[0]), mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1,
        act_fn=("silu", "swish"), freq_shift=(0, 1), resnet_time_scale_shift=("default", "scale_shift"),
        class_embed_type=None, downsample_padding=(0, 1),
    )  # fmt: skip
    network = {
        "name": "unet",
        "width": widths[0],
        "channel_mult": tuple(ratio(width, widths[0]) for width in widths),
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
        "outputs": outputs(config),
    }
    return network, data_spec(size, config["in_channels"], classes - (null_class and bool(classes)))


def config_of(network: Mapping[str, Any], spec: Spec, params: Params) -> dict[str, Any]:
    """Returns the content of `config.json`. Raises InputError naming the option that UNet2DModel does not have."""
    check_options(
        network, up_attention="every", resample_filter=(1, 1), input_skip=False, rescale=False, embedding="sinusoidal"
    )
    if network["resample"] == "projected":
        problem = "must be 'conv' or 'residual' to be written for diffusers, got 'projected'"
        raise InputError("network.resample", problem)
    *size, channels = spec.shape
    widths, groups = widths_of(network), groups_of(network, params)
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
        "_diffusers_version": model_folder.VERSION,
        **_DEFAULTS,
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
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if middle_groups is None else middle_groups or None,
        "norm_eps": network["epsilon"],
        "resnet_time_scale_shift": "scale_shift" if network["scale_shift"] else "default",
        "add_attention": network["middle_attention"],
        "num_class_embeds": spec.num_classes + network["null_class"] if spec.num_classes else None,
    }


def ratio(a: int, b: int) -> float:
    """Returns a / b, as an integer where it is one."""
    return a // b if a % b == 0 else a / b


def widths_of(network: Mapping[str, Any]) -> list[int]:
    """Returns the channels of each level. Raises InputError if diffusers cannot have them."""
    widths = [round(network["width"] * multiplier) for multiplier in network["channel_mult"]]
    if widths[0] != network["width"]:
        problem = f"must begin with 1 to be written for diffusers, got {network['channel_mult']}"
        raise InputError("network.channel_mult", problem)
    return widths


def groups_of(network: Mapping[str, Any], params: Params) -> int:
    """Returns the number of groups of the group norms. Raises InputError unless all have the same."""
    arrays = trees.by_path(params).items()
    # The norms of stacked blocks are layer norms.
    channels = {array.size for path, array in arrays if path.endswith("/scale") and "/blocks/" not in path}
    groups = {network["groups"] or default_groups(number) for number in channels}
    if len(groups) > 1:
        problem = f"must be the same in all layers to be written for diffusers, are {sorted(groups)}"
        raise InputError("network.groups", f"{problem}; set network.groups")
    return groups.pop()


def residual(native: str, foreign: str, projected: bool) -> list[Pair]:
    """Pairs residual blocks, with a linear layer on the skip connection if `projected`."""
    layers = [
        *norm(f"{native}/norm1", f"{foreign}.norm1"),
        *conv(f"{native}/conv1", f"{foreign}.conv1"),
        *linear(f"{native}/emb", f"{foreign}.time_emb_proj"),
        *norm(f"{native}/norm2", f"{foreign}.norm2"),
        *conv(f"{native}/conv2", f"{foreign}.conv2"),
    ]
    return [*layers, *pointwise(f"{native}/skip", f"{foreign}.conv_shortcut")] if projected else layers


def pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    """Returns the table of arrays and tensors."""
    levels, blocks = len(network["channel_mult"]), network["num_res_blocks"]

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
    widths = widths_of(network)
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
