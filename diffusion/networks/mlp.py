"""A residual multi-layer perceptron, for points in the plane and other small vectors."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import Array, Cond, InputError, Network
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.embeddings import ConditionEmbedding
from diffusion.layers.functional import functional
from diffusion.layers.keys import Keys


class MLP(nnx.Module):
    """x `[B, *shape]`, c_noise `[B]`, cond -> `[B, *shape[:-1], outputs * shape[-1]]`, float32.

    The blocks are ADM's without convolutions and norms: silu, linear, scale and shift by the embedding, silu, linear,
    around which the input is added; the identity at initialisation. There are no norms because on vectors of two
    numbers they would leave the direction and hide the length. Each parameter of all blocks is one array with a leading
    axis of `depth`, over which the pass scans.
    """

    def __init__(self, *, shape, num_classes, scalar_conditions, width, depth, outputs, dtype, rngs: Keys):
        self.dtype, self.out_shape = dtype, (*shape[:-1], outputs * shape[-1])
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.embed = ConditionEmbedding(width, width, num_classes, scalar_conditions=scalar_conditions, **kwargs)
        self.linear_in = nnx.Linear(math.prod(shape), width, **kwargs)
        draw = nnx.initializers.lecun_normal(batch_axis=0)

        def drawn(*shape: int) -> nnx.Param:
            return nnx.Param(draw(rngs.params(), (depth, *shape), jnp.float32))

        def zero(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((depth, *shape), jnp.float32))

        self.blocks = nnx.Dict({
            "kernel1": drawn(width, width),
            "bias1": zero(width),
            "emb_kernel": drawn(width, 2 * width),
            "emb_bias": zero(2 * width),
            "kernel2": zero(width, width),
            "bias2": zero(width),
        })  # fmt: skip
        self.linear_out = nnx.Linear(
            width, math.prod(self.out_shape), kernel_init=nnx.initializers.zeros, dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, x: Array, c_noise: Array, cond: Cond, key: Array | None) -> Array:
        emb_BxD = jax.nn.silu(self.embed(c_noise, cond))

        def block(x_BxD: Array, p: dict[str, Array]) -> tuple[Array, None]:
            scale, shift = jnp.split(emb_BxD @ p["emb_kernel"] + p["emb_bias"], 2, axis=-1)
            h = (jax.nn.silu(x_BxD) @ p["kernel1"] + p["bias1"]) * (1 + scale) + shift
            return constrain(x_BxD + jax.nn.silu(h) @ p["kernel2"] + p["bias2"]), None

        x_BxD = constrain(self.linear_in(x.reshape(len(x), -1).astype(self.dtype)))
        stacked = {name: param[...].astype(self.dtype) for name, param in self.blocks.items()}
        x_BxD, _ = jax.lax.scan(block, x_BxD, stacked)
        return self.linear_out(x_BxD.astype(jnp.float32)).reshape(len(x), *self.out_shape)


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    scalar_conditions: tuple[str, ...] = (),
    width: int = 128,
    depth: int = 3,
    outputs: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """An MLP for examples of `shape` (from the data's spec), which it flattens.

    Args:
      shape: of one example; at least one axis.
      num_classes: labels to be conditioned on; 0 for none (from the data's spec).
      scalar_conditions: numbers that it is told beside the noise label, `r` and `guidance`; see `layers.embeddings.Numbers`.
      width: of the stream, the blocks and the embedding; must be even.
      depth: number of residual blocks.
      outputs: values for each entry of x's last axis: 2 for an objective with a learned variance.
      dtype: of the computation; parameters and the last layer are float32.
    """
    if not shape or min(shape) < 1:
        raise InputError("shape", f"must be one or more positive numbers, got {shape}")
    checks.positive(width=width, depth=depth, outputs=outputs)
    if width % 2:
        raise InputError("width", f"must be even, got {width}")
    return functional(lambda rngs: MLP(
        shape=shape, num_classes=num_classes, scalar_conditions=scalar_conditions, width=width, depth=depth, outputs=outputs,
        dtype=jnp.dtype(dtype), rngs=rngs,
    ), shape, outputs, scalar_conditions=scalar_conditions)  # fmt: skip
