"""Linear operators A, of which `y = A x + noise` is known, with what pseudoinverse guidance needs of them."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.types import Array, InputError
from diffusion.sampling.editing.common import Known

Name = Literal["inpainting", "super_resolution", "deblurring", "colourisation"]


class Operator(NamedTuple):
    """A linear operator.

    Attributes:
      apply: A x, for x `[B, H, W, C]`.
      transpose: A^T y.
      solve: `solve(y, a, b)`: (a A A^T + b)^-1 y.
    """

    apply: Callable[[Array], Array]
    transpose: Callable[[Array], Array]
    solve: Callable[[Array, Array, Array], Array]


def make(name: Name, known: Known, factor: int = 4, blur: float = 2.0) -> Operator:
    """Returns an operator.

    Args:
      name: `inpainting`: the pixels that the mask keeps. `super_resolution`: the means of squares of `factor`
        pixels. `deblurring`: a Gaussian blur that is periodic. `colourisation`: the mean of the channels.
      known: What is known, for its mask and its shape.
      factor: The side of the squares.
      blur: The standard deviation of the blur in pixels.
    """
    if name == "inpainting":
        share = jnp.where(known.is_drawn, 0.0, 1.0)
        return Operator(lambda x: share * x, lambda y: share * y, lambda y, a, b: y / (a + b))
    if name == "super_resolution":
        return _means(factor)
    if name == "colourisation":
        return Operator(
            lambda x: x.mean(-1, keepdims=True),
            lambda y: jnp.repeat(y / CHANNELS, CHANNELS, axis=-1),
            lambda y, a, b: y / (a / CHANNELS + b),
        )
    return _blur(known.image.shape, blur)


CHANNELS = 3


def measured(name: Name, shape: tuple[int, ...], factor: int) -> tuple[int, ...]:
    """Returns the shape of what is measured of an image `(H, W, C)`. Raises InputError if the operator has none."""
    checks.images("editing", shape)
    if name == "super_resolution":
        if any(side % factor for side in shape[:2]):
            raise InputError("factor", f"must divide height and width, {shape[0]} x {shape[1]}, got {factor}")
        return (shape[0] // factor, shape[1] // factor, shape[2])
    if name == "colourisation":
        if shape[-1] != CHANNELS:
            raise InputError("operator", f"colourisation is for images of {CHANNELS} channels, got {shape[-1]}")
        return (*shape[:2], 1)
    return shape


def _means(factor: int) -> Operator:
    def apply(x: Array) -> Array:
        batch, height, width, channels = x.shape
        return x.reshape(batch, height // factor, factor, width // factor, factor, channels).mean((2, 4))

    def transpose(y: Array) -> Array:
        return jnp.repeat(jnp.repeat(y, factor, axis=1), factor, axis=2) / factor**2

    return Operator(apply, transpose, lambda y, a, b: y / (a / factor**2 + b))


def _blur(shape: tuple[int, ...], std: float) -> Operator:
    rows, columns = (jnp.exp(-2 * (jnp.pi * std * jnp.fft.fftfreq(side)) ** 2) for side in shape[1:3])
    response = (rows[:, None] * columns)[None, :, :, None]

    def filtered(x: Array, gain: Array) -> Array:
        return jnp.fft.ifft2(jnp.fft.fft2(x, axes=(1, 2)) * gain, axes=(1, 2)).real.astype(x.dtype)

    def blurred(x: Array) -> Array:
        return filtered(x, response)

    return Operator(blurred, blurred, lambda y, a, b: filtered(y, 1 / (a * response**2 + b)))
