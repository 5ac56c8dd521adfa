"""Converts between `networks.dit` with a text and `PixArtTransformer2DModel` of diffusers, the transformer of
PixArt-alpha (Chen et al. 2023, arXiv 2310.00426) and PixArt-sigma (Chen et al. 2024, arXiv 2403.04692): options and
tables of tensors."""

from collections.abc import Mapping
from typing import Any

from diffusion.core import model_folder
from diffusion.core.tensors import Pair, Tensors, fused, linear, same, stacked
from diffusion.core.types import ArraySpec, ConditionSpec, InputError, Params, Spec
from diffusion.interop.config_json import check_entries, check_options, outputs
from diffusion.interop.diffusers_dit import LEGACY_DEFAULTS, attention_and_mlp, check_square, patches_in, square_side

NAMES = {"num_heads": "num_attention_heads", "width": "attention_head_dim", "depth": "num_layers",
         "size_embedding": "use_additional_conditions"}  # fmt: skip
LENGTH = 120  # tokens of a text in PixArt-alpha; `config.json` does not have it. PixArt-sigma has 300.
_SIZES = {"resolution": ConditionSpec("vector", (2,)), "aspect_ratio": ConditionSpec("scalar")}
_DEFAULTS = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "dropout": 0.0, "norm_num_groups": 32, "cross_attention_dim": 1152, "attention_bias": True, "sample_size": 128,
    "patch_size": 2, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "upcast_attention": False,
    "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6, "interpolation_scale": None,
    "use_additional_conditions": None, "caption_channels": None, "attention_type": "default",
}  # fmt: skip


def network_of(config: Mapping[str, Any], tensors: Tensors, null_class: bool) -> tuple[dict[str, Any], Spec]:
    """Returns the section `network` of a config, and the specification of the data.

    Args:
      config: The content of `config.json`.
      tensors, null_class: Not used.
    """
    legacy = config["_class_name"] == "Transformer2DModel"
    config = {**(LEGACY_DEFAULTS if legacy else _DEFAULTS), **config}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    check_entries(config, norm_type="ada_norm_single", dropout=0, attention_bias=True, activation_fn="gelu-approximate",
                  norm_elementwise_affine=False, norm_eps=1e-6, cross_attention_dim=width,
                  attention_type="default")  # fmt: skip
    if legacy:
        check_entries(config, num_vector_embeds=None, double_self_attention=False)
    if not config["caption_channels"]:
        raise InputError("config.json.caption_channels", "must be the width of the text encoder's output to be read")
    side = square_side(config)
    has_sizes = config["use_additional_conditions"]
    has_sizes = side == 128 if has_sizes is None else has_sizes
    network = {
        "name": "dit",
        "patch_size": config["patch_size"],
        "width": width,
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "modulation": "single",
        "text_projection": "mlp",
        "null_text": False,
        "size_embedding": has_sizes,
        "interpolation_scale": config["interpolation_scale"] or max(side // 64, 1),
        "outputs": outputs(config),
    }
    conditions = {"text": ConditionSpec("text", (LENGTH, config["caption_channels"])), **(_SIZES if has_sizes else {})}
    return network, Spec(ArraySpec((side, side, config["in_channels"]), "latent"), conditions)


def config_of(network: Mapping[str, Any], spec: Spec, params: Params) -> dict[str, Any]:
    """Returns the content of `config.json`. Raises InputError naming the option that PixArt does not have."""
    check_options(network, mlp_ratio=4, positions="sincos", norm="layer", qk_norm=False, mlp="gelu", freq_shift=0,
                  modulation="single", text="cross", text_projection="mlp", null_text=False,
                  self_conditioning=False)  # fmt: skip
    if network["scalar_conditions"]:
        raise InputError("network.scalar_conditions", "must be empty to be written for diffusers")
    sizes = _SIZES if network["size_embedding"] else {}
    if spec.conditions.keys() != {"text", *sizes} or spec.conditions["text"].pooled:
        expected = ", ".join(["a text without a pooled vector", *sizes])
        raise InputError("data", f"must have as conditions {expected} for a PixArt to be written for diffusers, got "
                         f"{', '.join(spec.conditions)}")  # fmt: skip
    check_square(spec)
    return {
        "_class_name": "PixArtTransformer2DModel",
        "_diffusers_version": model_folder.VERSION,
        **_DEFAULTS,
        "num_attention_heads": network["num_heads"],
        "attention_head_dim": network["width"] // network["num_heads"],
        "in_channels": spec.shape[2],
        "out_channels": network["outputs"] * spec.shape[2],
        "num_layers": network["depth"],
        "cross_attention_dim": network["width"],
        "sample_size": spec.shape[0],
        "patch_size": network["patch_size"],
        # At the size of the data, positions without interpolation are those with the scale 1.
        "interpolation_scale": network["interpolation_scale"] or 1,
        "use_additional_conditions": network["size_embedding"],
        "caption_channels": spec.conditions["text"].shape[1],
    }


def pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    """Returns the table of arrays and tensors."""

    def mlp(native: str, foreign: str) -> list[Pair]:
        return [*linear(f"{native}/inner", f"{foreign}.linear_1"), *linear(f"{native}/outer", f"{foreign}.linear_2")]

    block = [
        same("blocks/blocks/table", "scale_shift_table"),
        *attention_and_mlp(),
        *linear("blocks/blocks/cross/q", "attn2.to_q"),
        *fused("blocks/blocks/cross/kv", ["attn2.to_k", "attn2.to_v"]),
        *linear("blocks/blocks/cross/out", "attn2.to_out.0"),
    ]
    sizes = _SIZES if network["size_embedding"] else {}
    return [
        *stacked(block, [f"transformer_blocks.{index}." for index in range(network["depth"])]),
        *patches_in(network, spec),
        *mlp("embed", "adaln_single.emb.timestep_embedder"),
        *(pair for name in sizes for pair in mlp(f"sizes/{name}", f"adaln_single.emb.{name}_embedder")),
        *linear("modulation", "adaln_single.linear"),
        *mlp("embed/conditions/texts/text", "caption_projection"),
        same("table", "scale_shift_table"),
        *linear("patches_out", "proj_out"),
    ]
