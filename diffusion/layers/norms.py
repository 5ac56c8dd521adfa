"""Normalisation layers. Their statistics are computed in float32 for every compute dtype."""

import math
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from diffusion.core.types import Array
from diffusion.layers.keys import Keys


def group_norm(channels: int, groups: int | None = None, epsilon: float = 1e-5, *, dtype: Any, rngs: Keys):
    """Returns a group normalisation layer with `groups` groups, by default `default_groups(channels)`."""
    groups = default_groups(channels) if groups is None else groups
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs)


def default_groups(channels: int) -> int:
    """Returns the largest power of 2 up to 32 that divides the channels into groups of at least 4, or 1."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return groups


def layer_norm(x: Array, kind: Literal["layer", "rms"], epsilon: float = 1e-6) -> Array:
    """Normalises over the last axis, without parameters: to mean 0 and variance 1, or (`rms`) to mean square 1."""
    y = x.astype(jnp.float32)
    if kind == "layer":
        y -= jnp.mean(y, axis=-1, keepdims=True)
    return (y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
