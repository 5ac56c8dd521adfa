"""The U-ViT (Bao et al. 2022, "All are Worth Words", arXiv 2209.12152): a transformer with time and class as tokens
and long skip connections."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.arrays import kept
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
from diffusion.layers.attention import Kernel, attention
from diffusion.layers.conditioner import ConditionEmbedding, image_channels, images_of, with_noise
from diffusion.layers.embeddings import ScalarEmbedding, sinusoidal
from diffusion.layers.functional import Blocks, functional
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear
from diffusion.layers.positions import patches
from diffusion.layers.stack import Remat, Stack

# The paper's code truncates this normal at +-2, which is 100 standard deviations.
NORMAL = nnx.initializers.normal(0.02)
UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within +-1 / sqrt(fan_in), for convolutions
EPSILON = 1e-5  # of the layer norms


@dataclasses.dataclass(frozen=True)
class UViTConfig:
    """The options of a U-ViT; `make` documents them."""

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
    qkv_bias: bool
    time_mlp: bool
    conv: bool
    kernel: Kernel
    remat: Remat
    outputs: int
    dtype: Literal["float32", "bfloat16"]

    def __post_init__(self):
        checks.images("uvit", self.shape)
        checks.condition_kinds("uvit", self.conditions, ("scalar", "vector", "text", "image"), self.shape)
        checks.network_size(
            patch_size=self.patch_size, width=self.width, depth=self.depth, num_heads=self.num_heads,
            outputs=self.outputs, mlp_ratio=self.mlp_ratio,
        )  # fmt: skip
        if self.depth < 3 or self.depth % 2 == 0:
            raise InputError("depth", f"must be odd and at least 3 (two halves and a middle block), got {self.depth}")
        checks.patches(self.shape, self.patch_size)
        if self.width % 2 or self.width % self.num_heads:
            raise InputError("width", f"must be divisible by 2 and by num_heads = {self.num_heads}, got {self.width}")
        checks.inner_width(self.mlp_width)

    @property
    def size(self) -> tuple[int, int]:
        """The rows and columns of the tokens of the image."""
        return self.shape[0] // self.patch_size, self.shape[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """The number of tokens of the image."""
        return math.prod(self.size)

    @property
    def num_extras(self) -> int:
        """The number of tokens before those of the patches."""
        texts = sum(spec.shape[0] for spec in self.conditions.values() if spec.kind == "text")
        return 1 + bool(self.num_classes) + texts

    @property
    def mlp_width(self) -> int:
        """The width of the MLP's hidden layer."""
        return int(self.width * self.mlp_ratio)


class UViTBlock(nnx.Module):
    """Attention and an MLP with pre-norm and residual connections.

    With `long_skip`, a linear layer first maps the tokens and those of an earlier block to the block's input.
    """

    def __init__(self, config: UViTConfig, *, long_skip: bool, rngs: Keys):
        self.config, self.long_skip = config, long_skip
        width, dtype = config.width, jnp.dtype(config.dtype)
        kwargs = dict(kernel_init=NORMAL, dtype=dtype, rngs=rngs)
        if long_skip:
            self.skip = Linear(2 * width, width, **kwargs)
        self.norm1, self.norm2 = (nnx.LayerNorm(width, epsilon=EPSILON, dtype=dtype, rngs=rngs) for _ in range(2))
        self.qkv = Linear(width, 3 * width, use_bias=config.qkv_bias, **kwargs)
        self.out = Linear(width, width, **kwargs)
        self.up = Linear(width, config.mlp_width, **kwargs)
        self.down = Linear(config.mlp_width, width, **kwargs)

    def __call__(self, x_BxNxD: Array, *inputs: Array | None, perturbation: Perturbation | None = None) -> Array:
        """Applies the block; `inputs` are the tokens of the earlier block, with `long_skip`, and the mask or None."""
        *earlier, mask_BxN = inputs
        if self.long_skip:
            x_BxNxD = self.skip(jnp.concatenate([x_BxNxD, *earlier], axis=-1))
        attend = attention(perturbation, self.config.size, self.config.num_extras)
        x_BxNxD += self._attention(self.norm1(x_BxNxD), mask_BxN, attend)
        return x_BxNxD + self.down(jax.nn.gelu(self.up(self.norm2(x_BxNxD)), approximate=False))

    def _attention(self, h_BxNxD: Array, mask_BxN: Array | None, attend: Callable) -> Array:
        B, N, D = h_BxNxD.shape
        heads = self.config.num_heads
        q, k, v = (part.reshape(B, N, heads, -1) for part in jnp.split(self.qkv(h_BxNxD), 3, axis=-1))
        return self.out(attend(q, k, v, mask_BxN, kernel=self.config.kernel).reshape(B, N, D))


