"""Attention: one function for all networks, and the self-attention block of U-Nets.

A network takes the choice of the implementation as its keyword `kernel`.
"""

import contextlib
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core.types import Array, InputError
from diffusion.layers.keys import Keys
from diffusion.layers.residual import Style

Kernel = Literal["auto", "xla", "cudnn", "chunked"]

CHUNK = 256  # queries at a time, where they are taken in chunks
LONG = 2**20  # products of queries and keys, for each head, from which `auto` takes them in chunks: 1,024 tokens

_forward_mode = jax.make_user_context(False)  # a part of what `jax.jit` goes by: another value is traced anew


def forward_mode() -> contextlib.AbstractContextManager:
    """Around a `jax.jvp` of a network: cuDNN's attention has no forward-mode derivative, and `auto` then does not
    choose it."""
    return _forward_mode(True)


def attend(q: Array, k: Array, v: Array, mask: Array | None = None, *, kernel: Kernel = "auto") -> Array:
    """softmax(q k^T / sqrt(F)) v of each head; the softmax is float32.

    Args:
      q: `[B, N, heads, F]`.
      k, v: `[B, M, heads, F]`.
      mask: bool `[B, M]`, the keys to be seen; at least one of each example.
      kernel: `xla`; `cudnn`, flash attention on NVIDIA GPUs, for bfloat16 or float16 and F of at most 128 (256 from
        Hopper on) divisible by 8; `chunked`, which holds the products of 256 queries at a time and computes them again
        in the backward pass (Rabe & Staats 2021, arXiv 2112.05682, section 2, without chunks of keys); `auto`, cudnn
        where it can be had and no mask is given, else chunked from 1,024 x 1,024 products on, else xla.

    Returns:
      `[B, N, heads, F]`, of v's dtype.

    Raises:
      InputError: cudnn is asked for where it cannot be had.
    """
    if kernel == "auto":
        kernel = _choose(q, k, mask)
    if kernel == "cudnn":
        wide = None if mask is None else jnp.broadcast_to(mask[:, None, None, :], (len(q), 1, q.shape[1], k.shape[1]))
        try:
            return jax.nn.dot_product_attention(q, k, v, mask=wide, implementation="cudnn")
        except (RuntimeError, ValueError, NotImplementedError) as error:  # each from another of its checks
            raise InputError("network.kernel", f"cudnn cannot be had here: {error}; use auto") from error
    if kernel == "chunked":
        return _chunked(q, k, v, mask)
    return _plain(q, k, v, mask)


def _choose(q: Array, k: Array, mask: Array | None) -> Kernel:
    if mask is None and not _forward_mode.value and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0:
        capability = _nvidia_capability()
        if capability >= (8, 0) and q.shape[-1] <= (256 if capability >= (9, 0) else 128):
            return "cudnn"
    return "chunked" if q.shape[1] * k.shape[1] >= LONG else "xla"


def _nvidia_capability() -> tuple[int, ...]:
    """Of the device that arrays go to, as (9, 0) for Hopper; () if it is not NVIDIA's."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return ()
    return tuple(int(part) for part in device.compute_capability.split("."))


def _plain(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    if jax.default_backend() != "cpu":
        wide = None if mask is None else mask[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=wide, implementation="xla")
    # The same by hand, heads before tokens: there XLA's products on a CPU are twice as fast.
    q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
    return _heads_first(q, k, v, mask).swapaxes(1, 2)


def _heads_first(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """`attend` for `[B, heads, N, F]`."""
    logits = jnp.einsum("bhnf,bhmf->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhnm,bhmf->bhnf", jax.nn.softmax(logits).astype(v.dtype), v)


def _chunked(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    B, N, heads, F = q.shape
    q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
    chunks = -(-N // CHUNK)
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, chunks * CHUNK - N), (0, 0)))
    by_chunk = jnp.moveaxis(padded.reshape(B, heads, chunks, CHUNK, F), 2, 0)
    mixed = jax.lax.map(jax.checkpoint(lambda q: _heads_first(q, k, v, mask)), by_chunk)
    return jnp.moveaxis(mixed, 0, 2).reshape(B, heads, chunks * CHUNK, F)[:, :, :N].swapaxes(1, 2)


class SpatialAttention(nnx.Module):
    """A residual attention block over all positions of `x [B, H, W, C]`; zero at initialisation."""

    def __init__(self, channels: int, heads: int, style: Style, *, kernel: Kernel, rngs: Keys):
        self.heads, self.style, self.kernel = heads, style, kernel
        kwargs = dict(dtype=style.dtype, rngs=rngs)
        self.norm = style.norm(channels, rngs)
        self.qkv = nnx.Linear(channels, 3 * channels, **kwargs)
        self.out = nnx.Linear(channels, channels, kernel_init=nnx.initializers.zeros, **kwargs)

    def __call__(self, x: Array) -> Array:
        B, H, W, C = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, H * W, 3, self.heads, C // self.heads)
        mixed = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], kernel=self.kernel)
        return self.style.add(x, self.out(mixed.reshape(B, H, W, C)))
