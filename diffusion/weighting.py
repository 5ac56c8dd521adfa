"""Weights of the loss, by name: `simple()(schedule, row, t)` gives `[B]`, which multiplies the mean squared error of
the network's output F. A weight w on the error of x0 is w c_out^2 there."""

from collections.abc import Callable

import jax.numpy as jnp

from diffusion.parameterization import Row
from diffusion.types import Array, Schedule

Weighting = Callable[[Schedule, Row, Array], Array]


def simple() -> Weighting:
    """1 on F, whatever F is (Ho et al. 2020, eq. 14)."""
    return lambda schedule, row, t: jnp.ones_like(t)
