"""Attention: one function for all networks, cross-attention, and the self-attention block of U-Nets.

Networks choose the implementation by their option `kernel`.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion.core.types import Array, InputError, Perturbation
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear
from diffusion.layers.residual import BlockConfig

Kernel = Literal["auto", "xla", "cudnn", "chunked"]

CHUNK = 256  # queries per chunk of the `chunked` kernel
LONG = 2**20  # products of queries and keys per head from which `auto` chooses `chunked`: 1,024 x 1,024 tokens

logger = logging.getLogger(__name__)

_forward_mode = jax.make_user_context(False)  # part of the cache key of `jax.jit`, so a new value causes a new trace


def jvp(function: Callable, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """Computes `jax.jvp(function, primals, tangents)` of a function that applies a network.

    cuDNN's attention has no forward-mode derivative, so the kernel `auto` does not choose it in this computation. The
    trace itself does not show this: inside a scan, blocks are traced before they are differentiated.
    """
    with _forward_mode(True):
        return jax.jvp(function, tuple(primals), tuple(tangents))


def attend(q: Array, k: Array, v: Array, mask: Array | None = None, *, kernel: Kernel = "auto") -> Array:
    """Computes softmax(q k^T / sqrt(F)) v for each head; the softmax is computed in float32.

    Args:
      q: Queries `[B, N, heads, F]`.
      k, v: Keys and values `[B, M, heads, F]`.
      mask: Bool `[B, M]`, which keys are attended to. The other keys and values have no effect if they are finite. An
        example without any key has the mean of its values. None: all.
      kernel: The implementation.
        `xla`: plain matrix products.
        `cudnn`: flash attention on NVIDIA GPUs, for bfloat16 or float16 and F divisible by 8 and at most 128 (256 from
        Hopper on). On other devices a warning is logged and `auto` used, so that a model may move between machines.
        `chunked`: holds the products of 256 queries at a time and recomputes them in the backward pass (Rabe & Staats
        2021, arXiv 2112.05682, section 2, without chunks of keys). On a single CPU device, those of one head at a time.
        `auto`: `cudnn` if it is available, no mask is given and the call is not inside `jvp`; otherwise `chunked` from
        1,024 x 1,024 products on, and `xla` below.

    Returns:
      `[B, N, heads, F]`, of v's dtype.

    Raises:
      InputError: if `cudnn` is requested on a GPU that has it, but does not support these arrays.
    """
    if kernel == "cudnn" and _nvidia_capability() < (8, 0):
        _warn_of_no_cudnn()
        kernel = "auto"
    if kernel == "auto":
        kernel = choose_kernel(q, k, mask)
    if kernel == "cudnn":
        mask4d = None if mask is None else jnp.broadcast_to(mask[:, None, None, :], (len(q), 1, q.shape[1], k.shape[1]))
        try:
            return jax.nn.dot_product_attention(q, k, v, mask=mask4d, implementation="cudnn")
        except (RuntimeError, ValueError, NotImplementedError) as error:  # JAX's checks raise different types
            raise InputError("network.kernel", f"cudnn cannot be used: {error}; use auto") from error
    if kernel == "chunked":
        return _chunked(q, k, v, mask)
    return _plain(q, k, v, mask)


def attention(perturbation: Perturbation | None, size: tuple[int, int], extra: int = 0) -> Callable:
    """Returns `attend`, or for a block that is perturbed, what replaces it in self-attention.

    With `identity` the attention matrix is the identity, so that the result is v. With `blur` the queries, and thereby
    the products of queries and keys, are blurred over the image.

    Args:
      size: Rows and columns of the tokens of the image.
      extra: The number of other tokens, which precede them and are not blurred.
    """

    def identity(q: Array, k: Array, v: Array, mask: Array | None = None, *, kernel: Kernel = "auto") -> Array:
        return v

    def blurred(q: Array, k: Array, v: Array, mask: Array | None = None, *, kernel: Kernel = "auto") -> Array:
        image = q[:, extra:].reshape(len(q), *size, *q.shape[2:])
        by_row, by_column = (blur_matrix(length, perturbation.sigma) for length in size)
        image = jnp.einsum("ri,cj,bijhf->brchf", by_row, by_column, image).astype(q.dtype)
        q = jnp.concatenate([q[:, :extra], image.reshape(q[:, extra:].shape)], axis=1)
        return attend(q, k, v, mask, kernel=kernel)

    return attend if perturbation is None else {"identity": identity, "blur": blurred}[perturbation.kind]


def blur_matrix(length: int, sigma: float) -> np.ndarray:
    """Returns the matrix `[length, length]` that blurs a vector by a Gaussian, or by the mean if sigma is infinite.

    As in the code of smoothed energy guidance (Hong 2024, arXiv 2408.00760), the Gaussian ends at 3 sigma or half of
    the length, and the vector is continued by reflection at its ends.
    """
    if math.isinf(sigma):
        return np.full((length, length), 1 / length, np.float32)
    half = min(math.ceil(6 * sigma) // 2, length // 2)
    weights = np.exp(-((np.arange(-half, half + 1) / sigma) ** 2) / 2)
    continued = np.pad(np.eye(length), ((half, half), (0, 0)), mode="reflect")
    rows = [weights @ continued[start : start + 2 * half + 1] for start in range(length)]
    return np.float32(rows / weights.sum())


def choose_kernel(q: Array, k: Array, mask: Array | None) -> Kernel:
    """Returns the kernel that `auto` stands for."""
    if mask is None and not _forward_mode.value and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0:
        capability = _nvidia_capability()
        if capability >= (8, 0) and q.shape[-1] <= (256 if capability >= (9, 0) else 128):
            return "cudnn"
    return "chunked" if q.shape[1] * k.shape[1] >= LONG else "xla"


@functools.cache
def _warn_of_no_cudnn() -> None:  # once, not in every block
    logger.warning("network.kernel = 'cudnn' needs an NVIDIA GPU from Ampere on; using 'auto' instead")


def _nvidia_capability() -> tuple[int, ...]:
    """Returns the compute capability of the default device, such as (9, 0) for Hopper; () if it is not by NVIDIA."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return ()
    return tuple(int(part) for part in device.compute_capability.split("."))


