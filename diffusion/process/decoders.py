"""Discrete decoders: the likelihood of 8-bit (or other discrete) data given a continuous estimate."""

import jax
import jax.numpy as jnp

from diffusion.core.types import Array


def level_log_likelihood(x: Array, seen: Array, std: Array, levels: int) -> Array:
    """log p(x | seen), entry by entry, for x one of `levels` even values from -1 to 1 and `seen` normal around it
    (Kingma et al. 2021, eq. 8 and its appendix)."""
    values = jnp.linspace(-1, 1, levels, dtype=x.dtype)
    logits = -(((seen[..., None] - values) / std) ** 2) / 2
    chosen = jnp.round((x + 1) * (levels - 1) / 2).astype(jnp.int32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), chosen[..., None], axis=-1)[..., 0]


def discretized_log_likelihood(x: Array, mean: Array, std: Array, levels: int) -> Array:
    """log of the mass that N(mean, std^2) has in the bin of x, entry by entry, for `levels` even values from -1 to 1;
    the outer bins reach to infinity (Ho et al. 2020, eq. 13)."""
    half = 1 / (levels - 1)
    upper, lower = (x - mean + half) / std, (x - mean - half) / std
    # On the side of the tail that does not cancel.
    flip = upper + lower > 0
    upper, lower = jnp.where(flip, -lower, upper), jnp.where(flip, -upper, lower)
    at_top, at_bottom = x > 1 - half, x < -1 + half
    upper = jnp.where(jnp.where(flip, at_bottom, at_top), jnp.inf, upper)
    lower = jnp.where(jnp.where(flip, at_top, at_bottom), -jnp.inf, lower)
    log_upper, log_lower = jax.scipy.stats.norm.logcdf(upper), jax.scipy.stats.norm.logcdf(lower)
    gap = jnp.minimum(log_lower - log_upper, -1e-7)
    return log_upper + jnp.log1p(-jnp.exp(gap))
