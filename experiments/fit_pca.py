"""Fits the linear autoencoder `pca` to the images of a config's `data`.

python -m experiments.fit_pca --config=configs/digits.py --out=runs/digits_pca.safetensors [--patch_size=2 --channels=3]
"""

import os

import numpy as np
from absl import flags

from diffusion.core import files
from diffusion.core.arrays import scaled
from diffusion.core.build import build
from diffusion.core.types import InputError
from diffusion.data.pipeline import in_order
from diffusion.encoders.autoencoders import pca
from experiments import cli

CONFIG = cli.define_config()
OUT = cli.define_path("out", None, "The file to write, .safetensors.")
PATCH_SIZE = flags.DEFINE_integer("patch_size", 2, "The side of a patch, in pixels; a patch becomes a latent pixel.")
CHANNELS = flags.DEFINE_integer("channels", 3, "The number of components, the channels of the latents.")
NUM = flags.DEFINE_integer("num", 10_000, "Number of images to fit to; all if there are fewer.", lower_bound=1)
flags.mark_flags_as_required(["config", "out"])


def main() -> None:
    source = build("data", CONFIG.value["data"], field="data")
    shape = source.spec.shape
    if len(shape) != 3:
        raise InputError("data", f"must be images (H, W, C), got {shape}")
    files.make_folder(os.path.dirname(OUT.value) or ".", "--out")
    num = min(NUM.value, len(source))
    images = scaled(np.stack([example["x"] for example in in_order(source, num)]))
    try:
        params, share = pca.fit(images, PATCH_SIZE.value, CHANNELS.value)
    except InputError as error:
        raise InputError(f"--{error.field}", error.problem) from None
    pca.save(OUT.value, params, shape, PATCH_SIZE.value)
    latent = (shape[0] // PATCH_SIZE.value, shape[1] // PATCH_SIZE.value, CHANNELS.value)
    print(f"{OUT.value}: latents {latent} with {share:.2%} of the variance of {num:,} images; train on them with "
          f"--config.autoencoder.name=pca --config.autoencoder.path={OUT.value}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
