"""Variance preserving schedules from a table of betas: alpha^2 + sigma^2 = 1 (Ho et al. 2020, arXiv 2006.11239)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.types import Array, InputError


@dataclasses.dataclass(frozen=True, eq=False)
class VP:
    """A table of T log-SNRs, interpolated as a function of time.

    Index i of the table is at t = (i + 1) / T. Between the points, log-SNR is linear in t. Where log-SNR is unbounded,
    sigma or alpha is linear instead: sigma from t = 0 to the first point, and, with zero terminal SNR, alpha from the
    second-last point to t = 1. Thus both ends are exact and both derivatives are finite.

    Attributes:
      table: log(alpha^2 / sigma^2) at t = 1/T, 2/T, ..., 1, decreasing; the last may be -inf; float64 `[T]`.
    """

    table: np.ndarray = dataclasses.field(repr=False)

    @property
    def num_steps(self) -> int:
        return len(self.table)

    def alpha(self, t: Array) -> Array:
        t, sigma, inner, alpha = self._pieces(t)
        return self._join(t, jnp.sqrt(1 - sigma**2), jnp.sqrt(jax.nn.sigmoid(inner)), alpha)

    def sigma(self, t: Array) -> Array:
        t, sigma, inner, alpha = self._pieces(t)
        return self._join(t, sigma, jnp.sqrt(jax.nn.sigmoid(-inner)), jnp.sqrt(1 - alpha**2))

    def log_snr(self, t: Array) -> Array:
        t, sigma, inner, alpha = self._pieces(t)
        near_data = jnp.log1p(-(sigma**2)) - 2 * jnp.log(sigma)
        near_noise = 2 * jnp.log(alpha) - jnp.log1p(-(alpha**2))
        return self._join(t, near_data, inner, near_noise)

    def time(self, log_snr: Array) -> Array:
        log_snr = _floating(log_snr)
        finite, points = self._points(log_snr.dtype)
        near_data = jnp.sqrt(jax.nn.sigmoid(-log_snr) / jax.nn.sigmoid(-finite[0])) * points[0]
        near_noise = 1 - jnp.sqrt(jax.nn.sigmoid(log_snr) / jax.nn.sigmoid(finite[-1])) * (1 - points[-1])
        inner = jnp.interp(-log_snr, -finite, points)
        return jnp.where(log_snr > finite[0], near_data, jnp.where(log_snr < finite[-1], near_noise, inner))

    def _points(self, dtype) -> tuple[Array, Array]:
        """Returns the finite entries of the table and their times."""
        finite = self.table[np.isfinite(self.table)]
        return jnp.asarray(finite, dtype), jnp.asarray(np.arange(1, len(finite) + 1) / self.num_steps, dtype)

    def _pieces(self, t: Array) -> tuple[Array, Array, Array, Array]:
        """Returns t; sigma, linear up to the first point; log-SNR between the points; alpha, linear from the last.

        Each piece is constant outside its range, so that the branches that `_join` discards have no NaN derivatives.
        """
        t = _floating(t)
        finite, points = self._points(t.dtype)
        sigma = jnp.sqrt(jax.nn.sigmoid(-finite[0])) * jnp.minimum(t / points[0], 1)
        zero_terminal = len(finite) < self.num_steps
        share = jnp.minimum((1 - t) / (1 - points[-1]), 1) if zero_terminal else jnp.ones_like(t)
        alpha = jnp.sqrt(jax.nn.sigmoid(finite[-1])) * share
        return t, sigma, jnp.interp(t, points, finite), alpha

    def _join(self, t: Array, near_data: Array, inner: Array, near_noise: Array) -> Array:
        _, points = self._points(t.dtype)
        return jnp.where(t < points[0], near_data, jnp.where(t > points[-1], near_noise, inner))


def make(
    betas: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "linear",
    beta_start: float | None = None,
    beta_end: float | None = None,
    num_steps: int = 1000,
    zero_terminal_snr: bool = False,
) -> VP:
    """Builds a VP schedule from one of the usual tables of betas.

    Args:
      betas: `linear` (Ho et al. 2020: 1e-4 to 0.02), `scaled_linear` (linear in sqrt(beta); latent diffusion's 0.00085
        to 0.012), `sigmoid` (a logistic function from -6 to 6 between the end points 1e-4 and 0.02; GeoDiff, arXiv
        2203.02923), or `cosine` (Nichol & Dhariwal 2021, eq. 17, each beta clipped at 0.999; it has no end points).
      beta_start, beta_end: First and last beta, in (0, 1); by default the paper's values.
      num_steps: T, the length of the table.
      zero_terminal_snr: Whether to shift and scale the table of alphas so that the last is 0 (Lin et al. 2024, arXiv
        2305.08891, algorithm 1).
    """
    checks.at_least(2 if zero_terminal_snr else 1, num_steps=num_steps)
    checks.at_most(10**6, num_steps, "num_steps")
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if betas == "cosine" and value is not None:
            raise InputError(name, "must not be set, because the cosine table has no end points; remove it")
        if value is not None and not 0 < value < 1:
            raise InputError(name, f"must be in (0, 1), got {value}")
    if betas == "cosine":
        table = _cosine(num_steps)
    else:
        start, end = (0.00085, 0.012) if betas == "scaled_linear" else (1e-4, 0.02)
        start = start if beta_start is None else beta_start
        end = end if beta_end is None else beta_end
        table = {
            "linear": lambda: np.linspace(start, end, num_steps),
            "scaled_linear": lambda: np.linspace(start**0.5, end**0.5, num_steps) ** 2,
            "sigmoid": lambda: _sigmoid(np.linspace(-6, 6, num_steps)) * (end - start) + start,
        }[betas]()
    log_alpha_bar = np.cumsum(np.log1p(-table))
    if zero_terminal_snr:
        alpha = np.exp(log_alpha_bar / 2)
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        with np.errstate(divide="ignore"):
            log_alpha_bar = 2 * np.log(alpha)
    return VP(log_alpha_bar - np.log(-np.expm1(log_alpha_bar)))


def _cosine(num_steps: int) -> np.ndarray:
    alpha_bar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _floating(x: Array) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
