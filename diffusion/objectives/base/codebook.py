"""Codebooks that follow the latents by moving averages, and the restart of unused codes.

    N_k <- decay N_k + (1 - decay) n_k        n_k  the share of a batch's latents whose nearest code is k, times K
    M_k <- decay M_k + (1 - decay) m_k        m_k  the sum of these latents in the same unit
    e_k  = M_k / S_k,   S_k = (N_k + eps) / (mean N + eps) mean N

These are the averages of van den Oord et al. 2017, arXiv 1711.00937, appendix A.1, with the Laplace smoothing of the
published code; there, n_k is a number of latents. Here it is a usage, 1 if all K codes are used equally often, so that
neither eps nor a threshold depends on the size of a batch.

A code whose usage N_k falls below a threshold restarts at a random latent of the batch (Dhariwal et al. 2020, arXiv
2005.00341, section 3.1), and its usage becomes the threshold: if the next batch uses it less, it restarts again. Codes
begin in the same way, so that those which the first batch does not use are replaced by latents of this batch.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core.types import Array

EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class CodebookUpdate:
    """The changes of a codebook of K codes with d components that are not made by gradients.

    Attributes:
      averages: Whether the codes are the averages of their latents. Otherwise they are trained by gradients, and only
        the unused ones change here.
      decay: The decay of the averages, in [0, 1).
      restart_threshold: The usage below which a code restarts, in [0, 1); 0 for none.
    """

    averages: bool
    decay: float
    restart_threshold: float

    def initial_state(self, codebook: Array) -> dict[str, Array]:
        """Returns the state before the first step.

        Args:
          codebook: The initial codes `[K, d]`.

        Returns:
          `usage [K]`, N; `sums [K, d]`, M; and `changed [K]`, whether the code of the next step is M_k / S_k.
        """
        usage = jnp.full(len(codebook), self.restart_threshold)
        return {"usage": usage, "sums": usage[:, None] * codebook, "changed": jnp.zeros(len(codebook), bool)}

    def update_state(
        self, state: Mapping[str, Array], z: Array, indices: Array, key: Array
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Returns the state after a step, and the metric `restarted_codes`, the number of codes that restart.

        Args:
          state: The state.
          z: The latents of the whole batch, `[B, h, w, d]`.
          indices: The number of the nearest code of each, `[B, h, w]`.
          key: The random key of the latents at which codes restart.
        """
        z, indices, num = z.reshape(-1, z.shape[-1]), indices.reshape(-1), len(state["usage"])

        def average(before: Array, of_batch: Array) -> Array:
            return self.decay * before + (1 - self.decay) * num / len(z) * of_batch

        usage = average(state["usage"], jnp.bincount(indices, length=num))
        unused = usage < self.restart_threshold
        usage = jnp.maximum(usage, self.restart_threshold)
        # A latent is chosen for every code, because the number of unused ones is not known when the step is compiled.
        chosen = z[jax.random.choice(key, len(z), (num,), replace=num > len(z))]
        sums, changed = self.restart_threshold * chosen, unused
        if self.averages:
            followed = average(state["sums"], jax.ops.segment_sum(z, indices, num))
            sums, changed = jnp.where(unused[:, None], sums, followed), usage > 0
        return {"usage": usage, "sums": sums, "changed": changed}, {"restarted_codes": jnp.sum(unused)}

    def codes(self, state: Mapping[str, Array], codebook: Array) -> Array:
        """Returns the codes `[K, d]` of the next step, from those of the last one."""
        usage = state["usage"]
        smoothed = (usage + EPSILON) / (jnp.mean(usage) + EPSILON) * jnp.mean(usage)
        changed = state["changed"][:, None]
        return jnp.where(changed, state["sums"] / jnp.where(changed, smoothed[:, None], 1), codebook)
