"""Writes the smallest Stable Diffusions as pipelines of diffusers and as single files in the original layout."""

import json
import pathlib

import jax
import numpy as np

from diffusion.core import model_folder, single_file
from diffusion.core.build import build, build_network
from diffusion.core.types import ArraySpec, ConditionSpec, Spec
from diffusion.encoders import autoencoder_folder, text_folder
from diffusion.encoders.autoencoder_folder import Scale
from diffusion.encoders.text_folder import CLIP, PROJECTED
from diffusion.interop import diffusers_models
from diffusion.interop.diffusers_models import Model
from tests.text_folders import CLIP_CONFIG, stored_of, write_clip_tokenizer

UNET = {"name": "unet_text", "width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "depth": (1, 0), "num_heads": 2,
        "groups": 4}  # fmt: skip
VAE = {"name": "autoencoder_kl", "latent_channels": 4, "block_out_channels": (4, 8), "layers_per_block": 1,
       "norm_num_groups": 2}  # fmt: skip
SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
             "timestep_spacing": "leading", "steps_offset": 1}  # fmt: skip
PNDM = {"_class_name": "PNDMScheduler", **SCHEDULER, "prediction_type": "epsilon", "skip_prk_steps": True,
        "set_alpha_to_one": False}  # fmt: skip
EULER = {"_class_name": "EulerDiscreteScheduler", **SCHEDULER, "prediction_type": "epsilon"}
V = {"_class_name": "DDIMScheduler", **SCHEDULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
     "timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}  # fmt: skip
XL = {"use_linear_projection": True, "number_features": 4, "depth": (0, 2), "middle_depth": 2}
GELU = {"hidden_act": "gelu"}
# For each family: options of the U-Net, text encoders with their kinds and changed entries, channels of an image that
# is a condition, and the scheduler.
FAMILIES = {
    "sd1": ({}, {"text_encoder": (CLIP, {})}, 0, PNDM),
    "inpainting": ({}, {"text_encoder": (CLIP, {})}, 5, PNDM),
    "sd2": ({"use_linear_projection": True, "num_heads": (1, 2)}, {"text_encoder": (CLIP, GELU)}, 0, V),
    "sdxl": (XL, {"text_encoder": (CLIP, {}), "text_encoder_2": (PROJECTED, GELU | {"hidden_size": 12})}, 0, EULER),
    "refiner": (XL, {"text_encoder_2": (PROJECTED, GELU | {"projection_dim": 8})}, 0, EULER),
}  # fmt: skip
CLASSES = {
    "sd1": {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False},
    "inpainting": {"_class_name": "StableDiffusionInpaintPipeline", "requires_safety_checker": False},
    "sd2": {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False},
    "sdxl": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    "refiner": {"_class_name": "StableDiffusionXLImg2ImgPipeline", "force_zeros_for_empty_prompt": False},
}
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder", "text_encoder", "tokenizer")
LENGTH, WIDTH, POOLED = 77, CLIP_CONFIG["hidden_size"], CLIP_CONFIG["projection_dim"]  # of the texts


def random_params(shapes):
    """Returns parameters of which none is 0."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 4, shapes)


def write_pipeline(folder: pathlib.Path, family: str) -> str:
    """Writes the folder of a pipeline for images of 16x16 pixels, and returns it as a text."""
    options, encoders, channels, scheduler = FAMILIES[family]
    width = sum(changes.get("hidden_size", WIDTH) for _, changes in encoders.values())
    conditions = {"text": ConditionSpec("text", (LENGTH, width))}
    if family in ("sdxl", "refiner"):
        pooled = WIDTH if family == "refiner" else POOLED
        conditions["text"] = ConditionSpec("text", conditions["text"].shape, pooled=pooled)
        conditions["time_ids"] = ConditionSpec("vector", (5 if family == "refiner" else 6,))
    if channels:
        conditions["image"] = ConditionSpec("image", (8, 8, channels))
    network, spec = UNET | options, Spec(ArraySpec((8, 8, 4), "latent"), conditions)
    shapes = jax.eval_shape(build_network(network, spec).init, jax.random.key(0))
    diffusers_models.write(str(folder / "unet"), Model(network, spec, random_params(shapes)))
    shapes = jax.eval_shape(build("networks", VAE, shape=(16, 16, 3)).init, jax.random.key(0))
    vae = autoencoder_folder.Stored(VAE, random_params(shapes), (16, 16, 3), Scale(0.5))
    autoencoder_folder.write(str(folder / "vae"), vae)
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for name, (kind, changes) in encoders.items():
        text_folder.write(str(folder / name), stored_of(kind, max_position_embeddings=LENGTH, **changes))
        write_clip_tokenizer(folder / name.replace("text_encoder", "tokenizer"))
        parts |= {name: ["transformers", kind]}
        parts[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
        if "hidden_act" in changes:
            path = folder / name.replace("text_encoder", "tokenizer") / "special_tokens_map.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    model_folder.write_json(str(folder / "scheduler"), "scheduler_config.json", scheduler)
    parts["scheduler"] = ["diffusers", scheduler["_class_name"]]
    index = (
        CLASSES[family]
        | {"_diffusers_version": model_folder.VERSION}
        | {name: [None, None] for name in OPTIONAL}
        | parts
    )
    model_folder.write_json(str(folder), "model_index.json", index)
    return str(folder)


def write_single_file(path: pathlib.Path, folder: str, dtype: str = "float32") -> str:
    """Writes the models in the folder of a pipeline as a single file, and returns it as a text."""
    parts = [name for name in model_folder.names(folder) if name.startswith(("unet", "vae", "text_encoder"))]
    configs = {name: model_folder.read_json(f"{folder}/{name}", "config.json") for name in parts}
    configs["scheduler"] = model_folder.read_json(f"{folder}/scheduler", "scheduler_config.json")
    weights = {name: "model.safetensors" if "text" in name else model_folder.WEIGHTS for name in parts}
    tensors = {name: model_folder.open_tensors(f"{folder}/{name}", weights=weights[name]) for name in parts}
    single_file.write(str(path), configs, tensors, dtype, "tiny")
    return str(path)
