"""Self-attention over the positions of an image."""

import jax
from flax import nnx

from diffusion.layers.norms import group_norm
from diffusion.types import Array


class SpatialAttention(nnx.Module):
    """A residual attention block over all positions of `x [B, H, W, C]`; zero at initialisation."""

    def __init__(self, channels: int, head_width: int, *, dtype, rngs: nnx.Rngs):
        self.heads = channels // head_width
        self.norm = group_norm(channels, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(channels, channels, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        B, H, W, C = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, H * W, 3, self.heads, C // self.heads)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return x + self.out(mixed.reshape(B, H, W, C))
