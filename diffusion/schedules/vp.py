"""Variance preserving schedules from a table of betas: alpha^2 + sigma^2 = 1 (Ho et al. 2020, arXiv 2006.11239)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.types import Array, InputError


@dataclasses.dataclass(frozen=True, eq=False)
class VP:
    """A table of T log-SNRs read as a function of time.

    Index i of the table is at t = (i + 1) / T. Between its points log-SNR is linear in t; from t = 0, where alpha is 1
    and sigma 0, to the first point it is sigma^2 that is linear.

    Attributes:
      table: log(alpha^2 / sigma^2) at t = 1/T, 2/T, ..., 1; falling, float64 `[T]`.
    """

    table: np.ndarray = dataclasses.field(repr=False)

    @property
    def num_steps(self) -> int:
        return len(self.table)

    def alpha(self, t: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(self.log_snr(t)))

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(-self.log_snr(t)))

    def log_snr(self, t: Array) -> Array:
        t, points, table = self._arrays(t)
        variance = jax.nn.sigmoid(-table[0]) * t / points[0]
        return jnp.where(t < points[0], jnp.log1p(-variance) - jnp.log(variance), jnp.interp(t, points, table))

    def time(self, log_snr: Array) -> Array:
        log_snr, points, table = self._arrays(log_snr)
        first = jax.nn.sigmoid(-log_snr) / jax.nn.sigmoid(-table[0]) * points[0]
        return jnp.where(log_snr > table[0], first, jnp.interp(-log_snr, -table, points))

    def _arrays(self, x: Array) -> tuple[Array, Array, Array]:
        x = jnp.asarray(x)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        points = np.arange(1, self.num_steps + 1) / self.num_steps
        return x.astype(dtype), jnp.asarray(points, dtype), jnp.asarray(self.table, dtype)


def make(
    betas: Literal["linear", "scaled_linear", "cosine"] = "linear",
    beta_start: float | None = None,
    beta_end: float | None = None,
    num_steps: int = 1000,
) -> VP:
    """A VP schedule from one of the usual tables of betas.

    Args:
      betas: `linear` (Ho et al. 2020: 1e-4 to 0.02), `scaled_linear` (linear in sqrt(beta); latent diffusion's 0.00085
        to 0.012), or `cosine` (Nichol & Dhariwal 2021, eq. 17, each beta clipped at 0.999; it has no end points).
      beta_start, beta_end: first and last beta, in (0, 1); the paper's values if left out.
      num_steps: T, the length of the table.
    """
    if num_steps < 1:
        raise InputError("num_steps", f"must be at least 1, got {num_steps}")
    if betas == "cosine":
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            if value is not None:
                raise InputError(name, "the cosine table has no end points; remove it")
        return VP(_log_snr(_cosine(num_steps)))
    start, end = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[betas]
    start = start if beta_start is None else beta_start
    end = end if beta_end is None else beta_end
    for name, value in (("beta_start", start), ("beta_end", end)):
        if not 0 < value < 1:
            raise InputError(name, f"must be between 0 and 1, got {value}")
    power = {"linear": 1, "scaled_linear": 2}[betas]
    return VP(_log_snr(np.linspace(start ** (1 / power), end ** (1 / power), num_steps) ** power))


def _cosine(num_steps: int) -> np.ndarray:
    alpha_bar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _log_snr(betas: np.ndarray) -> np.ndarray:
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    return log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
