"""Counts the multiply-accumulates (MACs, 2 FLOPs each) of a function from its shapes.

Matrix products and convolutions are counted, as in the papers' tables (whose "Gflops" are MACs). Elementwise
operations, reductions and gathers are not. XLA's cost analysis is no alternative: it counts the body of a scan once,
regardless of its length, and therefore a stack of blocks as one block.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from diffusion.core.types import Autoencoder, Network, Spec, TextEncoder
from diffusion.layers.autoencoder import AutoencoderApply

REPEATING = ("while", "pallas_call", "shard_map")  # primitives that run their bodies an unknown number of times
OPAQUE = ("dot", "matmul", "ffi_call")  # parts of the names of other primitives whose products are not in their jaxprs


def network_macs(network: Network, spec: Spec) -> int:
    """Returns the MACs of one example's forward pass of a network that was built for the spec.

    That of an autoencoder encodes and decodes.
    """
    params, apply = jax.eval_shape(network.init, jax.random.key(0)), network.apply
    x, c_noise = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in (spec.shape, ()))
    if isinstance(apply, AutoencoderApply):
        return macs(lambda params, x: apply.decode(params, apply.sample(apply.encode(params, x), None)), params, x)
    return macs(apply, params, x, c_noise, spec.zeros(1))


def encoder_macs(autoencoder: Autoencoder, spec: Spec) -> int:
    """Returns the MACs with which an autoencoder encodes one example of a spec."""
    return macs(autoencoder.posterior, autoencoder.params, jax.ShapeDtypeStruct((1, *spec.shape), jnp.float32))


def text_encoder_macs(encoder: TextEncoder) -> int:
    """Returns the MACs with which a text encoder encodes one text."""
    return macs(encoder.encode, encoder.params, encoder.tokenize([""]))


def macs(function: Callable[..., Any], *args: Any) -> int:
    """Returns the MACs of `function(*args)`, which is traced but not run.

    Everything that is traced counts, used or not, including the padding of chunked attention. Of the branches of a
    conditional, the most expensive one counts. The padding of a convolution counts as pixels, but the zeros that a
    transposed convolution inserts between pixels do not.

    Args:
      function: The function.
      *args: Pytrees of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: There are products in a loop of unknown length, or in an opaque call.
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
    # Other primitives run their jaxpr once (jit, remat, custom derivatives). With several, it is unknown which runs.
    opaque = any(part in name for part in OPAQUE)
    if opaque or sum(map(bool, inner)) > 1 or (name in REPEATING and any(inner)):
        raise ValueError(f"the products in a {name!r} cannot be counted: its shapes do not determine their number")
    return sum(inner)


def _matrix_product(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return math.prod(out) * math.prod(lhs[axis] for axis in contracted)


def _convolution(eqn: JaxprEqn) -> int:
    p = eqn.params
    kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    (_, in_channels, *window), (batch, features, *space) = p["dimension_numbers"][1:]
    total = out[batch] * out[features] * kernel[in_channels]  # the kernel has the channels of one group
    axes = zip(space, window, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], strict=True)
    for out_axis, kernel_axis, stride, (before, _), lhs_dilation, rhs_dilation in axes:
        positions = np.arange(out[out_axis])[:, None] * stride + np.arange(kernel[kernel_axis]) * rhs_dilation - before
        total *= int(np.count_nonzero(positions % lhs_dilation == 0))  # the other positions lie between pixels
    return total


def _cudnn_attention(eqn: JaxprEqn) -> int:
    """Counts the products of queries `[B, N, heads, F]` and keys `[B, M, heads, F]`, and of the weights and the values.

    Tracing `attend` without cuDNN instead would not work, because a jitted function caches its first trace.
    """
    queries, keys = (var.aval for var in eqn.invars[:2])
    return 2 * queries.size * keys.shape[1]
