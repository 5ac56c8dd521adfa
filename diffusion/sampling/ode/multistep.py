"""Polynomial interpolation over past evaluations, for multistep and exponential solvers.

A step of size 1 in tau integrates `kernel(tau) p(tau)` over [0, 1], where p is the polynomial through the known values
v_k at nodes tau_k. With the Lagrange basis l_k this is a weighted sum of the values:

    integral over [0, 1] of kernel(tau) p(tau) = sum_k w_k v_k,    w_k = integral over [0, 1] of kernel(tau) l_k(tau)

`quadrature_weights` computes w_k numerically for any nodes, so that no solver needs a closed form per order.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand
from diffusion.core.types import Array

# Gauss-Legendre quadrature on [0, 1]. For the kernels here it is exact up to rounding for steps of up to 20 in log-SNR,
# and it avoids the cancellation of their closed forms at small steps.
_POINTS, _WEIGHTS = (half / 2 for half in np.polynomial.legendre.leggauss(24))
_POINTS = _POINTS + 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The last K values of a quantity, newest first, and the nodes at which they were evaluated.

    Attributes:
      values: `[K, B, ...]`.
      nodes: `[K]`.
      count: the number of values that have been pushed, int32.
    """

    values: Array
    nodes: Array
    count: Array

    @staticmethod
    def empty(length: int, x: Array, times: Array) -> "History":
        """Returns a history of zeros, for values like `x [B, ...]` and nodes of the dtype of `times`."""
        return History(jnp.zeros((length, *x.shape), x.dtype), jnp.zeros(length, times.dtype), jnp.int32(0))

    def push(self, value: Array, node: Array) -> "History":
        """Returns the history with a new first entry and without the oldest one."""
        return History(
            jnp.concatenate([value[None], self.values[:-1]]),
            jnp.concatenate([node[None], self.nodes[:-1]]),
            self.count + 1,
        )


def highest_orders(times: Array, order: int, lower_final: bool | None, fewer_than: float = float("inf")) -> Array:
    """Returns the highest order of each step, int32 `[steps]`: `order`, or less at the end, where accuracy is lost to
    stability.

    Args:
      lower_final: whether the order decreases by one per step at the end, to 1 in the last step. None stands for runs
        to the data only.
      fewer_than: longer runs keep the order.
    """
    steps = len(times) - 1
    falling = jnp.asarray(np.minimum(order, steps - np.arange(steps)), jnp.int32)
    falls = times[-1] == 0 if lower_final is None else lower_final
    return jnp.where(falls & (steps < fewer_than), falling, order)


def quadrature_weights(nodes: Array, valid: Array, kernel: Callable[[Array], Array]) -> Array:
    """Returns weights w `[K]` with `integral over [0, 1] of kernel p = sum_k w_k p(nodes_k)`.

    This holds for every polynomial p whose degree is below the number of valid nodes. A constant kernel gives the
    Adams methods, an exponential kernel their exponential counterparts.

    Args:
      nodes: `[K]`, in units of the step: 0 is its start and 1 its end.
      valid: `[K]` bool. The other nodes get weight 0, whatever their values are.
      kernel: a function of tau in [0, 1].
    """
    nodes = jnp.where(valid, nodes, 0)
    others = valid[None, :] & ~jnp.eye(len(nodes), dtype=bool) & valid[:, None]
    gap = jnp.where(others, nodes[:, None] - nodes[None, :], 1)
    points = jnp.asarray(_POINTS, nodes.dtype)
    factors = jnp.where(others[:, :, None], (points - nodes[:, None])[None] / gap[:, :, None], 1)
    basis = jnp.where(valid[:, None], jnp.prod(factors, axis=1), 0)
    return basis @ (jnp.asarray(_WEIGHTS, nodes.dtype) * kernel(points))


def weighted_differences(values: Array, weights: Array) -> Array:
    """Returns `sum_k weights_k (values_k - values_0)` for values `[K, B, ...]`.

    Entries of weight 0 do not contribute, even if they are infinite or NaN.
    """
    terms = expand(weights[1:], values[1:]) * (values[1:] - values[0])
    return jnp.sum(jnp.where(expand(weights[1:] != 0, terms), terms, 0), axis=0).astype(values.dtype)
