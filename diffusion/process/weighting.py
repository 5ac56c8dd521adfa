"""Loss weightings: `simple()(schedule, coefficients, t)` returns the weights `[B]` of the mean squared error of F.

F is the network's output. The literature states weights for the error of x0 or of eps. The error of x0 is c_out times
the error of F, and the error of eps is alpha / sigma times the error of x0. A weight w on x0 is therefore w c_out^2 on
F, and a weight w on eps is w SNR on x0. Each function here is defined by its weight on x0; the factor c_out^2 makes it
correct for every parameterization.

SNR is infinite at t = 0 and c_out may be 0 there, and log SNR is -infinite where a schedule ends in pure noise. Weights
are therefore computed as (sigma^2 w) (c_out / sigma)^2, where sigma^2 w is a function of alpha and sigma, and
c_out / sigma = 1 / (sigma a - alpha b). Their values at t = 1 are exact, and those at t = 0 are taken just after it.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import derivative
from diffusion.core.types import Array, Schedule
from diffusion.process.parameterization import Coefficients

Weighting = Callable[[Schedule, Coefficients, Array], Array]

EARLIEST = 2.0**-24  # stands for t = 0, where weights may be infinite


def simple() -> Weighting:
    """Weight 1 on F, for every parameterization (Ho et al. 2020, eq. 14); 1 / c_out^2 on x0."""
    return lambda schedule, coefficients, t: jnp.ones_like(t)


def snr() -> Weighting:
    """Weight SNR on x0, which is 1 on eps (Salimans & Ho 2022, arXiv 2202.00512, section 4)."""
    return _on_x0(lambda signal, noise: signal)


def truncated_snr() -> Weighting:
    """Weight max(SNR, 1) on x0 (Salimans & Ho 2022, section 4)."""
    return _on_x0(jnp.maximum)


def min_snr(gamma: float = 5.0) -> Weighting:
    """Weight min(SNR, gamma) on x0 (Hang et al. 2023, arXiv 2303.09556, eq. 8)."""
    checks.positive(gamma=gamma)
    return _on_x0(lambda signal, noise: jnp.minimum(signal, gamma * noise))


def soft_min_snr(gamma: float = 4.0) -> Weighting:
    """Weight SNR gamma / (SNR + gamma) on x0, a smooth min_snr (Crowson et al. 2024, arXiv 2401.11605, eq. 11)."""
    checks.positive(gamma=gamma)
    return _on_x0(lambda signal, noise: signal * (gamma * noise / (signal + gamma * noise)))


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """Weight 1 / (k + SNR)^gamma on eps; SNR / (k + SNR)^gamma on x0 (Choi et al. 2022, arXiv 2204.00227, eq. 8)."""
    checks.positive(k=k)
    return _on_x0(lambda signal, noise: signal * (noise / (k * noise + signal)) ** gamma)


def edm(sigma_data: float = 0.5) -> Weighting:
    """Weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0, where sigma is sigma / alpha of the schedule.

    It equals SNR + 1 / sigma_data^2, and is 1 on the F of the edm parameterization (Karras et al. 2022, arXiv
    2206.00364, table 1).
    """
    checks.positive(sigma_data=sigma_data)
    return _on_x0(lambda signal, noise: signal + noise / sigma_data**2)


def vlb() -> Weighting:
    """Weight -SNR'(t) / 2 on x0 (Kingma et al. 2021, arXiv 2107.00630, eq. 17).

    For t uniform on (0, 1] this is the diffusion term of the variational bound, in nats per dimension.
    """
    return sigmoid(bias=float("inf"))


def sigmoid(bias: float = -1.0) -> Weighting:
    """Weight sigmoid(bias - log SNR) on eps per unit of log-SNR; on x0, that times the weight of `vlb`.

    See Hoogeboom et al. 2024, arXiv 2410.19324, section 3.1, and Kingma & Gao 2023, arXiv 2303.00848.
    """

    def weight(schedule: Schedule, coefficients: Coefficients, t: Array) -> Array:
        t, alpha, sigma, scale = _path(schedule, coefficients, t)
        # The weight of vlb on x0 is alpha (alpha sigma' - sigma alpha') / sigma^3.
        speed = alpha * derivative(schedule.sigma, t) - sigma * derivative(schedule.alpha, t)
        share = sigma**2 / (sigma**2 + alpha**2 * math.exp(-bias))
        return alpha * speed / sigma * share * scale

    return weight


def _on_x0(weight: Callable[[Array, Array], Array]) -> Weighting:
    """Returns the weighting whose weight on x0 is `weight(alpha^2, sigma^2) / sigma^2`."""

    def on_output(schedule: Schedule, coefficients: Coefficients, t: Array) -> Array:
        _, alpha, sigma, scale = _path(schedule, coefficients, t)
        return weight(alpha**2, sigma**2) * scale

    return on_output


def _path(schedule: Schedule, coefficients: Coefficients, t: Array) -> tuple[Array, Array, Array, Array]:
    """Returns t, at least EARLIEST, alpha and sigma there, and (c_out / sigma)^2."""
    t = jnp.maximum(t, EARLIEST)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    inverse = alpha * coefficients.b - sigma * coefficients.a  # -sigma / c_out
    # It is infinite where the target is, as at the boundary of a consistency model.
    finite = jnp.isfinite(inverse)
    scale = jnp.where(finite, 1 / jnp.where(finite, inverse, 1), coefficients.c_out / sigma)
    return t, alpha, sigma, scale**2