class UViT(nnx.Module):
    """Maps x `[B, H, W, C]`, c_noise `[B]` and cond to `[B, H, W, outputs * C]`, float32.

    The tokens are the class (if there are classes), the noise label, those of texts, and the patches in row-major
    order. Where the class is not kept it is replaced by the null class, row `num_classes` of the table.
    """

    def __init__(self, config: UViTConfig, *, rngs: Keys):
        self.config = config
        width, dtype, channels = config.width, jnp.dtype(config.dtype), config.shape[2]
        kwargs = dict(kernel_init=NORMAL, dtype=dtype, rngs=rngs)
        if config.time_mlp:
            self.time_inner = Linear(width, 4 * width, **kwargs)
            self.time_outer = Linear(4 * width, width, **kwargs)
        self.numbers = ScalarEmbedding(config.scalar_conditions, width, dtype=dtype, rngs=rngs)
        if config.num_classes:
            init = nnx.initializers.normal(1)  # the scale of the sinusoidal features
            self.label = nnx.Embed(config.num_classes + 1, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.conditions = ConditionEmbedding(config.conditions, width, dtype=dtype, rngs=rngs)
        patch_area = config.patch_size**2
        if image_channels(config.conditions):
            self.patches_images = Linear(
                patch_area * image_channels(config.conditions), width, use_bias=False,
                kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs,
            )  # fmt: skip
        self.patches_in = Linear(patch_area * channels, width, kernel_init=UNIFORM, dtype=dtype, rngs=rngs)
        num_tokens = config.num_extras + config.num_patches
        self.positions = nnx.Param(NORMAL(rngs.params(), (num_tokens, width), jnp.float32))

        def stack(depth: int, long_skip: bool) -> Stack:
            return Stack(lambda rngs: UViTBlock(config, long_skip=long_skip, rngs=rngs), depth, config.remat, rngs=rngs)

        # The middle block has the same structure as those of the first half, and is the last of their stack.
        self.in_blocks, self.out_blocks = stack(config.depth // 2 + 1, False), stack(config.depth // 2, True)
        out_channels, kwargs = config.outputs * channels, dict(dtype=jnp.float32, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=EPSILON, **kwargs)
        self.patches_out = Linear(width, patch_area * out_channels, kernel_init=NORMAL, **kwargs)
        if config.conv:
            self.smooth = nnx.Conv(out_channels, out_channels, (3, 3), padding=1, kernel_init=UNIFORM, **kwargs)

    def __call__(
        self, x: Array, c_noise: Array, cond: Cond, key: Array | None, perturbation: Perturbation | None = None
    ) -> Array:
        (B, H, W, _), p, dtype = x.shape, self.config.patch_size, jnp.dtype(self.config.dtype)
        extra, text_mask = self._extra_tokens(c_noise, cond)
        patches_BxNxD = self.patches_in(patches(x, p).astype(dtype))
        if image_channels(self.config.conditions):
            patches_BxNxD += self.patches_images(patches(images_of(self.config.conditions, cond), p).astype(dtype))
        x_BxNxD = jnp.concatenate([*extra, patches_BxNxD], axis=1) + self.positions[...].astype(dtype)
        mask_BxN = None
        if text_mask is not None:
            before = self.config.num_extras - text_mask.shape[1]
            mask_BxN = jnp.pad(text_mask, ((0, 0), (before, self.config.num_patches)), constant_values=True)
        in_second = None
        if perturbation is not None:
            before = self.in_blocks.depth
            in_second = dataclasses.replace(perturbation, layers=tuple(n - before for n in perturbation.layers))
        x_BxNxD, every_LxBxNxD = self.in_blocks(x_BxNxD, mask_BxN, collect=True, perturbation=perturbation)
        skips_LxBxNxD = every_LxBxNxD[-2::-1]  # in reverse, without the output of the middle block
        x_BxNxD = self.out_blocks(x_BxNxD, mask_BxN, per_block=(skips_LxBxNxD,), perturbation=in_second)
        x = self.patches_out(self.norm(x_BxNxD[:, self.config.num_extras :]))
        x = x.reshape(B, H // p, W // p, p, p, -1).swapaxes(2, 3).reshape(B, H, W, -1)
        return self.smooth(x) if self.config.conv else x

    def _extra_tokens(self, c_noise: Array, cond: Cond) -> tuple[list[Array], Array | None]:
        """Returns the tokens before those of the patches, `[B, ..., D]` each, and the mask of the texts, the last."""
        num_classes = self.config.num_classes
        time_BxD = sinusoidal(c_noise, self.config.width).astype(self.config.dtype)
        if self.config.time_mlp:
            time_BxD = self.time_outer(jax.nn.silu(self.time_inner(time_BxD)))
        embedded = self.conditions(self.numbers(time_BxD, cond), cond)
        tokens = [embedded.vector[:, None]]
        if num_classes:
            label_BxD = self.label(jnp.where(kept(cond, "label"), cond["label"], num_classes))
            tokens = [with_noise(label_BxD, cond)[:, None], *tokens]
        return tokens + [embedded.sequence] * (embedded.sequence is not None), embedded.mask


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    conditions: Mapping[str, ConditionSpec] = NO_CONDITIONS,
    scalar_conditions: tuple[str, ...] = (),
    self_conditioning: bool = False,
    patch_size: int = 2,
    width: int = 512,
    depth: int = 13,
    num_heads: int = 8,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = False,
    time_mlp: bool = False,
    conv: bool = True,
    kernel: Kernel = "auto",
    remat: Remat = "dots_with_no_batch_dims_saveable",
    outputs: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """Builds a U-ViT for images or latents of shape `shape`.

    The default is U-ViT-S/2. The paper's others have (width, depth, num_heads) = (512, 17, 8) for S (deep), (768, 17,
    12) for M, (1024, 21, 16) for L and (1152, 29, 16) for H.

    Args:
      shape: `(H, W, C)` with H and W divisible by `patch_size`; given by the data. Its positions are learned, so it
        accepts no other size.
      num_classes: The number of classes to condition on; 0 for none. Given by the data.
      conditions: The other conditions of the data, of the kinds scalar, vector, text and image. Given by the data.
      scalar_conditions: Scalars to condition on in addition to the noise label, among `step_size` and
        `guidance_scale`; see `layers.embeddings.ScalarEmbedding`.
      self_conditioning: Whether to read an earlier estimate of x0, in additional channels that have no effect at
        initialisation. The objective needs the option of the same name.
      patch_size: The side, in pixels, of the square patch that becomes a token.
      width: The width of the tokens; even, and divisible by `num_heads`.
      depth: The number of blocks; odd. Each block of the second half also receives the output of the corresponding
        block of the first half, in reverse order. The halves are stacked and scanned.
      num_heads: The number of attention heads.
      mlp_ratio: The width of the MLP's hidden layer as a multiple of `width`.
      qkv_bias: Whether queries, keys and values have biases.
      time_mlp: Whether an MLP maps the features of the noise label to its token.
      conv: Whether a 3x3 convolution is applied to the output image, across the boundaries of the patches.
      kernel: The implementation of attention; see `layers.attention.attend`.
      remat: What the backward pass recomputes in each block; see `layers.stack.rematerialised`.
      outputs: The number of output values per channel; 2 for an objective with a learned variance.
      dtype: The compute dtype. Parameters, the statistics of norms and everything after the blocks are float32.
    """
    if self_conditioning:
        conditions = {**conditions, PREVIOUS_X0: ConditionSpec("image", shape)}
    config = UViTConfig(**locals())
    return functional(
        lambda rngs: UViT(config, rngs=rngs),
        shape,
        outputs,
        conditions=class_labels(num_classes) | dict(conditions),
        scalar_conditions=scalar_conditions,
        blocks=Blocks(depth, depth // 2, may_skip=True),
    )
