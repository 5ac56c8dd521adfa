"""Embeddings of the noise label and of the condition."""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.types import Array, Cond


def sinusoidal(labels: Array, width: int, max_period: float = 10_000.0, last: bool = False) -> Array:
    """Cosines and sines of `labels [B]` at `width / 2` geometric frequencies from 1 to 1 / max_period: `[B, width]`
    (Vaswani et al. 2017, arXiv 1706.03762, section 3.5). The last frequency is reached only if asked for by `last`."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half) / (half - last))
    angles = labels[:, None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ConditionEmbedding(nnx.Module):
    """What every block is told: the noise label and, if there are classes, the class; `[B, out_features]`.

    Row `num_classes` of the table is the null embedding, used where `keep` is False. `last` is of `sinusoidal`.
    """

    def __init__(self, width: int, out_features: int, num_classes: int, *, last: bool = False, dtype, rngs: nnx.Rngs):
        self.width, self.num_classes, self.last = width, num_classes, last
        self.inner = nnx.Linear(width, out_features, dtype=dtype, rngs=rngs)
        self.outer = nnx.Linear(out_features, out_features, dtype=dtype, rngs=rngs)
        if num_classes:
            init = nnx.initializers.normal(0.02)
            self.label = nnx.Embed(num_classes + 1, out_features, embedding_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, c_noise: Array, cond: Cond) -> Array:
        emb_BxD = self.outer(jax.nn.silu(self.inner(sinusoidal(c_noise, self.width, last=self.last))))
        if self.num_classes:
            label = cond["label"]
            emb_BxD += self.label(jnp.where(cond.get("keep", True), label, self.num_classes))
        return emb_BxD
