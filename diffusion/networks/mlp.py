"""A residual multi-layer perceptron for points in the plane and other small vectors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import NO_CONDITIONS, Array, Cond, ConditionSpec, InputError, Network, class_labels
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.conditioner import Conditioner
from diffusion.layers.functional import functional
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """The options of an MLP; `make` documents them."""

    shape: tuple[int, ...]
    num_classes: int
    conditions: Mapping[str, ConditionSpec] = dataclasses.field(hash=False)
    scalar_conditions: tuple[str, ...]
    width: int
    depth: int
    outputs: int
    dtype: Literal["float32", "bfloat16"]

    def __post_init__(self):
        if not self.shape or min(self.shape) < 1:
            raise InputError("shape", f"must be one or more positive numbers, got {self.shape}")
        checks.condition_kinds("mlp", self.conditions, ("scalar", "vector"), self.shape)
        checks.network_size(width=self.width, depth=self.depth, outputs=self.outputs)
        if self.width % 2:
            raise InputError("width", f"must be even, got {self.width}")

    @property
    def out_shape(self) -> tuple[int, ...]:
        return *self.shape[:-1], self.outputs * self.shape[-1]


class MLP(nnx.Module):
    """Maps x `[B, *shape]`, c_noise `[B]` and cond to `[B, *shape[:-1], outputs * shape[-1]]`, float32.

    The blocks are ADM's residual blocks without convolutions and norms: silu, linear, scale and shift by the embedding,
    silu, linear. They are the identity at initialisation. There are no norms because a norm of two numbers would keep
    the direction and discard the length. Each parameter of all blocks is one array with a leading axis of length
    `depth`, which the forward pass scans over.
    """

    def __init__(self, config: MLPConfig, *, rngs: Keys):
        self.config = config
        width, depth = config.width, config.depth
        kwargs = dict(dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.embed = Conditioner(
            width, width, config.num_classes, conditions=config.conditions,
            scalar_conditions=config.scalar_conditions, **kwargs,
        )  # fmt: skip
        self.linear_in = Linear(math.prod(config.shape), width, **kwargs)
        lecun = nnx.initializers.lecun_normal(batch_axis=0)

        def random(*shape: int) -> nnx.Param:
            return nnx.Param(lecun(rngs.params(), (depth, *shape), jnp.float32))

        def zeros(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((depth, *shape), jnp.float32))

        self.blocks = nnx.Dict({
            "kernel1": random(width, width),
            "bias1": zeros(width),
            "emb_kernel": random(width, 2 * width),
            "emb_bias": zeros(2 * width),
            "kernel2": zeros(width, width),
            "bias2": zeros(width),
        })  # fmt: skip
        self.linear_out = Linear(
            width, math.prod(config.out_shape), kernel_init=nnx.initializers.zeros, dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, x: Array, c_noise: Array, cond: Cond, key: Array | None) -> Array:
        dtype = jnp.dtype(self.config.dtype)
        emb_BxD = jax.nn.silu(self.embed(c_noise, cond).vector)

        def block(x_BxD: Array, p: dict[str, Array]) -> tuple[Array, None]:
            scale, shift = jnp.split(emb_BxD @ p["emb_kernel"] + p["emb_bias"], 2, axis=-1)
            h = (jax.nn.silu(x_BxD) @ p["kernel1"] + p["bias1"]) * (1 + scale) + shift
            return constrain(x_BxD + jax.nn.silu(h) @ p["kernel2"] + p["bias2"]), None

        x_BxD = constrain(self.linear_in(x.reshape(len(x), -1).astype(dtype)))
        stacked = {name: param[...].astype(dtype) for name, param in self.blocks.items()}
        x_BxD, _ = jax.lax.scan(block, x_BxD, stacked)
        return self.linear_out(x_BxD.astype(jnp.float32)).reshape(len(x), *self.config.out_shape)


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    conditions: Mapping[str, ConditionSpec] = NO_CONDITIONS,
    scalar_conditions: tuple[str, ...] = (),
    width: int = 128,
    depth: int = 3,
    outputs: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """Builds an MLP for examples of shape `shape`, which it flattens.

    Args:
      shape: The shape of one example, with at least one axis; given by the data.
      num_classes: The number of classes to condition on; 0 for none. Given by the data.
      conditions: The other conditions of the data, of the kinds scalar and vector. Given by the data.
      scalar_conditions: Scalars to condition on in addition to the noise label, among `step_size` and
        `guidance_scale`; see `layers.embeddings.ScalarEmbedding`.
      width: The width of the residual stream, the blocks and the embedding; even.
      depth: The number of residual blocks.
      outputs: The number of output values per entry of x's last axis; 2 for an objective with a learned variance.
      dtype: The compute dtype. Parameters and the last layer are float32.
    """
    config = MLPConfig(**locals())
    return functional(
        lambda rngs: MLP(config, rngs=rngs),
        shape,
        outputs,
        conditions=class_labels(num_classes) | dict(conditions),
        scalar_conditions=scalar_conditions,
    )
