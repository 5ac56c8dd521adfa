"""The diffusion transformer DiT (Peebles & Xie 2023, arXiv 2212.09748), with options of its successors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import (
    NO_CONDITIONS,
    PREVIOUS_X0,
    Array,
    Cond,
    ConditionSpec,
    InputError,
    Network,
    Perturbation,
    class_labels,
)
from diffusion.layers.attention import CrossAttention, Kernel, attention
from diffusion.layers.conditioner import Conditioner, Embedded, has_text, image_channels, images_of
from diffusion.layers.functional import Blocks, functional
from diffusion.layers.keys import Keys
from diffusion.layers.norms import layer_norm
from diffusion.layers.positions import patches, rotary_angles, rotate, sincos_2d
from diffusion.layers.stack import Remat, Stack

FREQUENCIES = 256  # width of the sinusoidal features of the noise label, for every `width`


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The options of a DiT; `make` documents them."""

    shape: tuple[int, ...]
    num_classes: int
    conditions: Mapping[str, ConditionSpec] = dataclasses.field(hash=False)
    scalar_conditions: tuple[str, ...]
    self_conditioning: bool
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float
    positions: Literal["sincos", "rope"]
    norm: Literal["layer", "rms"]
    qk_norm: bool
    mlp: Literal["gelu", "swiglu"]
    block_embedders: bool
    freq_shift: Literal[0, 1]
    kernel: Kernel
    remat: Remat
    unroll: int
    outputs: int
    dtype: Literal["float32", "bfloat16"]

    def __post_init__(self):
        checks.images("dit", self.shape)
        checks.condition_kinds("dit", self.conditions, ("scalar", "vector", "text", "image"), self.shape)
        checks.network_size(
            patch_size=self.patch_size, width=self.width, depth=self.depth, num_heads=self.num_heads,
            outputs=self.outputs, unroll=self.unroll, mlp_ratio=self.mlp_ratio,
        )  # fmt: skip
        checks.patches(self.shape, self.patch_size)
        if self.width % 4 or self.width % self.num_heads:
            raise InputError("width", f"must be divisible by 4 and by num_heads = {self.num_heads}, got {self.width}")
        if self.positions == "rope" and self.head_dim % 4:
            raise InputError("positions", f"rope requires width / num_heads divisible by 4, got {self.head_dim}")
        checks.inner_width(self.mlp_width)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def mlp_width(self) -> int:
        """The width of the MLP's hidden layer."""
        return int(self.width * self.mlp_ratio * (2 / 3 if self.mlp == "swiglu" else 1))


class DiTBlock(nnx.Module):
    """Attention and an MLP with adaLN-zero: the embedding scales and shifts the norm before each and gates its output.
    The identity at initialisation.

    Between the two, texts are read by cross-attention without modulation (PixArt-alpha: Chen et al. 2023, arXiv
    2310.00426, section 2.3).
    """

    def __init__(self, config: DiTConfig, *, rngs: Keys):
        self.config = config
        width, dtype = config.width, jnp.dtype(config.dtype)
        kwargs = dict(kernel_init=nnx.initializers.xavier_uniform(), dtype=dtype, rngs=rngs)
        self.modulation = nnx.Linear(width, 6 * width, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, **kwargs)
        self.out = nnx.Linear(width, width, **kwargs)
        if config.qk_norm:
            self.norm_q, self.norm_k = (nnx.RMSNorm(config.head_dim, dtype=dtype, rngs=rngs) for _ in range(2))
        self.up = nnx.Linear(width, config.mlp_width * (2 if config.mlp == "swiglu" else 1), **kwargs)
        self.down = nnx.Linear(config.mlp_width, width, **kwargs)
        if has_text(config.conditions):
            self.cross = CrossAttention(width, width, config.num_heads, kernel=config.kernel, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BxNxD: Array, embedded: Embedded, angles_NxF: Array | None, size: tuple[int, int],
        perturbation: Perturbation | None = None,
    ) -> Array:  # fmt: skip
        attend = attention(perturbation, size)
        norm, modulation = self.config.norm, self.modulation(jax.nn.silu(embedded.vector))[:, None, :]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        x_BxNxD += gate1 * self._attention(layer_norm(x_BxNxD, norm) * (1 + scale1) + shift1, angles_NxF, attend)
        if embedded.sequence is not None:
            x_BxNxD += self.cross(x_BxNxD, embedded.sequence, embedded.mask)
        return x_BxNxD + gate2 * self._mlp(layer_norm(x_BxNxD, norm) * (1 + scale2) + shift2)

    def _attention(self, h_BxNxD: Array, angles_NxF: Array | None, attend: Callable) -> Array:
        B, N, D = h_BxNxD.shape
        heads = self.config.num_heads
        q, k, v = (part.reshape(B, N, heads, -1) for part in jnp.split(self.qkv(h_BxNxD), 3, axis=-1))
        if self.config.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        if angles_NxF is not None:
            q, k = rotate(q, angles_NxF), rotate(k, angles_NxF)
        return self.out(attend(q, k, v, kernel=self.config.kernel).reshape(B, N, D))

    def _mlp(self, h_BxNxD: Array) -> Array:
        h = self.up(h_BxNxD)
        if self.config.mlp == "swiglu":
            gate, h = jnp.split(h, 2, axis=-1)
            return self.down(jax.nn.silu(gate) * h)
        return self.down(jax.nn.gelu(h, approximate=True))


