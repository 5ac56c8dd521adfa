"""Normalisation. Statistics are taken in float32 whatever the compute dtype."""

import math
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from diffusion.core.types import Array
from diffusion.layers.keys import Keys


def group_norm(channels: int, groups: int | None = None, epsilon: float = 1e-5, *, dtype, rngs: Keys):
    """Group normalisation; `groups` None is as many as `usual_groups` says."""
    groups = usual_groups(channels) if groups is None else groups
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs)


def usual_groups(channels: int) -> int:
    """32, or as many as divide both that and the channels, of at least 4 channels."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return groups


def layer_norm(x: Array, kind: Literal["layer", "rms"], epsilon: float = 1e-6) -> Array:
    """Normalisation over the last axis without parameters: to mean 0 and variance 1, or (`rms`) to mean square 1."""
    y = x.astype(jnp.float32)
    if kind == "layer":
        y -= jnp.mean(y, axis=-1, keepdims=True)
    return (y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
