"""Laws of t in training, by name: `uniform()(schedule, key, n)` draws t `[n]` in (0, 1]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.types import Array, Schedule

Times = Callable[[Schedule, Array, int], Array]


def uniform() -> Times:
    """Independent and uniform on (0, 1]."""
    return lambda schedule, key, n: 1 - jax.random.uniform(key, (n,))


def stratified() -> Times:
    """One shared uniform offset on an even lattice: uniform for each example, low-discrepancy over the batch, so the
    loss has less variance (Kingma et al. 2021, arXiv 2107.00630, appendix I.1)."""
    return lambda schedule, key, n: 1 - (jax.random.uniform(key) + jnp.arange(n) / n) % 1