class DiT(nnx.Module):
    """Maps x `[B, H, W, C]`, c_noise `[B]` and cond to `[B, H, W, outputs * C]`, float32."""

    def __init__(self, config: DiTConfig, *, rngs: Keys):
        self.config = config
        width, dtype, patch_area = config.width, jnp.dtype(config.dtype), config.patch_size**2

        def conditioner(rngs: Keys) -> Conditioner:
            return Conditioner(
                FREQUENCIES, width, config.num_classes, conditions=config.conditions,
                scalar_conditions=config.scalar_conditions, freq_shift=config.freq_shift, dtype=dtype, rngs=rngs,
            )  # fmt: skip

        separate = config.block_embedders
        self.embed = Stack(conditioner, config.depth, "none", rngs=rngs) if separate else conditioner(rngs)
        xavier, zeros = nnx.initializers.xavier_uniform(), nnx.initializers.zeros
        self.patches_in = nnx.Linear(patch_area * config.shape[2], width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        if image_channels(config.conditions):
            self.patches_images = nnx.Linear(
                patch_area * image_channels(config.conditions), width, use_bias=False, kernel_init=zeros, dtype=dtype,
                rngs=rngs,
            )  # fmt: skip
        self.blocks = Stack(
            lambda rngs: DiTBlock(config, rngs=rngs), config.depth, config.remat, config.unroll, rngs=rngs
        )
        self.modulation = nnx.Linear(width, 2 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        patch_out = patch_area * config.outputs * config.shape[2]
        self.patches_out = nnx.Linear(width, patch_out, kernel_init=zeros, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x: Array, c_noise: Array, cond: Cond, key: Array | None, perturbation: Perturbation | None = None
    ) -> Array:
        (B, H, W, _), p = x.shape, self.config.patch_size
        rows, columns = H // p, W // p
        dtype, norm = jnp.dtype(self.config.dtype), self.config.norm
        embedded = self.embed.each(c_noise, cond) if self.config.block_embedders else self.embed(c_noise, cond)
        x_BxNxD = self.patches_in(patches(x, p).astype(dtype))
        if image_channels(self.config.conditions):
            x_BxNxD += self.patches_images(patches(images_of(self.config.conditions, cond), p).astype(dtype))
        angles_NxF = None
        if self.config.positions == "rope":
            angles_NxF = rotary_angles(rows, columns, self.config.head_dim)
        else:
            x_BxNxD += sincos_2d(rows, columns, self.config.width).astype(dtype)
        size = rows, columns
        if self.config.block_embedders:
            x_BxNxD = self.blocks(x_BxNxD, angles_NxF, size, per_block=(embedded,), perturbation=perturbation)
            embedded = jax.tree.map(lambda leaf: leaf[0], embedded)
        else:
            x_BxNxD = self.blocks(x_BxNxD, embedded, angles_NxF, size, perturbation=perturbation)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(embedded.vector))[:, None, :], 2, axis=-1)
        x_BxNxD = layer_norm(x_BxNxD, norm) * (1 + scale) + shift
        x = self.patches_out(x_BxNxD.astype(jnp.float32))
        return x.reshape(B, rows, columns, p, p, -1).swapaxes(2, 3).reshape(B, H, W, -1)


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    conditions: Mapping[str, ConditionSpec] = NO_CONDITIONS,
    scalar_conditions: tuple[str, ...] = (),
    self_conditioning: bool = False,
    patch_size: int = 2,
    width: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    mlp_ratio: float = 4.0,
    positions: Literal["sincos", "rope"] = "sincos",
    norm: Literal["layer", "rms"] = "layer",
    qk_norm: bool = False,
    mlp: Literal["gelu", "swiglu"] = "gelu",
    block_embedders: bool = False,
    freq_shift: Literal[0, 1] = 0,
    kernel: Kernel = "auto",
    remat: Remat = "dots_with_no_batch_dims_saveable",
    unroll: int = 1,
    outputs: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """Builds a DiT for images or latents of shape `shape`.

    The default is DiT-S/2. The paper's others have (width, depth, num_heads) = (768, 12, 12) for B, (1024, 24, 16) for
    L and (1152, 28, 16) for XL.

    Args:
      shape: `(H, W, C)` with H and W divisible by `patch_size`; given by the data. The network also accepts images of
        other sizes with this divisibility.
      num_classes: The number of classes to condition on; 0 for none. Given by the data.
      conditions: The other conditions of the data, of the kinds scalar, vector, text and image. Given by the data.
      scalar_conditions: Scalars to condition on in addition to the noise label, among `step_size` and
        `guidance_scale`; see `layers.embeddings.ScalarEmbedding`.
      self_conditioning: Whether to read an earlier estimate of x0, in additional channels that have no effect at
        initialisation. The objective needs the option of the same name.
      patch_size: The side, in pixels, of the square patch that becomes a token.
      width: The width of the tokens; divisible by 4 and by `num_heads`.
      depth: The number of blocks, which are stacked and scanned.
      num_heads: The number of attention heads.
      mlp_ratio: The width of the MLP's hidden layer as a multiple of `width`. With `swiglu` it is two thirds of that,
        which gives the same number of parameters.
      positions: `sincos`: position embeddings that are added to the tokens. `rope`: rotations of queries and keys by
        row and column (Su et al. 2021, arXiv 2104.09864).
      norm: `layer`, or `rms` without the mean (Zhang & Sennrich 2019, arXiv 1910.07467). Neither has parameters.
      qk_norm: Whether to normalise queries and keys (Dehghani et al. 2023, arXiv 2302.05442), which keeps training in
        bfloat16 stable.
      mlp: `gelu`, or the gated `swiglu` (Shazeer 2020, arXiv 2002.05202).
      block_embedders: Whether every block has its own embedding of the noise label and the conditions, as in diffusers'
        DiT; the last layer uses that of the first block. Otherwise all share one, as in the paper.
      freq_shift: 0 for the noise label's frequencies of the paper's code, 1 for those of diffusers' DiT; see
        `layers.embeddings.sinusoidal`. Weights trained with or to be converted for diffusers require 1.
      kernel: The implementation of attention; see `layers.attention.attend`.
      remat: What the backward pass recomputes in each block; see `layers.stack.rematerialised`.
      unroll: The number of blocks per iteration of the scan.
      outputs: The number of output values per channel; 2 for an objective with a learned variance.
      dtype: The compute dtype. Parameters, the statistics of norms and the last layer are float32.
    """
    if self_conditioning:
        conditions = {**conditions, PREVIOUS_X0: ConditionSpec("image", shape)}
    config = DiTConfig(**locals())
    return functional(lambda rngs: DiT(config, rngs=rngs), shape, outputs, multiple=patch_size,
                      conditions=class_labels(num_classes) | dict(conditions),
                      scalar_conditions=scalar_conditions,
                      blocks=Blocks(depth, depth // 2, may_skip=True))  # fmt: skip
