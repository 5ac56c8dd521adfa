"""Small array helpers that many parts share."""

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.types import NULL, PREVIOUS_X0, Array, Cond


def expand(a: Array, x: Array) -> Array:
    """Returns a coefficient `[]`, `[B]` or `[B, T]` with trailing axes of size 1, to multiply `x [B, T, ...]`."""
    return jnp.reshape(a, jnp.shape(a) + (1,) * (x.ndim - jnp.ndim(a)))


def kept(cond: Cond, name: str | None = None) -> Array | bool:
    """Returns where a condition is kept, `[B]` bool or True; without a name, where any condition is."""
    keep = cond.get("keep", True)
    if name == PREVIOUS_X0:
        return True
    if not isinstance(keep, Mapping):
        return keep
    return functools.reduce(operator.or_, keep.values(), False) if name is None else keep.get(name, True)


def with_null(cond: Cond) -> Cond:
    """Returns conditions in which the values of `cond["null"]` have replaced those that are not kept, without `null`.

    The conditions that it names are all kept then, so that the network's own null values do not replace them.
    """
    if NULL not in cond:
        return cond
    values, keep = {name: value for name, value in cond.items() if name not in (NULL, "keep")}, cond.get("keep", {})
    keep = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(values, keep)
    for name, null in cond[NULL].items():
        is_kept = jnp.asarray(kept(cond, name))
        values[name] = jax.tree.map(
            lambda value, null, is_kept=is_kept: jnp.where(expand(is_kept, value), value, null.astype(value.dtype)),
            values[name], null,
        )  # fmt: skip
        keep.pop(name, None)
    return {**values, "keep": keep} if keep else values


def scaled(x: Array | np.ndarray) -> Array | np.ndarray:
    """Returns data as the model sees them: 8-bit values as float32 in [-1, 1], and other values unchanged.

    The result is NumPy's float32 `x / 127.5 - 1` on every backend. Compilers replace this division by a multiplication
    and fuse the subtraction with it, which round differently. Here every operation is exact.
    """
    if x.dtype != np.uint8:
        return x
    x = x.astype(np.int32)
    return (131_586 * x + (x > 63) + (x > 127) - 2**24).astype(np.float32) * np.float32(2.0**-24)


def per_example(t: Array, x: Array) -> Array:
    """Returns times `[]`, `[B]` or `[B, T]` with the batch axis of `x [B, ...]`: `[]` becomes `[B]`."""
    return jnp.broadcast_to(t, x.shape[: max(jnp.ndim(t), 1)])


def flat_mean(x: Array, keep: int = 1) -> Array:
    """Returns the mean over all axes but the first `keep`."""
    return jnp.mean(x, axis=tuple(range(keep, x.ndim)))


class PartialMean(NamedTuple):
    """A metric of a part of a batch, which may be empty; `float(...)` is NaN then.

    The device returns the two sums, so that it computes no NaN, and so that micro-batches are averaged correctly.
    """

    total: Array
    count: Array

    def __float__(self) -> float:
        return float(self.total) / float(self.count) if self.count else math.nan


def is_empty(value: Any) -> bool:
    """Returns whether a metric is the mean of no examples."""
    return isinstance(value, PartialMean) and not value.count


def mean_where(x: Array, where: Array) -> PartialMean:
    """Returns the mean of `x [B]` where a condition `[B]` holds."""
    return PartialMean(jnp.sum(x, where=where), jnp.sum(where, dtype=x.dtype))


def sample_keys(key: Array, indices: Array) -> Array:
    """Returns one key per sample, `[N]`, derived from the samples' global indices.

    A sample therefore does not depend on the batch that it is drawn in.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def fold(keys: Array, data: Array | int) -> Array:
    """Folds one number into each of the keys `[N]`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def normal(keys: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Draws standard normal noise `[N, *shape]`, each sample from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def derivative(function: Callable[[Array], Array], t: Array) -> Array:
    """Returns d function / dt at each `t [...]`, for an elementwise function such as `schedule.alpha`."""
    t = jnp.asarray(t)
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]