def _plain(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    if jax.default_backend() != "cpu":
        mask4d = None if mask is None else mask[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask4d, implementation="xla")
    # On CPUs, XLA's batched matrix products are twice as fast with heads before tokens.
    q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
    return _heads_first(q, k, v, mask).swapaxes(1, 2)


def _heads_first(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Computes `attend` for queries `[B, heads, N, F]`, and keys and values `[B, heads, M, F]`."""
    logits = jnp.einsum("bhnf,bhmf->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhnm,bhmf->bhnf", jax.nn.softmax(logits).astype(v.dtype), v)


def _chunked(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
    # Heads may be sharded over several devices, which a loop over them would undo.
    attend = _by_head if jax.default_backend() == "cpu" and jax.device_count() == 1 else _by_chunk
    return attend(q, k, v, mask).swapaxes(1, 2)


def _by_head(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Computes `_by_chunk` for one head at a time: on a CPU, its products then stay in the cache."""
    B, heads = q.shape[:2]
    each = tuple(part.reshape(B * heads, 1, 1, *part.shape[2:]) for part in (q, k, v))
    masks = None if mask is None else jnp.repeat(mask[:, None], heads, axis=0)
    mixed = jax.lax.map(lambda arrays: _by_chunk(*arrays), (*each, masks))
    return mixed.reshape(B, heads, *mixed.shape[3:])


def _by_chunk(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Computes `_heads_first` for `CHUNK` queries at a time."""
    B, heads, N, F = q.shape
    chunks = -(-N // CHUNK)
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, chunks * CHUNK - N), (0, 0)))
    by_chunk = jnp.moveaxis(padded.reshape(B, heads, chunks, CHUNK, F), 2, 0)
    mixed = jax.lax.map(jax.checkpoint(lambda q: _heads_first(q, k, v, mask)), by_chunk)
    return jnp.moveaxis(mixed, 0, 2).reshape(B, heads, chunks * CHUNK, F)[:, :, :N]


class CrossAttention(nnx.Module):
    """Attention of tokens `[B, N, channels]` to a sequence `[B, L, context]` where its mask `[B, L]` is True; zero at
    initialisation."""

    def __init__(self, channels: int, context: int, heads: int, *, kernel: Kernel, dtype: Any, rngs: Keys):
        self.heads, self.kernel = heads, kernel
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.q = Linear(channels, channels, **kwargs)
        self.kv = Linear(context, 2 * channels, **kwargs)
        self.out = Linear(channels, channels, kernel_init=nnx.initializers.zeros, **kwargs)

    def __call__(self, x: Array, sequence: Array, mask: Array) -> Array:
        B, N, C = x.shape
        kv = self.kv(sequence).reshape(B, -1, 2, self.heads, C // self.heads)
        q = self.q(x).reshape(B, N, self.heads, -1)
        return self.out(attend(q, kv[:, :, 0], kv[:, :, 1], mask, kernel=self.kernel).reshape(B, N, C))


class SpatialAttention(nnx.Module):
    """Self-attention over all positions of `x [B, H, W, C]`, added to x; the identity at initialisation.

    With `config.rescale` the sum is divided by sqrt(2). `groups` is the number of groups of the norm before attention:
    None for that of `config`, 0 for no norm.
    """

    def __init__(
        self, channels: int, heads: int, config: BlockConfig, *, groups: int | None = None, kernel: Kernel, rngs: Keys
    ):
        self.heads, self.config, self.kernel = heads, config, kernel
        kwargs = dict(dtype=config.dtype, rngs=rngs)
        self.norm = (
            None if groups == 0 else dataclasses.replace(config, groups=groups or config.groups).norm(channels, rngs)
        )
        self.qkv = Linear(channels, 3 * channels, **kwargs)
        self.out = Linear(channels, channels, kernel_init=nnx.initializers.zeros, **kwargs)

    def __call__(self, x: Array, perturbation: Perturbation | None = None) -> Array:
        B, H, W, C = x.shape
        qkv = self.qkv(x if self.norm is None else self.norm(x)).reshape(B, H * W, 3, self.heads, C // self.heads)
        attend = attention(perturbation, (H, W))
        mixed = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], kernel=self.kernel)
        return self.config.add(x, self.out(mixed.reshape(B, H, W, C)))
