"""The diffusion transformer DiT (Peebles & Xie 2023, arXiv 2212.09748), with options of its successors."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
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
from diffusion.layers.embeddings import SizeEmbedding
from diffusion.layers.functional import Blocks, functional
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear
from diffusion.layers.norms import layer_norm
from diffusion.layers.positions import patches, rotary_angles, rotate, sincos_2d
from diffusion.layers.stack import Remat, Stack

FREQUENCIES = 256  # width of the sinusoidal features of the noise label, for every `width`
SIZES = {"resolution": ConditionSpec("vector", (2,)), "aspect_ratio": ConditionSpec("scalar")}  # of `size_embedding`


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
    modulation: Literal["block", "single"]
    text: Literal["cross", "joint"]
    text_projection: Literal["linear", "mlp"]
    null_text: bool
    size_embedding: bool
    interpolation_scale: float | None
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
        checks.positive(interpolation_scale=self.interpolation_scale)
        texts = [spec for spec in self.conditions.values() if spec.kind == "text"]
        if self.text_projection == "mlp" and any(spec.vocabulary for spec in texts):
            raise InputError("text_projection", "must be 'linear' for texts of integers, which the network embeds")
        if self.block_embedders and (self.modulation == "single" or (self.text == "joint" and texts)):
            problem = "must be False with modulation = 'single' or text = 'joint', where all blocks share the embedding"
            raise InputError("block_embedders", problem)
        if self.size_embedding:
            found = {name: spec for name, spec in self.conditions.items() if name in SIZES}
            if found != SIZES:
                raise InputError("size_embedding", "requires data with the conditions resolution, a vector of the "
                                 "height and the width, and aspect_ratio, a scalar")  # fmt: skip
            if self.width % 3:
                raise InputError("width", f"must be divisible by 3 with size_embedding, got {self.width}")

    @property
    def is_joint(self) -> bool:
        """Whether the tokens of texts take part in self-attention."""
        return self.text == "joint" and has_text(self.conditions)

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

    With `modulation = "single"` the vector of the conditions is the modulation of all blocks, and each block adds its
    own table. Between the two parts, texts are read by cross-attention without norm and modulation (PixArt-alpha: Chen
    et al. 2023, arXiv 2310.00426, section 2.3). With `text = "joint"` their tokens precede those of the image instead,
    and the mask is that of all tokens.
    """

    def __init__(self, config: DiTConfig, *, rngs: Keys):
        self.config = config
        width, dtype = config.width, jnp.dtype(config.dtype)
        kwargs = dict(kernel_init=nnx.initializers.xavier_uniform(), dtype=dtype, rngs=rngs)
        if config.modulation == "single":
            self.table = modulation_table(6, width, rngs)
        else:
            self.modulation = Linear(width, 6 * width, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)
        self.qkv = Linear(width, 3 * width, **kwargs)
        self.out = Linear(width, width, **kwargs)
        if config.qk_norm:
            self.norm_q, self.norm_k = (nnx.RMSNorm(config.head_dim, dtype=dtype, rngs=rngs) for _ in range(2))
        self.up = Linear(width, config.mlp_width * (2 if config.mlp == "swiglu" else 1), **kwargs)
        self.down = Linear(config.mlp_width, width, **kwargs)
        if has_text(config.conditions) and not config.is_joint:
            self.cross = CrossAttention(width, width, config.num_heads, kernel=config.kernel, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BxNxD: Array, embedded: Embedded, angles_NxF: Array | None, size: tuple[int, int],
        perturbation: Perturbation | None = None,
    ) -> Array:  # fmt: skip
        attend = functools.partial(
            attention(perturbation, size, x_BxNxD.shape[1] - math.prod(size)), kernel=self.config.kernel,
            mask=embedded.mask if self.config.is_joint else None,
        )  # fmt: skip
        norm, vector = self.config.norm, embedded.vector
        if self.config.modulation == "single":
            modulation = vector + self.table[...].reshape(-1).astype(vector.dtype)
        else:
            modulation = self.modulation(jax.nn.silu(vector))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation[:, None, :], 6, axis=-1)
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
        return self.out(attend(q, k, v).reshape(B, N, D))

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
        sizes = SIZES if config.size_embedding else {}
        conditions = {name: spec for name, spec in config.conditions.items() if name not in sizes}

        def conditioner(rngs: Keys) -> Conditioner:
            return Conditioner(
                FREQUENCIES, width, config.num_classes, conditions=conditions,
                scalar_conditions=config.scalar_conditions, freq_shift=config.freq_shift,
                text_mlp=config.text_projection == "mlp", null_text=config.null_text, dtype=dtype, rngs=rngs,
            )  # fmt: skip

        separate = config.block_embedders
        self.embed = Stack(conditioner, config.depth, "none", rngs=rngs) if separate else conditioner(rngs)
        if config.size_embedding:
            self.sizes = SizeEmbedding(width, FREQUENCIES, dtype=dtype, rngs=rngs)
        xavier, zeros = nnx.initializers.xavier_uniform(), nnx.initializers.zeros
        self.patches_in = Linear(patch_area * config.shape[2], width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        if image_channels(config.conditions):
            self.patches_images = Linear(
                patch_area * image_channels(config.conditions), width, use_bias=False, kernel_init=zeros, dtype=dtype,
                rngs=rngs,
            )  # fmt: skip
        self.blocks = Stack(
            lambda rngs: DiTBlock(config, rngs=rngs), config.depth, config.remat, config.unroll, rngs=rngs
        )
        if config.modulation == "single":
            small = nnx.initializers.normal(0.02)
            self.modulation = Linear(width, 6 * width, kernel_init=small, dtype=dtype, rngs=rngs)
            self.table = modulation_table(2, width, rngs)
        else:
            self.modulation = Linear(width, 2 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        patch_out = patch_area * config.outputs * config.shape[2]
        self.patches_out = Linear(width, patch_out, kernel_init=zeros, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x: Array, c_noise: Array, cond: Cond, key: Array | None, perturbation: Perturbation | None = None
    ) -> Array:
        (B, H, W, _), p, dtype = x.shape, self.config.patch_size, jnp.dtype(self.config.dtype)
        size = rows, columns = H // p, W // p
        is_single = self.config.modulation == "single"
        embedded = self.embed.each(c_noise, cond) if self.config.block_embedders else self.embed(c_noise, cond)
        if self.config.size_embedding:
            sizes = self.sizes(*(cond[name] for name in SIZES))
            embedded = embedded._replace(vector=embedded.vector + sizes)
        x_BxNxD = self.patches_in(patches(x, p).astype(dtype))
        if image_channels(self.config.conditions):
            x_BxNxD += self.patches_images(patches(images_of(self.config.conditions, cond), p).astype(dtype))
        angles_NxF = None
        if self.config.positions == "rope":
            angles_NxF = rotary_angles(*size, self.config.head_dim, self._spacing(size))
        else:
            x_BxNxD += sincos_2d(*size, self.config.width, self._spacing(size)).astype(dtype)
        for_blocks, num_texts = embedded, 0
        if self.config.is_joint:
            num_texts = embedded.mask.shape[1]
            x_BxNxD = jnp.concatenate([embedded.sequence, x_BxNxD], axis=1)
            mask_BxN = jnp.pad(embedded.mask, ((0, 0), (0, rows * columns)), constant_values=True)
            for_blocks = Embedded(embedded.vector, mask=mask_BxN)
            if angles_NxF is not None:
                angles_NxF = np.pad(angles_NxF, ((num_texts, 0), (0, 0)))  # texts are not rotated
        if is_single:
            for_blocks = for_blocks._replace(vector=self.modulation(jax.nn.silu(embedded.vector)))
        if self.config.block_embedders:
            x_BxNxD = self.blocks(x_BxNxD, angles_NxF, size, per_block=(embedded,), perturbation=perturbation)
            embedded = jax.tree.map(lambda leaf: leaf[0], embedded)
        else:
            x_BxNxD = self.blocks(x_BxNxD, for_blocks, angles_NxF, size, perturbation=perturbation)
        if is_single:
            modulation = jnp.tile(embedded.vector, 2) + self.table[...].reshape(-1).astype(dtype)
        else:
            modulation = self.modulation(jax.nn.silu(embedded.vector))
        shift, scale = jnp.split(modulation[:, None, :], 2, axis=-1)
        x_BxNxD = layer_norm(x_BxNxD[:, num_texts:], self.config.norm) * (1 + scale) + shift
        x = self.patches_out(x_BxNxD.astype(jnp.float32))
        return x.reshape(B, rows, columns, p, p, -1).swapaxes(2, 3).reshape(B, H, W, -1)

    def _spacing(self, size: tuple[int, int]) -> tuple[float, float]:
        """Returns the distances between the positions of neighbouring rows and columns; see `interpolation_scale`."""
        scale, (H, W, _) = self.config.interpolation_scale, self.config.shape
        if scale is None:
            return 1, 1
        rows, columns = size
        return H / self.config.patch_size / rows / scale, W / self.config.patch_size / columns / scale


def modulation_table(num: int, width: int, rngs: Keys) -> nnx.Param:
    """Returns what is added to `num` vectors of the shared modulation, `[num, width]`."""
    return nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (num, width), jnp.float32))


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
    modulation: Literal["block", "single"] = "block",
    text: Literal["cross", "joint"] = "cross",
    text_projection: Literal["linear", "mlp"] = "linear",
    null_text: bool = True,
    size_embedding: bool = False,
    interpolation_scale: float | None = None,
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
      modulation: `block`: every block maps the embedding to its own scales, shifts and gates. `single`: one layer does
        so for all blocks, and each block adds its own table (PixArt-alpha's adaLN-single, arXiv 2310.00426, section
        2.3). The layers that this leaves out are a third of the parameters of a DiT.
      text: `cross`: texts are read by cross-attention after each self-attention. `joint`: their tokens precede those of
        the image and take part in self-attention, with the same weights and without positions, and are dropped after
        the last block.
      text_projection: `linear`, or `mlp`: two layers with a GELU between them map the vectors of texts to `width`, as
        in PixArt.
      null_text: Whether there is a learned null text for those that are dropped. Without it, `cond["null"]` must hold
        the text that replaces them.
      size_embedding: Whether the conditions `resolution`, the height and the width, and `aspect_ratio` are embedded as
        PixArt-alpha's micro-conditions, which are never dropped; see `layers.embeddings.SizeEmbedding`.
      interpolation_scale: If given, the positions of an image of any size are stretched to the rows and columns of
        `shape`, divided by this, as in PixArt. None: they are the numbers of the rows and columns.
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
