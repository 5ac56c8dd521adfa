"""Samples of another size than the data."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion.core.types import Autoencoder, InputError, Network, Spec

LARGEST = 2**15  # pixels of a side


def resized(
    spec: Spec, network: Network, autoencoder: Autoencoder | None, size: tuple[int, int]
) -> tuple[Spec, Autoencoder | None]:
    """Returns the description of samples of a size, and the autoencoder of their latents.

    Args:
      spec: What the data look like.
      network: The network.
      autoencoder: That of the data, or None.
      size: Height and width of the samples, in pixels with an autoencoder.

    Raises:
      InputError: The samples are no images, the network takes only the size of the data, or a side is not divisible by
        what the network and the autoencoder require.
    """
    if len(spec.shape) != 3:
        raise InputError("size", f"is for images, and samples of shape {spec.shape} are none; leave it out")
    height, width = spec.shape[:2]
    if tuple(size) == (height, width):
        return spec, autoencoder
    if network.multiple is None:
        problem = "since the positions of the network are fixed; leave it out"
        raise InputError("size", f"must be {height} x {width}, the size of the data, {problem}")
    modelled = spec.shape if autoencoder is None else autoencoder.shape
    for name, side, data, inner in zip(("height", "width"), size, spec.shape, modelled, strict=False):
        multiple = data // inner * network.multiple
        if not 0 < side <= LARGEST or side % multiple:
            below = max(min(side, LARGEST) // multiple, 1) * multiple
            problem = f"{name} must be a multiple of {multiple} up to {LARGEST}, got {side}"
            raise InputError("size", f"{problem}; use {below}")
    shape = (*size, spec.shape[2])
    if autoencoder is not None:
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        latents = jax.eval_shape(lambda params, x: autoencoder.encode(params, x, None), autoencoder.params, x)
        autoencoder = dataclasses.replace(autoencoder, shape=latents.shape[1:])
    inner = shape if autoencoder is None else autoencoder.shape
    conditions = {
        name: dataclasses.replace(condition, shape=(*inner[:2], condition.shape[2]))
        if condition.kind == "image"
        else condition
        for name, condition in spec.conditions.items()
    }
    return dataclasses.replace(spec, x=dataclasses.replace(spec.x, shape=shape), conditions=conditions), autoencoder
