"""Converts between `networks.dit` and `DiTTransformer2DModel` of diffusers: options and tables of tensors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.core import model_folder
from diffusion.core.tensors import Pair, Tensors, copies, fused, linear, same, stacked
from diffusion.core.types import InputError, Params, Spec
from diffusion.interop.config_json import check_entries, check_options, data_spec, image_size, outputs

NAMES = {"num_heads": "num_attention_heads", "width": "attention_head_dim", "depth": "num_layers"}
_DEFAULTS = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None, "num_layers": 28,
    "dropout": 0.0, "norm_num_groups": 32, "attention_bias": True, "sample_size": 32, "patch_size": 2,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "upcast_attention": False,
    "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-5,
}  # fmt: skip


# Before diffusers 0.29 a DiT was a `Transformer2DModel`, whose defaults are others, with further options.
LEGACY_DEFAULTS = {
    **_DEFAULTS, "attention_head_dim": 88, "in_channels": None, "num_layers": 1, "attention_bias": False,
    "sample_size": None, "patch_size": None, "activation_fn": "geglu", "num_embeds_ada_norm": None,
    "norm_type": "layer_norm", "norm_elementwise_affine": True, "cross_attention_dim": None, "num_vector_embeds": None,
    "double_self_attention": False, "attention_type": "default", "caption_channels": None,
    "interpolation_scale": None, "use_additional_conditions": None,
}  # fmt: skip


def network_of(config: Mapping[str, Any], tensors: Tensors, null_class: bool) -> tuple[dict[str, Any], Spec]:
    """Returns the section `network` of a config, and the specification of the data.

    Args:
      config: The content of `config.json`.
      tensors: The weights by name, which say whether the blocks share their embedders.
      null_class: Not used: the last row of a DiT's table of classes is always the null class.
    """
    legacy = config["_class_name"] == "Transformer2DModel"
    config = {**(LEGACY_DEFAULTS if legacy else _DEFAULTS), **config}
    check_entries(config, norm_type="ada_norm_zero", dropout=0, attention_bias=True, activation_fn="gelu-approximate",
                  norm_elementwise_affine=False, norm_eps=(1e-5, 1e-6))  # fmt: skip
    if legacy:
        check_entries(config, cross_attention_dim=None, num_vector_embeds=None, double_self_attention=False,
                      attention_type="default", caption_channels=None, use_additional_conditions=(None, False),
                      interpolation_scale=(None, 1))  # fmt: skip
    side = square_side(config)
    if legacy and config["interpolation_scale"] is None and side >= 128:
        problem = "must be 1 to be read; without it the positions of images of this size are interpolated"
        raise InputError("config.json.interpolation_scale", problem)
    network = {
        "name": "dit",
        "patch_size": config["patch_size"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "block_embedders": _differ(tensors, config["num_layers"]),
        "freq_shift": 1,
        "outputs": outputs(config),
    }
    return network, data_spec((side, side), config["in_channels"], config["num_embeds_ada_norm"])


def config_of(network: Mapping[str, Any], spec: Spec, params: Params) -> dict[str, Any]:
    """Returns the content of `config.json`. Raises InputError naming the option that diffusers' DiT does not have."""
    check_options(network, mlp_ratio=4, positions="sincos", norm="layer", qk_norm=False, mlp="gelu", freq_shift=1)
    if spec.conditions.keys() != {"label"}:
        raise InputError("data", "must have classes, and no other conditions, for a DiT to be written for diffusers")
    check_square(spec)
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": model_folder.VERSION,
        **_DEFAULTS,
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


def square_side(config: Mapping[str, Any]) -> int:
    """Returns the side of the images of a transformer."""
    size = image_size(config)
    if size[0] != size[1]:
        raise InputError("config.json.sample_size", f"must be square to be read for a transformer, got {size}")
    return size[0]


def check_square(spec: Spec) -> None:
    """Raises InputError if images are not square, which those of diffusers' transformers are."""
    if spec.shape[0] != spec.shape[1]:
        shape = f"{spec.shape[0]} x {spec.shape[1]}"
        raise InputError("spec.shape", f"must be square for a transformer to be written for diffusers, got {shape}")


def _differ(tensors: Tensors, depth: int) -> bool:
    """Returns whether the embedders of the blocks are not all equal to that of the first."""
    first = "transformer_blocks.0.norm1.emb."
    for name in (name for name in tensors if name.startswith(first)):
        others = (tensors.get(name.replace("blocks.0", f"blocks.{index}")) for index in range(1, depth))
        if not all(other is None or np.array_equal(other, tensors[name]) for other in others):
            return True
    return False


def pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    """Returns the table of arrays and tensors."""
    prefixes = [f"transformer_blocks.{index}." for index in range(network["depth"])]
    where = "embed/blocks" if network["block_embedders"] else "embed"
    embedder = [
        *linear(f"{where}/inner", "norm1.emb.timestep_embedder.linear_1"),
        *linear(f"{where}/outer", "norm1.emb.timestep_embedder.linear_2"),
        same(f"{where}/label/embedding", "norm1.emb.class_embedder.embedding_table.weight"),
    ]
    block = [
        *linear("blocks/blocks/modulation", "norm1.linear"),
        *attention_and_mlp(),
    ]
    return [
        *(stacked if network["block_embedders"] else copies)(embedder, prefixes),
        *stacked(block, prefixes),
        *patches_in(network, spec),
        *linear("modulation", "proj_out_1"),
        *linear("patches_out", "proj_out_2"),
    ]


def attention_and_mlp() -> list[Pair]:
    """Returns the pairs of a block's self-attention and MLP, without the prefix of the block."""
    return [
        *fused("blocks/blocks/qkv", [f"attn1.to_{part}" for part in "qkv"]),
        *linear("blocks/blocks/out", "attn1.to_out.0"),
        *linear("blocks/blocks/up", "ff.net.0.proj"),
        *linear("blocks/blocks/down", "ff.net.2"),
    ]


def patches_in(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    """Returns the pairs of the linear map of patches, a convolution in diffusers."""
    p, C, D = network["patch_size"], spec.shape[2], network["width"]
    kernel = Pair(
        "patches_in/kernel",
        ("pos_embed.proj.weight",),
        lambda tensors: tensors[0].transpose(2, 3, 1, 0).reshape(p * p * C, D),
        lambda array: [array.reshape(p, p, C, D).transpose(3, 2, 0, 1)],
    )
    return [kernel, same("patches_in/bias", "pos_embed.proj.bias")]
