"""What multistep and exponential solvers share: integrals over a step of the polynomial through known values."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand
from diffusion.core.types import Array, InputError

# On [0, 1]; exact to rounding for the kernels here up to steps of 20 in log-SNR, without the cancellation of their
# closed forms at small steps.
_POINTS, _WEIGHTS = (half / 2 for half in np.polynomial.legendre.leggauss(24))
_POINTS = _POINTS + 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The last K values of a quantity, newest first, and where each was taken.

    Attributes:
      values: `[K, B, ...]`.
      nodes: `[K]`.
    """

    values: Array
    nodes: Array

    @staticmethod
    def empty(length: int, x: Array, times: Array) -> "History":
        return History(jnp.zeros((length, *x.shape), x.dtype), jnp.zeros(length, times.dtype))

    def push(self, value: Array, node: Array) -> "History":
        return History(
            jnp.concatenate([value[None], self.values[:-1]]),
            jnp.concatenate([node[None], self.nodes[:-1]]),
        )


def check_steps(times: Array, order: int) -> int:
    """The number of steps, which is at least the order."""
    steps = len(times) - 1
    if steps < order:
        raise InputError("sampler.steps", f"must be at least the sampler's order {order}, got {steps}")
    return steps


def integrals(nodes: Array, valid: Array, kernel: Callable[[Array], Array]) -> Array:
    """The weights w `[K]` with `integral over [0, 1] of kernel p = sum_k w_k p(nodes_k)` for every polynomial p through
    the valid nodes: Adams' method, and with an exponential kernel its exponential forms.

    Args:
      nodes: `[K]`, where values are known, in steps: 0 is the step's start and 1 its end.
      valid: `[K]` bool. The others get the weight 0; their nodes may be anything.
      kernel: of the points in [0, 1].
    """
    nodes = jnp.where(valid, nodes, 0)
    others = valid[None, :] & ~jnp.eye(len(nodes), dtype=bool) & valid[:, None]
    gap = jnp.where(others, nodes[:, None] - nodes[None, :], 1)
    points = jnp.asarray(_POINTS, nodes.dtype)
    factors = jnp.where(others[:, :, None], (points - nodes[:, None])[None] / gap[:, :, None], 1)
    basis = jnp.where(valid[:, None], jnp.prod(factors, axis=1), 0)
    return basis @ (jnp.asarray(_WEIGHTS, nodes.dtype) * kernel(points))


def differences(values: Array, weights: Array) -> Array:
    """`sum_k weights_k (values_k - values_0)` for values `[K, B, ...]`. What has no weight may be anything."""
    terms = expand(weights[1:], values[1:]) * (values[1:] - values[0])
    return jnp.sum(jnp.where(expand(weights[1:] != 0, terms), terms, 0), axis=0).astype(values.dtype)
