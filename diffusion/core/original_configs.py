"""The configs of the models in a file of the original layout of Stable Diffusion, in the form of diffusers.

They follow from the names and shapes of the tensors. What these do not determine, such as the number of heads, is that
of the published models: Stable Diffusion 1.x (`sd1`) and 2.x (`sd2`), SDXL (`sdxl`) and its refiner (`refiner`).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.core.original_layout import Part, count, levels_of
from diffusion.core.tensors import Tensors
from diffusion.core.types import InputError

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family of models.

    Attributes:
      architecture, implementation: What describes it in the metadata `modelspec`.
      encoders: The part and the prefix of each text encoder, by its folder in a pipeline.
      latent_size: The side of the latents.
      scaling_factor: The scale of the latents.
    """

    architecture: str
    implementation: str
    encoders: Mapping[str, tuple[Part, str]]
    latent_size: int
    scaling_factor: float


_FIRST, _SECOND, _XL = (f"https://github.com/{name}" for name in (
    "CompVis/stable-diffusion", "Stability-AI/stablediffusion", "Stability-AI/generative-models"))  # fmt: skip
_EMBEDDERS = "conditioner.embedders."
KINDS = {
    "sd1": Kind("stable-diffusion-v1", _FIRST, {"text_encoder": ("clip", "cond_stage_model.transformer.")},
                64, 0.18215),
    "sd2": Kind("stable-diffusion-v2", _SECOND, {"text_encoder": ("open_clip", "cond_stage_model.model.")},
                64, 0.18215),
    "sdxl": Kind("stable-diffusion-xl-v1-base", _XL, {"text_encoder": ("clip", f"{_EMBEDDERS}0.transformer."),
                 "text_encoder_2": ("open_clip", f"{_EMBEDDERS}1.model.")}, 128, 0.13025),
    "refiner": Kind("stable-diffusion-xl-v1-refiner", _XL, {"text_encoder_2": ("open_clip", f"{_EMBEDDERS}0.model.")},
                    128, 0.13025),
}  # fmt: skip
_LAYERS_OF_SD2 = 24  # of its text encoder, of which it does not use the last
_COND_PROJ = "time_embed.cond_proj.weight"
_HEAD = 64  # width of a head, but in sd1
_V_THRESHOLD = 0.09  # of a standard deviation that tells models of 2.x which predict v; from ComfyUI
_BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
          "trained_betas": None, "steps_offset": 1, "clip_sample": False}  # fmt: skip


def kind_of(unet: Mapping[str, Any], is_open_clip: bool | None) -> str:
    """Returns the family of a model.

    Args:
      unet: The config of its U-Net.
      is_open_clip: Whether its first text encoder is that of OpenCLIP; None if it has none.
    """
    if unet["addition_embed_type"]:
        pooled = unet["projection_class_embeddings_input_dim"] - 5 * unet["addition_time_embed_dim"]
        return "refiner" if pooled == unet["cross_attention_dim"] else "sdxl"
    is_second = unet["use_linear_projection"] if is_open_clip is None else is_open_clip
    return "sd2" if is_second else "sd1"


