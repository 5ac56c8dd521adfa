"""Weights of the loss, by name: `simple()(schedule, row, t)` gives `[B]`, which multiplies the mean squared error of
the network's output F.

The literature states weights on the error of x0 or of eps. An error of x0 is c_out times that of F, and alpha / sigma
times it is that of eps, so a weight w on x0 is w c_out^2 on F, and a weight w on eps is w SNR on x0. Each function here
says what it is on x0; the factor c_out^2 makes it right for every parameterization alike.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.core.arrays import derivative
from diffusion.core.types import Array, InputError, Schedule
from diffusion.process.parameterization import Coefficients

Weighting = Callable[[Schedule, Coefficients, Array], Array]


def simple() -> Weighting:
    """1 on F, whatever F is (Ho et al. 2020, eq. 14); 1 / c_out^2 on x0."""
    return lambda schedule, row, t: jnp.ones_like(t)


def snr() -> Weighting:
    """SNR on x0; 1 on eps (Salimans & Ho 2022, arXiv 2202.00512, section 4)."""
    return _on_x0(lambda log_snr: jnp.exp(log_snr))


def truncated_snr() -> Weighting:
    """max(SNR, 1) on x0 (Salimans & Ho 2022, section 4)."""
    return _on_x0(lambda log_snr: jnp.exp(jnp.maximum(log_snr, 0)))


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(SNR, gamma) on x0 (Hang et al. 2023, arXiv 2303.09556, eq. 8)."""
    _positive("gamma", gamma)
    return _on_x0(lambda log_snr: jnp.minimum(jnp.exp(log_snr), gamma))


def soft_min_snr(gamma: float = 4.0) -> Weighting:
    """SNR gamma / (SNR + gamma) on x0: min_snr without its corner (Crowson et al. 2024, arXiv 2401.11605, eq. 11)."""
    _positive("gamma", gamma)
    return _on_x0(lambda log_snr: gamma * jax.nn.sigmoid(log_snr - jnp.log(gamma)))


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """1 / (k + SNR)^gamma on eps; SNR / (k + SNR)^gamma on x0 (Choi et al. 2022, arXiv 2204.00227, eq. 8)."""
    _positive("k", k)
    return _on_x0(lambda log_snr: jnp.exp(log_snr - gamma * jnp.logaddexp(jnp.log(k), log_snr)))


def edm(sigma_data: float = 0.5) -> Weighting:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = SNR + 1 / sigma_data^2 on x0, at sigma / alpha; 1 on the F of
    the edm parameterization (Karras et al. 2022, arXiv 2206.00364, table 1)."""
    _positive("sigma_data", sigma_data)
    return _on_x0(lambda log_snr: jnp.exp(log_snr) + sigma_data**-2)


def vlb() -> Weighting:
    """-SNR'(t) / 2 on x0: the diffusion term of the variational bound for t uniform on (0, 1], in nats a dimension
    (Kingma et al. 2021, arXiv 2107.00630, eq. 17)."""
    return sigmoid(bias=float("inf"))


def sigmoid(bias: float = -1.0) -> Weighting:
    """sigmoid(bias - log SNR) on eps, for each unit of log-SNR: times the `vlb` on x0 (Hoogeboom et al. 2024, arXiv
    2410.19324, section 3.1; Kingma & Gao 2023, arXiv 2303.00848)."""

    def weight(schedule: Schedule, row: Coefficients, t: Array) -> Array:
        speed = -derivative(schedule.log_snr, t) / 2
        share = jax.nn.sigmoid(bias - schedule.log_snr(t))
        return speed * share * _over_eps(schedule, row, t)

    return weight


def _on_x0(weight: Callable[[Array], Array]) -> Weighting:
    return lambda schedule, row, t: weight(schedule.log_snr(t)) * row.c_out**2


def _over_eps(schedule: Schedule, row: Coefficients, t: Array) -> Array:
    """A weight of 1 on eps, as one on F."""
    return jnp.exp(schedule.log_snr(t)) * row.c_out**2


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(name, f"must be positive, got {value}")
