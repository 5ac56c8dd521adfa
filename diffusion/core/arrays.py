"""Small array helpers that many parts share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.core.types import Array


def expand(a: Array, x: Array) -> Array:
    """A coefficient per example, `[B]` or `[]`, with trailing axes of one, so that it multiplies `x [B, ...]`."""
    return jnp.reshape(a, jnp.shape(a) + (1,) * (x.ndim - jnp.ndim(a)))


def flat_mean(x: Array) -> Array:
    """The mean over all axes but the first."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def sample_keys(key: Array, indices: Array) -> Array:
    """One key a sample, `[N]`, by the samples' global indices: the same sample whatever batch it is drawn in."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def fold(keys: Array, data: Array | int) -> Array:
    """Folds one number into each of the keys `[N]`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def normal(keys: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Standard normal noise `[N, *shape]`, each sample from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def derivative(function: Callable[[Array], Array], t: Array) -> Array:
    """d function / dt at each of `t [...]`, for a function of each entry by itself (`schedule.alpha`, say)."""
    t = jnp.asarray(t)
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]
