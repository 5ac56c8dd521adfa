"""A linear layer whose gradients are fast on CPUs."""

import functools
from typing import Any

import jax
from flax import nnx

from diffusion.core.types import Array


def _dot_general(x: Array, kernel: Array, dimension_numbers: Any, **keywords: Any) -> Array:
    """Multiplies x `[..., n]` by a kernel `[n, m]`.

    On a single CPU device x becomes a matrix first: XLA computes the two products of the backward pass together, and
    takes up to twice as long if x has more than two axes. On other devices its axes may be sharded, so they stay.
    """
    if x.ndim == 2 or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return jax.lax.dot_general(x, kernel, dimension_numbers, **keywords)
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **keywords)
    return y.reshape(*x.shape[:-1], y.shape[-1])


Linear = functools.partial(nnx.Linear, dot_general=_dot_general)
