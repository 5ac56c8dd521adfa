"""Normalisation. Statistics are taken in float32 whatever the compute dtype."""

import math

from flax import nnx


def group_norm(channels: int, *, dtype, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group normalisation with 32 groups, or as many as divide both that and the channels, of at least 4 channels."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=1e-5, dtype=dtype, rngs=rngs)
