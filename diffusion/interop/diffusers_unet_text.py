"""Converts between `networks.unet_text` and `UNet2DConditionModel` of diffusers: options and tables of tensors."""

import re
from collections.abc import Mapping
from typing import Any

from diffusion.core import model_folder
from diffusion.core.tensors import Pair, Tensors, conv, linear, norm, permuted, pointwise, same, stacked
from diffusion.core.types import ConditionSpec, InputError, Params, Spec
from diffusion.interop.config_json import check_entries, data_spec, image_size
from diffusion.interop.diffusers_unet import groups_of, ratio, residual, widths_of

LENGTH = 77  # of a text, in tokens, which `config.json` does not say
TIME_IDS = "time_ids"

# Entries of `config.json` that correspond to options of the network, for error messages. What that class calls
# attention_head_dim is the number of heads.
NAMES = {"num_heads": "attention_head_dim", "groups": "norm_num_groups", "channel_mult": "block_out_channels",
         "width": "block_out_channels", "num_res_blocks": "layers_per_block", "depth": "transformer_layers_per_block",
         "number_features": "addition_time_embed_dim", "guidance_features": "time_cond_proj_dim"}  # fmt: skip
_DEFAULTS = {
    "sample_size": None, "in_channels": 4, "out_channels": 4, "center_input_sample": False, "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "only_cross_attention": False, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "dropout": 0.0, "act_fn": "silu", "norm_num_groups": 32,
    "norm_eps": 1e-5, "cross_attention_dim": 1280, "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "attention_head_dim": 8, "num_attention_heads": None, "dual_cross_attention": False,
    "use_linear_projection": False, "class_embed_type": None, "addition_embed_type": None,
    "addition_time_embed_dim": None, "num_class_embeds": None, "upcast_attention": False,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None, "attention_type": "default", "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None, "addition_embed_type_num_heads": 64,
}  # fmt: skip


def _is_cross(config: Mapping[str, Any], side: str) -> list[bool]:
    """Returns which levels have transformers, from the largest image to the smallest."""
    kinds, field = {f"{side}Block2D": False, f"CrossAttn{side}Block2D": True}, f"{side.lower()}_block_types"
    for name in config[field]:
        if name not in kinds:
            raise InputError(f"config.json.{field}", f"must be among {', '.join(kinds)} to be read, got {name!r}")
    found = [kinds[name] for name in config[field]]
    return found if side == "Down" else found[::-1]


def _per_level(config: Mapping[str, Any], field: str, levels: int) -> tuple[Any, ...]:
    """Returns an entry that may be one value for all levels or a list of one per level."""
    value = config[field]
    values = (value,) * levels if isinstance(value, (int, bool)) else tuple(value or ())
    if len(values) != levels or not all(isinstance(item, (int, bool)) for item in values):
        raise InputError(f"config.json.{field}", f"must be a number, or {levels} of them, to be read, got {value}")
    return values


def _same(config: Mapping[str, Any], field: str, levels: int) -> int:
    """Returns an entry that must be the same for all levels."""
    values = set(_per_level(config, field, levels))
    if len(values) > 1:
        raise InputError(f"config.json.{field}", f"must be the same for all levels to be read, got {config[field]}")
    return values.pop()


