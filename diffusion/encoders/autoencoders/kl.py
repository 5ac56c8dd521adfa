"""Variational autoencoders of latent diffusion in folders of diffusers (`AutoencoderKL`): those of Stable Diffusion and
Flux, among others."""

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
      path: The folder, with `config.json` and safetensors, or that of a pipeline; or a single file of Stable
        Diffusion.
      variant: The variant of the weights, such as `fp16`; None: the weights without one, or the only ones.
      tile: Encodes and decodes overlapping tiles of this side in pixels and blends them, where images are larger; None:
        the image as a whole. The result differs slightly, because every tile has its own statistics.
      overlap: The share of a tile that overlaps with the next, in [0, 0.5].
      slices: Encodes and decodes one image at a time.
      dtype: The compute dtype. Half precision overflows in some of these networks and is not offered.
      weights: Whether to read the weights; given by the caller. A plan does without them and needs `config.json` alone.

    Raises:
      InputError: The folder cannot be read, or its model is not supported or not for images of this shape.
    """
    return frozen(path, "autoencoder_kl", shape, variant=variant, tile=tile, overlap=overlap, slices=slices,
                  dtype=dtype, weights=weights)  # fmt: skip
