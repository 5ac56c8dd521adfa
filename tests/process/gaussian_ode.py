"""The exact solution of the probability-flow ODE for Gaussian data."""

import jax.numpy as jnp

from diffusion.core.arrays import expand
from diffusion.core.types import Array


def gaussian_ode_map(
    x: Array,
    mean: Array | float,
    std: Array | float,
    alpha_t: Array | float,
    sigma_t: Array | float,
    alpha_s: Array | float,
    sigma_s: Array | float,
) -> Array:
    """Maps x from time t to time s along the ODE (Song et al. 2021, arXiv 2011.13456, eq. 13).

    For data N(mean, std^2 I), the map preserves each point's distance from the mean in units of the marginal standard
    deviation.

    Args:
      x: `[B, ...]`.
      mean: Mean of the data, with the shape of one example or a scalar.
      std: Standard deviation of the data in every direction; a scalar.
      alpha_t, sigma_t, alpha_s, sigma_s: The schedule at both times, scalars or `[B]`.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = (expand(a, x) for a in (alpha_t, sigma_t, alpha_s, sigma_s))
    std_t = jnp.sqrt(alpha_t**2 * std**2 + sigma_t**2)
    std_s = jnp.sqrt(alpha_s**2 * std**2 + sigma_s**2)
    return alpha_s * mean + (x - alpha_t * mean) * (std_s / std_t)
