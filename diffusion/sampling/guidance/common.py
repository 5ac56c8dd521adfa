"""What the functions of guidance share."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import fold, kept, per_example
from diffusion.core.types import (
    LABEL_NOISE,
    NULL,
    PREVIOUS_X0,
    SCALAR_CONDITIONS,
    Array,
    Cond,
    Denoised,
    Denoiser,
    InputError,
)

Traced = float | Array  # a number that may change without recompilation
_GUIDANCE = np.uint32(2**32 - 2)  # folded into the keys of samples; the sampling loop folds in the numbers of the steps


def conditional_and_unconditional(
    denoise: Denoiser, x: Array, t: Array, cond: Cond, negative: Cond | None
) -> tuple[Denoised, Array]:
    """Returns the prediction with the condition, and x0 without it (or with the negative one).

    Both are evaluated as one batch of 2B, in which the two rows of an example are adjacent, so that a batch that is
    sharded over devices stays in place.
    """
    doubled = jax.tree.map(lambda value: jnp.repeat(value, 2, axis=0), dict(cond))
    if not negative:
        first = jnp.tile(jnp.array([True, False]), x.shape[0])
        # What the caller drops stays dropped: there, the prediction is the unconditional one at every scale.
        if isinstance(cond.get("keep"), Mapping):
            doubled["keep"] = {name: first & kept(doubled, name) for name in names(cond)}
        else:
            doubled["keep"] = first & kept(doubled)
    else:
        for name, value in negative.items():
            if name not in cond:
                raise InputError("guidance.negative", f"must name conditions of the model, got {name!r}")
            doubled[name] = jax.tree.map(lambda rows, value: rows.at[1::2].set(value), doubled[name], value)
        if LABEL_NOISE in doubled:
            noise = doubled[LABEL_NOISE]
            doubled[LABEL_NOISE] = noise._replace(gamma=noise.gamma.at[1::2].set(1))
    both = denoise(jnp.repeat(x, 2, axis=0), jnp.repeat(per_example(t, x), 2, axis=0), doubled)
    conditional = jax.tree.map(lambda rows: rows[0::2], both)
    return dataclasses.replace(conditional, conditional=conditional.x0), both.x0[1::2]


def names(cond: Cond) -> list[str]:
    """Returns the names of the conditions of the data."""
    return sorted(cond.keys() - {"keep", "target_time", NULL, PREVIOUS_X0, LABEL_NOISE, *SCALAR_CONDITIONS})


def dot(a: Array, b: Array) -> Array:
    """Returns the inner product per example, `[B]`."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def time_of(t: Array, x: Array) -> Array:
    """Returns one time per example, `[B]`: the mean of the times of its frames, if they have any."""
    return jnp.float32(per_example(t, x)).reshape(x.shape[0], -1).mean(axis=1)


def keys_at(keys: Array, t: Array, index: int) -> Array:
    """Returns keys `[B]` for the random numbers of guidance at times `[B]`.

    They are functions of the sample and the time, so that a guided denoiser is one too, whichever sampler calls it.

    Args:
      keys: The keys of the samples, `[B]`.
      index: Distinguishes several random numbers.
    """
    bits = jax.lax.bitcast_convert_type(t, jnp.uint32)
    return jax.vmap(jax.random.fold_in)(fold(fold(keys, _GUIDANCE), index), bits)


def statistics(value: Array, where: Array | None = None) -> tuple[Array, Array]:
    """Returns the mean and the standard deviation of each example, `[B, 1, ...]`, of the entries `where` is True."""
    options = {"axis": tuple(range(1, value.ndim)), "keepdims": True, "where": where}
    return jnp.mean(value, **options), jnp.std(value, **options)
