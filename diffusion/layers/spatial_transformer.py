"""The transformer between the residual blocks of a U-Net that reads texts (Rombach et al. 2022, arXiv 2112.10752,
appendix E.2.1)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core.types import Array, Perturbation
from diffusion.layers.attention import Kernel, attend, attention
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear
from diffusion.layers.norms import group_norm
from diffusion.layers.stack import Remat, Stack

EPSILON = 1e-6  # of the group norm; published weights require it whatever that of the residual blocks is


class Attention(nnx.Module):
    """Attention of tokens `[B, N, channels]` to a sequence `[B, L, context]`. Only the output layer has a bias."""

    def __init__(self, channels: int, context: int, heads: int, *, kernel: Kernel, dtype: Any, rngs: Keys):
        self.heads, self.kernel = heads, kernel
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.q = Linear(channels, channels, use_bias=False, **kwargs)
        self.k = Linear(context, channels, use_bias=False, **kwargs)
        self.v = Linear(context, channels, use_bias=False, **kwargs)
        self.out = Linear(channels, channels, **kwargs)

    def __call__(self, x: Array, sequence: Array, mask: Array | None = None, attend: Any = attend) -> Array:
        """Maps x `[B, N, channels]`; mask `[B, L]` says which tokens of the sequence are attended to."""
        B, N, C = x.shape
        q, k, v = (
            layer(tokens).reshape(B, -1, self.heads, C // self.heads)
            for layer, tokens in ((self.q, x), (self.k, sequence), (self.v, sequence))
        )
        return self.out(attend(q, k, v, mask, kernel=self.kernel).reshape(B, N, C))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention to a text and a perceptron with GEGLU (Shazeer 2020, arXiv 2002.05202), each
    after a layer norm and added to its input.

    Args:
      channels: The channels of the tokens.
      context: The width of the text's tokens; None for a block without cross-attention.
      heads: The number of attention heads.
      only_cross_attention: Whether the first attention is to the text, too.
      kernel: The implementation of attention; see `layers.attention.attend`.
      dtype: The compute dtype.
      rngs: The random keys that the parameters are drawn from.
    """

    def __init__(
        self, channels: int, context: int | None, heads: int, *, only_cross_attention: bool = False, kernel: Kernel,
        dtype: Any, rngs: Keys,
    ):  # fmt: skip
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.only_cross_attention = only_cross_attention
        self.norm1 = nnx.LayerNorm(channels, epsilon=1e-5, **kwargs)
        first = context if only_cross_attention else channels
        self.attention = Attention(channels, first, heads, kernel=kernel, **kwargs)
        self.reads = context is not None
        if self.reads:
            self.norm2 = nnx.LayerNorm(channels, epsilon=1e-5, **kwargs)
            self.cross = Attention(channels, context, heads, kernel=kernel, **kwargs)
        self.norm3 = nnx.LayerNorm(channels, epsilon=1e-5, **kwargs)
        self.inner = Linear(channels, 8 * channels, **kwargs)
        self.outer = Linear(4 * channels, channels, **kwargs)

    def __call__(
        self, x: Array, size: tuple[int, int], sequence: Array | None, mask: Array | None,
        perturbation: Perturbation | None,
    ) -> Array:  # fmt: skip
        """Maps x `[B, H * W, channels]` and a text, sequence `[B, L, context]` and mask `[B, L]`, to the shape of x."""
        y = self.norm1(x)
        if self.only_cross_attention:
            x += self.attention(y, sequence, mask)
        else:
            x += self.attention(y, y, attend=attention(perturbation, size))
        if self.reads:
            x += self.cross(self.norm2(x), sequence, mask)
        value, gate = jnp.split(self.inner(self.norm3(x)), 2, axis=-1)
        return x + self.outer(value * jax.nn.gelu(gate, approximate=False))


class SpatialTransformer(nnx.Module):
    """A group norm, a linear layer, `depth` blocks over all positions, and a linear layer, added to an image; the
    identity at initialisation.

    Args:
      channels, context, heads, only_cross_attention: See `TransformerBlock`.
      depth: The number of blocks; they are stacked.
      groups: The number of groups of the group norm; see `layers.norms.group_norm`.
      kernel: The implementation of attention; see `layers.attention.attend`.
      remat: What the backward pass recomputes in each block; see `layers.stack.rematerialised`.
      dtype: The compute dtype.
      rngs: The random keys that the parameters are drawn from.
    """

    def __init__(
        self, channels: int, context: int | None, heads: int, depth: int, groups: int | None, *,
        only_cross_attention: bool, kernel: Kernel, remat: Remat, dtype: Any, rngs: Keys,
    ):  # fmt: skip
        self.only_cross_attention = only_cross_attention
        self.norm = group_norm(channels, groups, EPSILON, dtype=dtype, rngs=rngs)
        self.proj_in = Linear(channels, channels, dtype=dtype, rngs=rngs)

        def block(rngs: Keys) -> TransformerBlock:
            return TransformerBlock(channels, context, heads, only_cross_attention=only_cross_attention,
                                    kernel=kernel, dtype=dtype, rngs=rngs)  # fmt: skip

        self.blocks = Stack(block, depth, remat, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.proj_out = Linear(channels, channels, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Array, sequence: Array | None, mask: Array | None, perturbation: Perturbation | None = None
    ) -> Array:
        """Maps x `[B, H, W, channels]` to the same shape; `perturbation` changes the self-attention of all blocks."""
        B, H, W, C = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(B, H * W, C)
        tokens = self.blocks(tokens, (H, W), sequence, mask, perturbation)
        return x + self.proj_out(tokens.reshape(B, H, W, C))
