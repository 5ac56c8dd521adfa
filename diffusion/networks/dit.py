"""The diffusion transformer DiT (Peebles & Xie 2023, arXiv 2212.09748), with the options of its descendants."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import Array, Cond, InputError, Network
from diffusion.layers.attention import Kernel, attend
from diffusion.layers.embeddings import ConditionEmbedding
from diffusion.layers.functional import functional
from diffusion.layers.keys import Keys
from diffusion.layers.norms import layer_norm
from diffusion.layers.positions import rotary_angles, rotate, sincos_2d
from diffusion.layers.stack import Remat, Stack

FREQUENCIES = 256  # width of the sinusoidal embedding of the noise label, whatever the network's


class Block(nnx.Module):
    """Attention and a perceptron, each around a norm that the condition scales and shifts and whose result it gates
    (adaLN-zero): the identity at initialisation."""

    def __init__(self, *, width, num_heads, inner, norm, qk_norm, gated, kernel, dtype, rngs: Keys):
        self.num_heads, self.gated, self.kernel, self.dtype = num_heads, gated, kernel, dtype
        kwargs = dict(kernel_init=nnx.initializers.xavier_uniform(), dtype=dtype, rngs=rngs)
        self.norm = norm
        self.modulation = nnx.Linear(width, 6 * width, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, **kwargs)
        self.out = nnx.Linear(width, width, **kwargs)
        self.qk_norm = qk_norm
        if qk_norm:
            self.norm_q, self.norm_k = (nnx.RMSNorm(width // num_heads, dtype=dtype, rngs=rngs) for _ in range(2))
        self.up = nnx.Linear(width, 2 * inner if gated else inner, **kwargs)
        self.down = nnx.Linear(inner, width, **kwargs)

    def __call__(self, x_BxNxD: Array, emb_BxD: Array, angles_NxF: Array | None) -> Array:
        modulation = self.modulation(jax.nn.silu(emb_BxD))[:, None, :]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        x_BxNxD += gate1 * self._attend(layer_norm(x_BxNxD, self.norm) * (1 + scale1) + shift1, angles_NxF)
        return x_BxNxD + gate2 * self._perceive(layer_norm(x_BxNxD, self.norm) * (1 + scale2) + shift2)

    def _attend(self, h_BxNxD: Array, angles_NxF: Array | None) -> Array:
        B, N, D = h_BxNxD.shape
        q, k, v = (part.reshape(B, N, self.num_heads, -1) for part in jnp.split(self.qkv(h_BxNxD), 3, axis=-1))
        if self.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        if angles_NxF is not None:
            q, k = rotate(q, angles_NxF), rotate(k, angles_NxF)
        return self.out(attend(q, k, v, kernel=self.kernel).reshape(B, N, D))

    def _perceive(self, h_BxNxD: Array) -> Array:
        h = self.up(h_BxNxD)
        if self.gated:
            gate, h = jnp.split(h, 2, axis=-1)
            return self.down(jax.nn.silu(gate) * h)
        return self.down(jax.nn.gelu(h, approximate=True))


class DiT(nnx.Module):
    """x `[B, H, W, C]`, c_noise `[B]`, cond -> `[B, H, W, outputs * C]`, float32: patches, blocks, patches."""

    def __init__(self, *, size, channels, num_classes, scalar_conditions, patch_size, width, depth, num_heads, inner, positions, norm,
                 qk_norm, gated, freq_shift, kernel, remat, unroll, outputs, dtype, rngs: Keys):  # fmt: skip
        self.patch_size, self.dtype, self.norm = patch_size, dtype, norm
        self.side, self.out_channels = size // patch_size, outputs * channels
        self.embed = ConditionEmbedding(
            FREQUENCIES,
            width,
            num_classes,
            scalar_conditions=scalar_conditions,
            last=freq_shift,
            dtype=dtype,
            rngs=rngs,
        )
        xavier = nnx.initializers.xavier_uniform()
        self.patches_in = nnx.Linear(patch_size**2 * channels, width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.rotary, self.head_dim, self.width = positions == "rope", width // num_heads, width
        self.blocks = Stack(
            lambda rngs: Block(width=width, num_heads=num_heads, inner=inner, norm=norm, qk_norm=qk_norm, gated=gated,
                               kernel=kernel, dtype=dtype, rngs=rngs),
            depth, remat, unroll, rngs=rngs,
        )  # fmt: skip
        zeros = nnx.initializers.zeros
        self.modulation = nnx.Linear(width, 2 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.patches_out = nnx.Linear(
            width, patch_size**2 * self.out_channels, kernel_init=zeros, dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, x: Array, c_noise: Array, cond: Cond, key: Array | None) -> Array:
        B, side, p = len(x), self.side, self.patch_size
        emb_BxD = self.embed(c_noise, cond)
        x = x.reshape(B, side, p, side, p, -1).swapaxes(2, 3).reshape(B, side**2, -1)
        x_BxNxD = self.patches_in(x.astype(self.dtype))
        angles_NxF = None
        if self.rotary:
            angles_NxF = rotary_angles(side, self.head_dim)
        else:
            x_BxNxD += sincos_2d(side, self.width).astype(self.dtype)
        x_BxNxD = self.blocks(x_BxNxD, emb_BxD, angles_NxF)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(emb_BxD))[:, None, :], 2, axis=-1)
        x_BxNxD = layer_norm(x_BxNxD, self.norm) * (1 + scale) + shift
        x = self.patches_out(x_BxNxD.astype(jnp.float32))
        return x.reshape(B, side, side, p, p, -1).swapaxes(2, 3).reshape(B, side * p, side * p, -1)


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    scalar_conditions: tuple[str, ...] = (),
    patch_size: int = 2,
    width: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    mlp_ratio: float = 4.0,
    positions: Literal["sincos", "rope"] = "sincos",
    norm: Literal["layer", "rms"] = "layer",
    qk_norm: bool = False,
    mlp: Literal["gelu", "swiglu"] = "gelu",
    freq_shift: bool = False,
    kernel: Kernel = "auto",
    remat: Remat = "dots_with_no_batch_dims_saveable",
    unroll: int = 1,
    outputs: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """A DiT for images or latents of `shape` (from the data's spec). The default is DiT-S/2; the paper's others are
    (width, depth, heads) = (768, 12, 12) for B, (1024, 24, 16) for L, (1152, 28, 16) for XL.

    Args:
      shape: `(H, W, C)`, H = W, divisible by `patch_size`.
      num_classes: labels to be conditioned on; 0 for none (from the data's spec).
      scalar_conditions: numbers that it is told beside the noise label, `r` and `guidance`; see `layers.embeddings.Numbers`.
      patch_size: side of the square of pixels that becomes a token.
      width: of the tokens; divisible by 4, and by `num_heads`.
      depth: number of blocks; they are stacked and scanned.
      num_heads: of attention.
      mlp_ratio: width of the perceptron's inner layer, in units of `width`; with `swiglu` two thirds of it, which is as
        many parameters.
      positions: `sincos` embeddings that are added, or `rope`, rotations of queries and keys by row and column (Su et
        al. 2021, arXiv 2104.09864).
      norm: `layer`, or `rms` without the mean (Zhang & Sennrich 2019, arXiv 1910.07467); neither has parameters.
      qk_norm: normalise queries and keys (Dehghani et al. 2023, arXiv 2302.05442), which keeps bf16 training stable.
      mlp: `gelu`, or gated `swiglu` (Shazeer 2020, arXiv 2002.05202).
      freq_shift: the embedding of the noise label reaches its lowest frequency, 1 / 10,000. The paper's code
        stops one short of it; weights that were trained or converted for diffusers may want it.
      kernel: how attention is computed; see `layers.attention.attend`.
      remat: what of a block the backward pass computes again; see `layers.stack.rematerialised`.
      unroll: blocks to an iteration of the scan over them.
      outputs: values for each channel: 2 for an objective with a learned variance.
      dtype: of the computation; parameters, norms' statistics and the last layer are float32.
    """
    checks.square_images("dit", shape)
    checks.positive(
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=num_heads,
        outputs=outputs,
        unroll=unroll,
        mlp_ratio=mlp_ratio,
    )
    if shape[0] % patch_size:
        raise InputError("patch_size", f"{patch_size} does not divide the {shape[0]} pixels of a side")
    if width % 4 or width % num_heads:
        raise InputError("width", f"must be divisible by 4 and by num_heads = {num_heads}, got {width}")
    if positions == "rope" and width // num_heads % 4:
        raise InputError("positions", f"rope wants heads of a width divisible by 4, got {width // num_heads}")
    inner = checks.inner_width(width * mlp_ratio * (2 / 3 if mlp == "swiglu" else 1))
    return functional(lambda rngs: DiT(
        size=shape[0], channels=shape[2], num_classes=num_classes, scalar_conditions=scalar_conditions, patch_size=patch_size, width=width,
        depth=depth, num_heads=num_heads, inner=inner, positions=positions, norm=norm, qk_norm=qk_norm, gated=mlp == "swiglu",
        freq_shift=freq_shift, kernel=kernel, remat=remat, unroll=unroll, outputs=outputs,
        dtype=jnp.dtype(dtype), rngs=rngs,
    ), shape, outputs, scalar_conditions=scalar_conditions)  # fmt: skip
