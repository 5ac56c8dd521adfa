"""Writes the smallest variational autoencoders as model folders of diffusers."""

import jax
import numpy as np

from diffusion.core.build import build
from diffusion.encoders import autoencoder_folder
from diffusion.encoders.autoencoder_folder import Scale, Stored

VAE = {"name": "autoencoder_kl", "latent_channels": 2, "block_out_channels": (4, 4), "layers_per_block": 1,
       "norm_num_groups": 2, "mid_block_add_attention": False}  # fmt: skip


def write_vae(folder, shape):
    """Writes an autoencoder for images of a shape, which halves their sides, and returns the folder as a text."""
    shapes, rng = jax.eval_shape(build("networks", VAE, shape=shape).init, jax.random.key(0)), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 4, shapes)
    autoencoder_folder.write(str(folder), Stored(VAE, params, shape, Scale(2.0)))
    return str(folder)