def unet_config(tensors: Tensors, num_heads: int | list[int] | None = None) -> Config:
    """Returns the config of a `UNet2DConditionModel`, without `sample_size`.

    Args:
      tensors: Those of the U-Net in the original layout, without their prefix.
      num_heads: The number of heads, for all levels or for each. None: 8 for texts of 768 features, as in 1.x, and
        otherwise heads of 64 features.

    Raises:
      InputError: A tensor is missing, or the U-Net is of a kind that is not supported.
    """
    if "label_emb.weight" in tensors:
        raise InputError("tensors.label_emb.weight", "is a table of classes, as of upscalers, which are not supported")
    layers, attends = levels_of(tensors)
    starts = [level * (layers + 1) + 1 for level in range(len(attends))]
    widths = [_shape(tensors, f"input_blocks.{start}.0.out_layers.3.weight", 4)[0] for start in starts]
    depths = [_depth(tensors, f"input_blocks.{start}.1") or 1 for start in starts[:-1]]
    depths.append(_depth(tensors, "middle_block.1"))
    context = _shape(tensors, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    if num_heads is None:
        num_heads = 8 if context == 768 else [width // _HEAD or 1 for width in widths]
    added = {}
    if "label_emb.0.0.weight" in tensors:
        features = _shape(tensors, "label_emb.0.0.weight", 2)[1]
        added = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": features}
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": _shape(tensors, "input_blocks.0.0.weight", 4)[1],
        "out_channels": _shape(tensors, "out.2.weight", 4)[0],
        "down_block_types": [f"{'CrossAttn' * attention}DownBlock2D" for attention in attends],
        "up_block_types": [f"{'CrossAttn' * attention}UpBlock2D" for attention in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "cross_attention_dim": context,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "attention_head_dim": num_heads,
        "use_linear_projection": len(_shape(tensors, "middle_block.1.proj_in.weight")) == 2,
        "upcast_attention": context == 1024,  # Stable Diffusion 2.x, which overflows in half precision
        "addition_embed_type": "text_time" if added else None,
        "time_cond_proj_dim": tensors[_COND_PROJ].shape[1] if _COND_PROJ in tensors else None,
        "norm_num_groups": 32,
        **added,
    }


def vae_config(tensors: Tensors, kind: str) -> Config:
    """Returns the config of an `AutoencoderKL`, without `sample_size`.

    Args:
      tensors: Those of the autoencoder in the original layout, without their prefix.
      kind: The family, which determines the scale of the latents.

    Raises:
      InputError: A tensor is missing.
    """
    levels = range(count(tensors, r"encoder\.down\.(\d+)\."))
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(tensors, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(tensors, "decoder.conv_out.weight", 4)[0],
        "down_block_types": ["DownEncoderBlock2D" for _ in levels],
        "up_block_types": ["UpDecoderBlock2D" for _ in levels],
        "block_out_channels": [_shape(tensors, f"encoder.down.{i}.block.0.conv2.weight", 4)[0] for i in levels],
        "layers_per_block": count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": _shape(tensors, "decoder.conv_in.weight", 4)[1],
        "norm_num_groups": 32,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "scaling_factor": KINDS[kind].scaling_factor,
    }


def text_config(part: Part, tensors: Tensors, kind: str) -> Config:
    """Returns the config of a `CLIPTextModel`, or of a `CLIPTextModelWithProjection` for OpenCLIP's of SDXL.

    Args:
      part: Whose model it is, `clip` or `open_clip`.
      tensors: Those of the text encoder by their names in transformers.
      kind: The family. Stable Diffusion 2.x leaves out the last one of 24 layers.

    Raises:
      InputError: A tensor is missing.
    """
    layers = count(tensors, r"text_model\.encoder\.layers\.(\d+)\.")
    vocabulary, width = _shape(tensors, "text_model.embeddings.token_embedding.weight", 2)
    is_projected = part == "open_clip" and kind != "sd2"
    return {
        "architectures": ["CLIPTextModelWithProjection" if is_projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "torch_dtype": tensors["text_model.embeddings.token_embedding.weight"].dtype.name,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": layers - (kind == "sd2" and layers == _LAYERS_OF_SD2),
        "num_attention_heads": width // _HEAD or 1,
        "max_position_embeddings": _shape(tensors, "text_model.embeddings.position_embedding.weight", 2)[0],
        "projection_dim": _shape(tensors, "text_projection.weight", 2)[0] if is_projected else width,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu" if part == "clip" else "gelu",
        "eos_token_id": 2,  # stands for the largest token
    }


def scheduler_config(kind: str, unet: Mapping[str, Any], prediction: str, zero_snr: bool) -> Config:
    """Returns the content of `scheduler_config.json`: that of the published models of a family.

    Args:
      kind: The family.
      unet: The config of the U-Net, which may be one of latent consistency.
      prediction: `epsilon` or `v_prediction`.
      zero_snr: Whether the last step has no signal.
    """
    config = {**_BETAS, "prediction_type": prediction}
    if zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    else:
        config["timestep_spacing"] = "leading"
    if unet["time_cond_proj_dim"]:
        return {"_class_name": "LCMScheduler", **config, "set_alpha_to_one": True}
    if kind in ("sdxl", "refiner"):
        return {"_class_name": "EulerDiscreteScheduler", **config}
    if kind == "sd2" or zero_snr:  # PNDM has no rescaling
        return {"_class_name": "DDIMScheduler", **config, "set_alpha_to_one": False}
    return {"_class_name": "PNDMScheduler", **config, "set_alpha_to_one": False, "skip_prk_steps": True}


def predicts_v(tensors: Tensors, kind: str) -> bool:
    """Returns whether the U-Net predicts v, where the file does not say so, as for Stable Diffusion 2.x.

    Args:
      tensors: Those of the U-Net in the original layout, without their prefix.
      kind: The family.
    """
    if kind != "sd2":
        return False
    bias = tensors.get("output_blocks.11.1.transformer_blocks.0.norm1.bias")
    return bias is None or np.std(np.float32(bias), ddof=1) > _V_THRESHOLD


def pipeline_config(kind: str, configs: Mapping[str, Config]) -> Config:
    """Returns the content of `model_index.json`, given the configs of the parts by name.

    Raises:
      InputError: The U-Net has another number of input channels than a pipeline.
    """
    unet = configs["unet"]
    added = {0: "", 4: "InstructPix2Pix", 5: "Inpaint"}.get(unet["in_channels"] - unet["out_channels"])
    if added is None:
        problem = f"is for {unet['in_channels']} channels; 4, 8 (InstructPix2Pix) and 9 (inpainting) are supported"
        raise InputError("tensors.input_blocks.0.0.weight", problem)
    name = f"StableDiffusion{'XL' if unet['addition_embed_type'] else ''}{added}Pipeline"
    if kind == "refiner":
        name = "StableDiffusionXLImg2ImgPipeline"
    elif unet["time_cond_proj_dim"]:
        name = "LatentConsistencyModelPipeline"
    index: Config = {"_class_name": name, "text_encoder": [None, None]}  # the refiner has the second one alone
    for part, config in configs.items():
        (kind_name,) = config.get("architectures", [config.get("_class_name")])
        index[part] = ["transformers" if "architectures" in config else "diffusers", kind_name]
    return index | ({"force_zeros_for_empty_prompt": kind == "sdxl"} if unet["addition_embed_type"] else {})


def _depth(tensors: Tensors, attention: str) -> int:
    """Returns how many blocks a transformer has."""
    return count(tensors, rf"{re.escape(attention)}\.transformer_blocks\.(\d+)\.")


def _shape(tensors: Tensors, name: str, ndim: int | None = None) -> tuple[int, ...]:
    """Returns the shape of a tensor that every model of this kind has."""
    if name not in tensors:
        raise InputError(f"tensors.{name}", "is missing; the file is incomplete, or not a Stable Diffusion")
    shape = tensors[name].shape
    if ndim is not None and len(shape) != ndim:
        raise InputError(f"tensors.{name}", f"must have {ndim} dimensions, got the shape {list(shape)}")
    return shape
