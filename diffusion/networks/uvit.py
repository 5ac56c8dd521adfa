"""The U-ViT (Bao et al. 2022, "All are Worth Words", arXiv 2209.12152): time and class as tokens, long skips."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import Array, Cond, InputError, Network
from diffusion.layers.attention import Kernel, attend
from diffusion.layers.embeddings import ScalarEmbedding, sinusoidal
from diffusion.layers.functional import functional
from diffusion.layers.keys import Keys
from diffusion.layers.stack import Remat, Stack

SMALL = nnx.initializers.normal(0.02)  # the paper's code truncates it at 2, which is 100 standard deviations
UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within 1 / sqrt(fan_in), for convolutions
EPSILON = 1e-5  # of the norms


class Block(nnx.Module):
    """Attention and a perceptron, each behind a norm and around which the input is added. `long_skip`: the tokens and
    those of an earlier block become the input by a linear map of both."""

    def __init__(self, *, width, num_heads, inner, qkv_bias, long_skip, kernel, dtype, rngs: Keys):
        self.num_heads, self.kernel, self.long_skip = num_heads, kernel, long_skip
        kwargs = dict(kernel_init=SMALL, dtype=dtype, rngs=rngs)
        if long_skip:
            self.skip = nnx.Linear(2 * width, width, **kwargs)
        self.norm1, self.norm2 = (nnx.LayerNorm(width, epsilon=EPSILON, dtype=dtype, rngs=rngs) for _ in range(2))
        self.qkv = nnx.Linear(width, 3 * width, use_bias=qkv_bias, **kwargs)
        self.out = nnx.Linear(width, width, **kwargs)
        self.up = nnx.Linear(width, inner, **kwargs)
        self.down = nnx.Linear(inner, width, **kwargs)

    def __call__(self, x_BxNxD: Array, earlier_BxNxD: Array | None = None) -> Array:
        if self.long_skip:
            x_BxNxD = self.skip(jnp.concatenate([x_BxNxD, earlier_BxNxD], axis=-1))
        x_BxNxD += self._attend(self.norm1(x_BxNxD))
        return x_BxNxD + self.down(jax.nn.gelu(self.up(self.norm2(x_BxNxD)), approximate=False))

    def _attend(self, h_BxNxD: Array) -> Array:
        B, N, D = h_BxNxD.shape
        q, k, v = (part.reshape(B, N, self.num_heads, -1) for part in jnp.split(self.qkv(h_BxNxD), 3, axis=-1))
        return self.out(attend(q, k, v, kernel=self.kernel).reshape(B, N, D))


class UViT(nnx.Module):
    """x `[B, H, W, C]`, c_noise `[B]`, cond -> `[B, H, W, outputs * C]`, float32.

    The tokens are the class if there are classes, the noise label, then the patches row by row. Row `num_classes` of
    the table of classes is the null embedding, used where `keep` is False.
    """

    def __init__(self, *, size, channels, num_classes, scalar_conditions, patch_size, width, depth, num_heads, inner, qkv_bias,
                 time_mlp, conv, kernel, remat, outputs, dtype, rngs: Keys):  # fmt: skip
        self.patch_size, self.side, self.width, self.num_classes = patch_size, size // patch_size, width, num_classes
        self.time_mlp, self.conv, self.dtype = time_mlp, conv, dtype
        self.extras, out_channels = 1 + bool(num_classes), outputs * channels
        kwargs = dict(kernel_init=SMALL, dtype=dtype, rngs=rngs)
        if time_mlp:
            self.time_inner = nnx.Linear(width, 4 * width, **kwargs)
            self.time_outer = nnx.Linear(4 * width, width, **kwargs)
        self.numbers = ScalarEmbedding(scalar_conditions, width, dtype=dtype, rngs=rngs)
        if num_classes:
            init = nnx.initializers.normal(1)  # as large as the sinusoids
            self.label = nnx.Embed(num_classes + 1, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.patches_in = nnx.Linear(patch_size**2 * channels, width, kernel_init=UNIFORM, dtype=dtype, rngs=rngs)
        self.positions = nnx.Param(SMALL(rngs.params(), (self.extras + self.side**2, width), jnp.float32))

        def stack(depth: int, long_skip: bool) -> Stack:
            return Stack(
                lambda rngs: Block(width=width, num_heads=num_heads, inner=inner, qkv_bias=qkv_bias, long_skip=long_skip,
                                   kernel=kernel, dtype=dtype, rngs=rngs),
                depth, remat, rngs=rngs,
            )  # fmt: skip

        # The middle block is of the first half's form, and the last of its stack.
        self.in_blocks, self.out_blocks = stack(depth // 2 + 1, False), stack(depth // 2, True)
        kwargs = dict(dtype=jnp.float32, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=EPSILON, **kwargs)
        self.patches_out = nnx.Linear(width, patch_size**2 * out_channels, kernel_init=SMALL, **kwargs)
        if conv:
            self.smooth = nnx.Conv(out_channels, out_channels, (3, 3), padding=1, kernel_init=UNIFORM, **kwargs)

    def __call__(self, x: Array, c_noise: Array, cond: Cond, key: Array | None) -> Array:
        B, side, p = len(x), self.side, self.patch_size
        x = x.reshape(B, side, p, side, p, -1).swapaxes(2, 3).reshape(B, side**2, -1)
        tokens = [*self._extras(c_noise, cond), self.patches_in(x.astype(self.dtype))]
        x_BxNxD = jnp.concatenate(tokens, axis=1) + self.positions[...].astype(self.dtype)
        x_BxNxD, every_LxBxNxD = self.in_blocks(x_BxNxD, collect=True)
        skips_LxBxNxD = every_LxBxNxD[-2::-1]  # without the middle block's; the last block's comes first
        x_BxNxD = self.out_blocks(x_BxNxD, own=(skips_LxBxNxD,))
        x = self.patches_out(self.norm(x_BxNxD[:, self.extras :]))
        x = x.reshape(B, side, side, p, p, -1).swapaxes(2, 3).reshape(B, side * p, side * p, -1)
        return self.smooth(x) if self.conv else x

    def _extras(self, c_noise: Array, cond: Cond) -> list[Array]:
        """The tokens before the patches, `[B, 1, D]` each."""
        time_BxD = sinusoidal(c_noise, self.width).astype(self.dtype)
        if self.time_mlp:
            time_BxD = self.time_outer(jax.nn.silu(self.time_inner(time_BxD)))
        time_BxD = self.numbers(time_BxD, cond)
        if not self.num_classes:
            return [time_BxD[:, None]]
        label_BxD = self.label(jnp.where(cond.get("keep", True), cond["label"], self.num_classes))
        return [label_BxD[:, None], time_BxD[:, None]]


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    scalar_conditions: tuple[str, ...] = (),
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
    """A U-ViT for images or latents of `shape` (from the data's spec). The default is U-ViT-S/2; the paper's others are
    (width, depth, heads) = (512, 17, 8) for S (deep), (768, 17, 12) for M, (1024, 21, 16) for L, (1152, 29, 16) for H.

    Args:
      shape: `(H, W, C)`, H = W, divisible by `patch_size`.
      num_classes: labels to be conditioned on; 0 for none (from the data's spec).
      scalar_conditions: numbers that it is told beside the noise label, `r` and `guidance`; see `layers.embeddings.Numbers`.
      patch_size: side of the square of pixels that becomes a token.
      width: of the tokens; even, and divisible by `num_heads`.
      depth: number of blocks, odd: a first half, one in the middle, and a second half, whose blocks also take what the
        first half's gave, the last one's first. They are stacked and scanned.
      num_heads: of attention.
      mlp_ratio: width of the perceptron's inner layer, in units of `width`.
      qkv_bias: whether queries, keys and values have biases.
      time_mlp: whether the noise label's token goes through a perceptron of its own.
      conv: whether a 3x3 convolution follows on the image, over the borders of the patches.
      kernel: how attention is computed; see `layers.attention.attend`.
      remat: what of a block the backward pass computes again; see `layers.stack.rematerialised`.
      outputs: values for each channel: 2 for an objective with a learned variance.
      dtype: of the computation; parameters, norms' statistics and all after the blocks are float32.
    """
    checks.square_images("uvit", shape)
    checks.positive(
        patch_size=patch_size, width=width, depth=depth, num_heads=num_heads, outputs=outputs, mlp_ratio=mlp_ratio
    )
    if depth < 3 or depth % 2 == 0:
        raise InputError("depth", f"must be odd, 3 or more: two halves and a block between them, got {depth}")
    if shape[0] % patch_size:
        raise InputError("patch_size", f"{patch_size} does not divide the {shape[0]} pixels of a side")
    if width % 2 or width % num_heads:
        raise InputError("width", f"must be divisible by 2 and by num_heads = {num_heads}, got {width}")
    inner = checks.inner_width(width * mlp_ratio)
    return functional(lambda rngs: UViT(
        size=shape[0], channels=shape[2], num_classes=num_classes, scalar_conditions=scalar_conditions, patch_size=patch_size, width=width,
        depth=depth, num_heads=num_heads, inner=inner, qkv_bias=qkv_bias, time_mlp=time_mlp, conv=conv,
        kernel=kernel, remat=remat, outputs=outputs, dtype=jnp.dtype(dtype), rngs=rngs,
    ), shape, outputs, scalar_conditions=scalar_conditions)  # fmt: skip
