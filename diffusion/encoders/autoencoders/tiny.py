"""Tiny autoencoders of the latents of Stable Diffusion in folders of diffusers (`AutoencoderTiny`, TAESD)."""

from typing import Literal

from diffusion.core.types import Autoencoder
from diffusion.encoders.autoencoder_folder import frozen


def make(
    shape: tuple[int, ...],
    path: str,
    variant: str | None = None,
    tile: int | None = None,
    overlap: float = 0.25,
    slices: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    weights: bool = True,
) -> Autoencoder:
    """Reads an autoencoder, without pickles.

    Args:
      shape: `(H, W, C)`; given by the data.
      path: The folder, with `config.json` and safetensors, or that of a pipeline.
      variant, tile, overlap, slices, dtype, weights: See `encoders.autoencoders.kl.make`.

    Raises:
      InputError: The folder cannot be read, or its model is not supported or not for images of this shape.
    """
    return frozen(path, "autoencoder_tiny", shape, variant=variant, tile=tile, overlap=overlap, slices=slices,
                  dtype=dtype, weights=weights)  # fmt: skip
