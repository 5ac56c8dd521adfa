"""Writes the smallest pipelines of Stable Diffusion as folders of diffusers, and images with captions for them."""

import json
import pathlib

import jax
import numpy as np
from PIL import Image

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, ConditionSpec, Spec
from diffusion.interop import diffusers_models, schedulers
from diffusion.interop.diffusers_models import Model
from tests.text_folders import CLIP_CONFIG, stored_of, write_encoder
from tests.vae_folders import VAE, write_vae

SIDE = 16  # of images
UNET = {"name": "unet_text", "width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "depth": (0, 1),
        "middle_depth": 1, "num_heads": 2, "groups": 4}  # fmt: skip
OBJECTIVE = {"name": "denoising", "schedule": {"name": "vp", "betas": "scaled_linear"},
             "parameterization": {"name": "eps", "c_noise": "index"}, "time_sampler": {"name": "discrete"}}  # fmt: skip


def write_pipeline(folder: pathlib.Path) -> str:
    """Writes a StableDiffusionPipeline with random weights, and returns the folder as a text.

    The autoencoder halves the sides of images and has two channels of latents.
    """
    write_vae(folder / "vae", (SIDE, SIDE, 3))
    write_encoder(folder / "text_encoder", stored_of("CLIPTextModel"), folder / "tokenizer")
    text = ConditionSpec("text", (CLIP_CONFIG["max_position_embeddings"], CLIP_CONFIG["hidden_size"]))
    latents = (SIDE // 2, SIDE // 2, VAE["latent_channels"])
    spec, rng = Spec(ArraySpec(latents, "latent"), {"text": text}), np.random.default_rng(0)
    network = build("networks", UNET, shape=latents, conditions=spec.conditions)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / 5).astype(np.float32), shapes)
    diffusers_models.write(str(folder / "unet"), Model(UNET, spec, params))
    scheduler, _ = schedulers.write({"objective": OBJECTIVE}, 1, splits=False)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    parts = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
             "scheduler": ("diffusers", scheduler["_class_name"]), "text_encoder": ("transformers", "CLIPTextModel"),
             "tokenizer": ("transformers", "CLIPTokenizer"), "safety_checker": (None, None),
             "feature_extractor": (None, None)}  # fmt: skip
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index | parts))
    return str(folder)


def write_captioned(folder: pathlib.Path, num: int = 20) -> str:
    """Writes pictures of coloured shapes with captions, of which every fourth is wide; returns the folder as a text."""
    source = build("data", {"name": "shapes", "size": 2 * SIDE, "captions": True, "length": num})
    folder.mkdir(parents=True)
    for index in range(num):
        image = Image.fromarray(np.round(127.5 * (source[index]["x"] + 1)).astype(np.uint8))
        if index % 4 == 0:
            image = image.resize((3 * SIDE, 2 * SIDE))
        image.save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(source[index]["caption"])
    return str(folder)