def network_of(config: Mapping[str, Any], tensors: Tensors, null_class: bool) -> tuple[dict[str, Any], Spec]:
    """Returns the section `network` of a config, and the specification of the data.

    The specification has a text of 77 tokens, `time_ids` for SDXL, and an `image` if there are more input than output
    channels (inpainting, InstructPix2Pix).

    Args:
      config: The content of `config.json`.
      tensors: The weights by name.
      null_class: Whether the last row of the table of classes is the null class.
    """
    config = {**_DEFAULTS, **_with_size(config)}
    widths, classes = config["block_out_channels"], config["num_class_embeds"] or 0
    levels, size = len(widths), image_size(config)
    for field in ("down_block_types", "up_block_types"):
        if len(config[field]) != levels:
            raise InputError(f"config.json.{field}", "must have as many entries as block_out_channels")
    crosses = _is_cross(config, "Down")
    if _is_cross(config, "Up") != crosses:
        raise InputError("config.json.up_block_types", "must mirror down_block_types to be read")
    depths = _per_level(config, "transformer_layers_per_block", levels)
    check_entries(
        config, center_input_sample=False, mid_block_type="UNetMidBlock2DCrossAttn", downsample_padding=1,
        mid_block_scale_factor=1, act_fn=("silu", "swish"), freq_shift=(0, 1), encoder_hid_dim=None,
        encoder_hid_dim_type=None, num_attention_heads=None, dual_cross_attention=False, class_embed_type=None,
        addition_embed_type=(None, "text_time"), resnet_time_scale_shift=("default", "scale_shift"),
        resnet_skip_time_act=False, resnet_out_scale_factor=1, time_embedding_type="positional",
        time_embedding_dim=(None, 4 * widths[0]), time_embedding_act_fn=None, timestep_post_act=None, conv_in_kernel=3,
        conv_out_kernel=3, attention_type="default", class_embeddings_concat=False, cross_attention_norm=None,
        reverse_transformer_layers_per_block=(None, [*reversed(depths)]),
    )  # fmt: skip
    if not isinstance(config["norm_num_groups"], int):
        raise InputError("config.json.norm_num_groups", f"must be a number, got {config['norm_num_groups']}")
    only_cross = _per_level(config, "only_cross_attention", levels)
    heads = _per_level(config, "attention_head_dim", levels)
    features, guidance = config["addition_time_embed_dim"], config["time_cond_proj_dim"]
    network = {
        "name": "unet_text",
        "width": widths[0],
        "channel_mult": tuple(ratio(width, widths[0]) for width in widths),
        "num_res_blocks": _same(config, "layers_per_block", levels),
        "depth": tuple(depth if cross else 0 for depth, cross in zip(depths, crosses, strict=True)),
        "middle_depth": depths[-1],
        "num_heads": heads[0] if len(set(heads)) == 1 else heads,
        "head_dim": None,
        "only_cross_attention": only_cross[0] if len(set(only_cross)) == 1 else only_cross,
        "scale_shift": config["resnet_time_scale_shift"] == "scale_shift",
        "freq_shift": config["freq_shift"],
        "sin_first": not config["flip_sin_to_cos"],
        "null_class": null_class or not classes,  # has no effect without classes
        "dropout": float(config["dropout"]),
        "groups": config["norm_num_groups"],
        "epsilon": config["norm_eps"],
        "use_linear_projection": config["use_linear_projection"],
        "upcast_attention": bool(config["upcast_attention"]),
    }
    context = _same(config, "cross_attention_dim", levels)
    pooled, conditions = 0, {}
    if config["addition_embed_type"]:
        ids, pooled = _added(config, context)
        network["number_features"], conditions[TIME_IDS] = features, ConditionSpec("vector", (ids,))
    conditions["text"] = ConditionSpec("text", (LENGTH, context), pooled=pooled)
    if guidance:
        network |= {"scalar_conditions": ("guidance_scale",), "guidance_features": guidance}
    channels, image_channels = _channels(config)
    network["outputs"] = config["out_channels"] // channels
    if image_channels:
        conditions["image"] = ConditionSpec("image", (*size, image_channels))
    return network, data_spec(size, channels, classes - (null_class and bool(classes)), conditions)


