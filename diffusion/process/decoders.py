"""Discrete decoders: the likelihood of 8-bit (or other discrete) data given a continuous estimate."""

import jax
import jax.numpy as jnp

from diffusion.core.types import Array


def level_log_likelihood(x: Array, seen: Array, std: Array, levels: int) -> Array:
    """Returns log p(x | seen) elementwise (Kingma et al. 2021, eq. 8 and its appendix).

    Args:
      x: Data, each entry one of `levels` evenly spaced values from -1 to 1.
      seen: Noisy observations, normally distributed around x.
      std: Standard deviation of `seen`.
      levels: Number of values.
    """
    values = jnp.linspace(-1, 1, levels, dtype=x.dtype)
    logits = -(((seen[..., None] - values) / std) ** 2) / 2
    chosen = jnp.round((x + 1) * (levels - 1) / 2).astype(jnp.int32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), chosen[..., None], axis=-1)[..., 0]


def discretized_log_likelihood(x: Array, mean: Array, std: Array, levels: int) -> Array:
    """Returns the log of the mass of N(mean, std^2) in the bin of x, elementwise (Ho et al. 2020, eq. 13).

    The bins lie around `levels` evenly spaced values from -1 to 1; the outer bins extend to infinity.
    """
    half = 1 / (levels - 1)
    upper, lower = (x - mean + half) / std, (x - mean - half) / std
    # Mirror to the lower tail, where the difference of the CDFs does not cancel.
    flip = upper + lower > 0
    upper, lower = jnp.where(flip, -lower, upper), jnp.where(flip, -upper, lower)
    at_top, at_bottom = x > 1 - half, x < -1 + half
    upper = jnp.where(jnp.where(flip, at_bottom, at_top), jnp.inf, upper)
    lower = jnp.where(jnp.where(flip, at_top, at_bottom), -jnp.inf, lower)
    log_upper, log_lower = jax.scipy.stats.norm.logcdf(upper), jax.scipy.stats.norm.logcdf(lower)
    gap = jnp.minimum(log_lower - log_upper, -1e-7)
    return log_upper + jnp.log1p(-jnp.exp(gap))
