"""Writes the smallest pipelines of Stable Diffusion, SDXL, latent consistency models and PixArt as folders."""

import functools
import json
import pathlib

import jax
import numpy as np

from diffusion.core import model_folder, trees
from diffusion.core.build import build, build_network
from diffusion.core.types import ArraySpec, ConditionSpec, Spec
from diffusion.encoders import autoencoder_folder
from diffusion.encoders.autoencoder_folder import Scale, Stored
from diffusion.encoders.text_folder import CLIP, PROJECTED, T5
from diffusion.interop import diffusers_models
from tests.text_folders import CLIP_CONFIG, T5_CONFIG, stored_of, write_encoder

SIZE = 8  # of the latents; images are twice as large
CLIP_WIDTH, POOLED, T5_WIDTH = CLIP_CONFIG["hidden_size"], CLIP_CONFIG["projection_dim"], T5_CONFIG["d_model"]
VAE = {"name": "autoencoder_kl", "latent_channels": 4, "block_out_channels": (4, 8), "layers_per_block": 1,
       "norm_num_groups": 2}  # fmt: skip
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
PNDM = {"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
DDIM_V = {"_class_name": "DDIMScheduler", **BETAS, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
          "prediction_type": "v_prediction"}  # fmt: skip
EULER = {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "leading", "steps_offset": 1}
TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", **BETAS, "timestep_spacing": "trailing"}
SD_TURBO = {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "trailing"}
LCM = {"_class_name": "LCMScheduler", **BETAS}
DPM = {"_class_name": "DPMSolverMultistepScheduler", **BETAS, "beta_schedule": "linear", "beta_start": 1e-4,
       "beta_end": 0.02}  # fmt: skip

UNET = {"name": "unet_text", "width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "depth": (1, 0), "num_heads": 2,
        "groups": 4}  # fmt: skip
UNET_2 = UNET | {"num_heads": (2, 4), "use_linear_projection": True, "upcast_attention": True}
UNET_XL = UNET | {"num_heads": (2, 4), "use_linear_projection": True, "depth": (0, 2), "middle_depth": 2,
                  "number_features": 8}  # fmt: skip
PIXART = {"name": "dit", "patch_size": 2, "width": 16, "depth": 2, "num_heads": 2, "modulation": "single",
          "text_projection": "mlp", "null_text": False, "interpolation_scale": 1, "outputs": 2}  # fmt: skip
TEXT = {"text": ConditionSpec("text", (77, CLIP_WIDTH))}
TEXT_XL = {
    "time_ids": ConditionSpec("vector", (6,)),
    "text": ConditionSpec("text", (77, 2 * CLIP_WIDTH), pooled=POOLED),
}
# Pooled vectors of the refiner are as wide as its tokens.
TEXT_REFINER = {"time_ids": ConditionSpec("vector", (5,)),
                "text": ConditionSpec("text", (77, CLIP_WIDTH), pooled=CLIP_WIDTH)}  # fmt: skip


def image(channels):
    return {"image": ConditionSpec("image", (SIZE, SIZE, channels))}


# For each kind: the class, the network, its conditions, the scheduler, and the text encoders.
ONE, TWO = {"text_encoder": CLIP}, {"text_encoder": CLIP, "text_encoder_2": PROJECTED}
KINDS = {
    "sd15": ("StableDiffusionPipeline", UNET, TEXT, PNDM, ONE),
    "sd21": ("StableDiffusionPipeline", UNET_2, TEXT, DDIM_V, ONE),
    "sd_turbo": ("StableDiffusionPipeline", UNET_2, TEXT, SD_TURBO, ONE),
    "inpainting": ("StableDiffusionInpaintPipeline", UNET, TEXT | image(5), PNDM, ONE),
    "pix2pix": ("StableDiffusionInstructPix2PixPipeline", UNET, TEXT | image(4), SD_TURBO, ONE),
    "lcm": ("LatentConsistencyModelPipeline",
            UNET | {"scalar_conditions": ("guidance_scale",), "guidance_features": 6}, TEXT, LCM, ONE),
    "sdxl": ("StableDiffusionXLPipeline", UNET_XL, TEXT_XL, EULER, TWO),
    "sdxl_turbo": ("StableDiffusionXLPipeline", UNET_XL, TEXT_XL, TURBO, TWO),
    "refiner": ("StableDiffusionXLImg2ImgPipeline", UNET_XL, TEXT_REFINER, EULER, {"text_encoder_2": PROJECTED}),
    "pixart": ("PixArtAlphaPipeline", PIXART, {"text": ConditionSpec("text", (120, T5_WIDTH))}, DPM,
               {"text_encoder": T5}),
    "pixart_sigma": ("PixArtSigmaPipeline", PIXART, {"text": ConditionSpec("text", (300, T5_WIDTH))}, DPM,
                     {"text_encoder": T5}),
}  # fmt: skip


def random_like(shapes, seed=0):
    """Returns random arrays of these shapes, of which those named `scale` are about 1."""
    rng = np.random.default_rng(seed)

    def draw(path, like):
        values = rng.normal(size=like.shape).astype(np.float32) / 4
        return values + 1 if trees.path_name(path).endswith("scale") else values

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def model_of(kind):
    """Returns the network of a pipeline."""
    _, network, conditions, _, _ = KINDS[kind]
    spec = Spec(ArraySpec((SIZE, SIZE, 4), "latent"), conditions)
    shapes = jax.eval_shape(build_network(network, spec).init, jax.random.key(0))
    return diffusers_models.Model(network, spec, random_like(shapes))


def write_pipeline(folder: pathlib.Path, kind: str, scheduler: dict | None = None) -> str:
    """Writes a pipeline, with the scheduler of its kind or another one; returns the folder as a text."""
    name, _, _, its_scheduler, encoders = KINDS[kind]
    scheduler = scheduler or its_scheduler
    model = model_of(kind)
    component = "unet" if model.network["name"] == "unet_text" else "transformer"
    written = diffusers_models.write(str(folder / component), model)
    shape = (2 * SIZE, 2 * SIZE, 3)
    params = random_like(jax.eval_shape(build("networks", VAE, shape=shape).init, jax.random.key(0)), 1)
    autoencoder_folder.write(str(folder / "vae"), Stored(VAE, params, shape, Scale(0.5)))
    parts = {component: ["diffusers", written], "vae": ["diffusers", "AutoencoderKL"],
             "scheduler": ["diffusers", scheduler["_class_name"]]}  # fmt: skip
    for number, (part, encoder) in enumerate(encoders.items()):
        changes = {"hidden_act": "gelu"} if encoder == PROJECTED else {}
        changes |= {"projection_dim": CLIP_WIDTH} if kind == "refiner" else {}
        tokenizer = part.replace("text_encoder", "tokenizer")
        write_encoder(folder / part, stored_of(encoder, seed=number, **changes), folder / tokenizer)
        parts[part] = ["transformers", encoder]
        parts[tokenizer] = ["transformers", "T5TokenizerFast" if encoder == T5 else "CLIPTokenizer"]
    if "XL" in name:
        parts = {"text_encoder": [None, None], "tokenizer": [None, None], "force_zeros_for_empty_prompt": True} | parts
    elif "PixArt" not in name:
        parts |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    model_folder.write_json(str(folder / "scheduler"), "scheduler_config.json", scheduler)
    about = {"_class_name": name, "_diffusers_version": model_folder.VERSION}
    (folder / "model_index.json").write_text(json.dumps(about | parts))
    return str(folder)
