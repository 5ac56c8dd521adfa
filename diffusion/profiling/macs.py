"""The work of a network, counted from its shapes: multiply-accumulates (MACs), 2 FLOPs each.

Counted are the products, matrix products and convolutions, as in the papers' tables (whose "Gflops" are MACs); not what
is done element by element, reductions and gathers. XLA's own cost analysis counts the body of a scan once, however
often it runs, and so a stack of blocks as one block.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from diffusion.core.types import Network

OFTEN = ("while", "pallas_call", "shard_map")  # run their bodies an unknown number of times
HIDING = ("dot", "matmul", "ffi_call")  # in the names of other primitives: these multiply, and no equation shows it


def network_macs(network: Network, shape: tuple[int, ...], num_classes: int = 0) -> int:
    """MACs of one example's forward pass.

    Args:
      shape, num_classes: those that the network was built with.
    """
    params = jax.eval_shape(network.init, jax.random.key(0))

    def one(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    cond = {"label": one(dtype=jnp.int32)} if num_classes else {}
    return macs(network.apply, params, one(*shape), one(), cond)


def macs(function: Callable[..., Any], *args: Any) -> int:
    """MACs of `function(*args)`, which is traced and not run.

    All that is traced counts, used or not: what chunked attention pads, too. Of the branches of a condition, the one
    with the most. A convolution's padding counts as if it were image, but the zeros that a transposed one has between
    pixels do not.

    Args:
      args: pytrees of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: products in a loop without a fixed number of trips, or in a call that hides them.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(eqn) for eqn in jaxpr.eqns)


def _of_equation(eqn: JaxprEqn) -> int:
    name, inner = eqn.primitive.name, [_of_jaxpr(jaxpr) for jaxpr in jaxprs_in_params(eqn.params)]
    match name:
        case "dot_general":
            return _matrix_product(eqn)
        case "conv_general_dilated":
            return _convolution(eqn)
        case "dot_product_attention_fwd_wrapper":
            return _cudnn_attention(eqn)
        case "scan":
            return eqn.params["length"] * sum(inner)
        case "cond":
            return max(inner)
    # Any other that holds jaxprs runs them once: jit, remat, custom derivatives. Of several, which one is not known.
    hides = any(part in name for part in HIDING)
    if hides or sum(map(bool, inner)) > 1 or (name in OFTEN and any(inner)):
        raise ValueError(f"the products in a {name!r} cannot be counted: its shapes do not tell how many there are")
    return sum(inner)


def _matrix_product(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return math.prod(out) * math.prod(lhs[axis] for axis in contracted)


def _convolution(eqn: JaxprEqn) -> int:
    p = eqn.params
    kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    (_, in_channels, *window), (batch, features, *space) = p["dimension_numbers"][1:]
    total = out[batch] * out[features] * kernel[in_channels]  # the kernel's own: those of one group
    axes = zip(space, window, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], strict=True)
    for place, tap, stride, (before, _), between, apart in axes:
        seen = np.arange(out[place])[:, None] * stride + np.arange(kernel[tap]) * apart - before
        total *= int(np.count_nonzero(seen % between == 0))  # the others fall between pixels
    return total


def _cudnn_attention(eqn: JaxprEqn) -> int:
    """Queries `[B, N, heads, F]` by keys `[B, M, heads, F]`, and the weights by the values. `attend` is not made to do
    without cuDNN here: a jitted function would keep what it was traced as."""
    queries, keys = (var.aval for var in eqn.invars[:2])
    return 2 * queries.size * keys.shape[1]