def _with_size(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a `config.json` with 64, the size of Stable Diffusion's latents, in place of a smaller one, which files
    from before diffusers 0.9 have by mistake."""
    is_early = re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version")))
    size = config.get("sample_size")
    return {**config, "sample_size": 64} if is_early and isinstance(size, int) and size < 64 else config


def _added(config: Mapping[str, Any], context: int) -> tuple[int, int]:
    """Returns how many time ids there are, and the width of the pooled text, which `config.json` gives in sum.

    There are six, but five in SDXL's refiner, whose pooled text is as wide as its tokens.
    """
    total, features = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    for name, value in (("projection_class_embeddings_input_dim", total), ("addition_time_embed_dim", features)):
        if not isinstance(value, int) or value < 1:
            problem = f"must be a positive number, as addition_embed_type is text_time, got {value}"
            raise InputError(f"config.json.{name}", problem)
    ids = 5 if total - 5 * features == context else 6
    if total <= ids * features:
        problem = f"must be larger than {ids} times addition_time_embed_dim to be read, got {total}"
        raise InputError("config.json.projection_class_embeddings_input_dim", problem)
    return ids, total - ids * features


def _channels(config: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the channels of x, and those of images that are further inputs."""
    channels, out = config["in_channels"], config["out_channels"]
    if out == 2 * channels:
        return channels, 0
    if not 0 < out <= channels:
        problem = f"must be at most {channels}, or {2 * channels}, to be read, got {out}"
        raise InputError("config.json.out_channels", problem)
    return out, channels - out


def config_of(network: Mapping[str, Any], spec: Spec, params: Params) -> dict[str, Any]:
    """Returns the content of `config.json`. Raises InputError naming what UNet2DConditionModel does not have."""
    *size, channels = spec.shape
    widths, groups = widths_of(network), groups_of(network, params)
    text, ids, images = _conditions(spec)
    unknown = set(network["scalar_conditions"]) - {"guidance_scale"}
    if unknown:
        raise InputError("network.scalar_conditions", f"must be guidance_scale alone to be written for diffusers, got "
                         f"{network['scalar_conditions']}")  # fmt: skip
    if images and network["outputs"] > 1:
        raise InputError("network.outputs", "must be 1 to be written for diffusers with an image as condition")
    depth, middle = network["depth"], network["middle_depth"]
    if not middle or (depth[-1] and depth[-1] != middle):
        problem = f"must be positive, and that of the last level, to be written for diffusers, got {middle}"
        raise InputError("network.middle_depth", problem)
    depths = [each or 1 for each in depth[:-1]] + [middle]
    heads = network["num_heads"] or [width // network["head_dim"] for width in widths]
    only_cross = network["only_cross_attention"]
    features = network["number_features"]

    def types(side: str) -> list[str]:
        return [f"CrossAttn{side}Block2D" if each else f"{side}Block2D" for each in depth]

    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": features,
        "projection_class_embeddings_input_dim": text.pooled + features * ids,
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": model_folder.VERSION,
        **_DEFAULTS,
        "sample_size": size[0] if size[0] == size[1] else size,
        "in_channels": channels + images,
        "out_channels": network["outputs"] * channels,
        "flip_sin_to_cos": not network["sin_first"],
        "freq_shift": network["freq_shift"],
        "down_block_types": types("Down"),
        "up_block_types": types("Up")[::-1],
        "only_cross_attention": list(only_cross) if isinstance(only_cross, tuple) else only_cross,
        "block_out_channels": widths,
        "layers_per_block": network["num_res_blocks"],
        "dropout": network["dropout"],
        "norm_num_groups": groups,
        "norm_eps": network["epsilon"],
        "cross_attention_dim": text.shape[1],
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "attention_head_dim": heads if isinstance(heads, int) else list(heads),
        "use_linear_projection": network["use_linear_projection"],
        "upcast_attention": network["upcast_attention"],
        "num_class_embeds": spec.num_classes + network["null_class"] if spec.num_classes else None,
        "resnet_time_scale_shift": "scale_shift" if network["scale_shift"] else "default",
        "time_cond_proj_dim": network["guidance_features"] if network["scalar_conditions"] else None,
        **(added if ids else {}),
    }


def _conditions(spec: Spec) -> tuple[ConditionSpec, int, int]:
    """Returns the text, the number of time ids, and the channels of images.

    Raises:
      InputError: UNet2DConditionModel does not have these conditions.
    """
    kinds = {kind: [name for name, each in spec.conditions.items() if each.kind == kind] for kind in ("text", "scalar")}
    if not kinds["text"] or kinds["scalar"]:
        problem = "must have a text, and no scalars, to be written for diffusers"
        raise InputError("data.conditions", f"{problem}, got {', '.join(spec.conditions) or 'none'}")
    text = spec.conditions[kinds["text"][0]]
    vectors = {name: each for name, each in spec.conditions.items() if each.kind == "vector"}
    if set(vectors) != ({TIME_IDS} if text.pooled else set()):
        problem = f"must have both {TIME_IDS} and a pooled text, and no other vector, to be written for diffusers"
        raise InputError("data.conditions", f"{problem}, got {', '.join(spec.conditions)}")
    images = sum(each.shape[-1] for each in spec.conditions.values() if each.kind == "image")
    return text, vectors[TIME_IDS].shape[0] if vectors else 0, images


def pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    """Returns the table of arrays and tensors."""
    widths, blocks = widths_of(network), network["num_res_blocks"]
    projection = linear if network["use_linear_projection"] else pointwise

    def attention(native: str, foreign: str) -> list[Pair]:
        layers = [permuted(f"{native}/{part}/kernel", f"{foreign}.to_{part}.weight", 1, 0) for part in "qkv"]
        return [*layers, *linear(f"{native}/out", f"{foreign}.to_out.0")]

    def transformer(native: str, foreign: str, depth: int) -> list[Pair]:
        block = [
            *norm(f"{native}/blocks/blocks/norm1", "norm1"),
            *attention(f"{native}/blocks/blocks/attention", "attn1"),
            *norm(f"{native}/blocks/blocks/norm2", "norm2"),
            *attention(f"{native}/blocks/blocks/cross", "attn2"),
            *norm(f"{native}/blocks/blocks/norm3", "norm3"),
            *linear(f"{native}/blocks/blocks/inner", "ff.net.0.proj"),
            *linear(f"{native}/blocks/blocks/outer", "ff.net.2"),
        ]
        return [
            *norm(f"{native}/norm", f"{foreign}.norm"),
            *projection(f"{native}/proj_in", f"{foreign}.proj_in"),
            *stacked(block, [f"{foreign}.transformer_blocks.{index}." for index in range(depth)]),
            *projection(f"{native}/proj_out", f"{foreign}.proj_out"),
        ]

    def stage(native: str, foreign: str, index: int, depth: int, projected: bool) -> list[Pair]:
        table = residual(f"{native}/residual", f"{foreign}.resnets.{index}", projected)
        return table + (transformer(f"{native}/transformer", f"{foreign}.attentions.{index}", depth) if depth else [])

    table = [
        *linear("embed/time/inner", "time_embedding.linear_1"),
        *linear("embed/time/outer", "time_embedding.linear_2"),
        *conv("conv_in", "conv_in"),
        *norm("norm_out", "conv_norm_out"),
        *conv("conv_out", "conv_out"),
        *stage("middle/first", "mid_block", 0, network["middle_depth"], projected=False),
        *stage("middle/second", "mid_block", 1, 0, projected=False),
    ]
    if network["scalar_conditions"]:
        table.append(permuted("embed/guidance_scale/kernel", "time_embedding.cond_proj.weight", 1, 0))
    if spec.num_classes:
        table.append(same("embed/time/label/embedding", "class_embedding.weight"))
    if TIME_IDS in spec.conditions:
        table += linear("embed/inner", "add_embedding.linear_1") + linear("embed/outer", "add_embedding.linear_2")
    for level, width in enumerate(widths):
        down, up, depth = f"down_blocks.{level}", f"up_blocks.{len(widths) - 1 - level}", network["depth"][level]
        grows = width != widths[max(level - 1, 0)]
        for index in range(blocks):
            table += stage(f"down/{level}_{index}", down, index, depth, projected=grows and index == 0)
        for index in range(blocks + 1):
            table += stage(f"up/{level}_{index}", up, index, depth, projected=True)
        if level + 1 < len(widths):
            table += conv(f"down/{level}_down/conv", f"{down}.downsamplers.0.conv")
        if level:
            table += conv(f"up/{level}_up/conv", f"{up}.upsamplers.0.conv")
    return table
