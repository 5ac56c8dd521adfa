"""The variance preserving path through a table of log-SNRs, which `vp` and `laplace` share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array


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


def _floating(x: Array) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
