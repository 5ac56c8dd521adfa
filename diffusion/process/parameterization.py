"""Parameterizations: what the network's output F predicts.

A parameterization is a set of coefficients that define two affine maps:

    x0 = c_skip x_t + c_out F(c_in x_t, c_noise)        for sampling
    F  = a x0 + b eps                                   the training target

The two are consistent because c_skip = b / (alpha b - sigma a) and c_out = -sigma / (alpha b - sigma a). Each
parameterization spells out its coefficients so that they stay finite where these quotients are 0 / 0.

Each public function builds a parameterization: `eps()(schedule, t)` returns its coefficients at times `t`.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import derivative, expand
from diffusion.core.types import Array, InputError, Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coefficients:
    """The coefficients of a parameterization at times t, each with the shape of t, `[]`, `[B]` or `[B, T]`.

    Attributes:
      c_skip, c_out: x0 = c_skip x_t + c_out F.
      c_in: Factor on x_t at the network's input.
      c_noise: The noise label, the network's input for the time.
      a, b: The training target is a x0 + b eps.
    """

    c_skip: Array
    c_out: Array
    c_in: Array
    c_noise: Array
    a: Array
    b: Array

    def target(self, x0: Array, eps: Array) -> Array:
        """Returns the network's training target, `[B, ...]`."""
        return expand(self.a, x0) * x0 + expand(self.b, x0) * eps

    def to_x0(self, output: Array, x_t: Array) -> Array:
        """Returns x0 from the network's output, `[B, ...]`."""
        return expand(self.c_skip, x_t) * x_t + expand(self.c_out, x_t) * output

    def from_x0(self, x0: Array, x_t: Array, alpha: Array, sigma: Array) -> Array:
        """Returns the output that `to_x0` maps to x0, for sigma > 0.

        With it, the output of any parameterization can be converted to any other.
        """
        eps = (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)
        return self.target(x0, eps)


Parameterization = Callable[[Schedule, Array], Coefficients]
NoiseLabel = Literal["time", "unit", "index", "log_sigma", "log_sigma_1000"]


def eps(c_noise: NoiseLabel = "time") -> Parameterization:
    """F predicts the noise (Ho et al. 2020). Undefined where alpha is 0."""

    def coefficients(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma, c_in, zero = _common_terms(schedule, t)
        return Coefficients(1 / alpha, -sigma / alpha, c_in, _label(c_noise, schedule, t), a=zero, b=zero + 1)

    return coefficients


def x0(c_noise: NoiseLabel = "time") -> Parameterization:
    """F predicts the clean example x0."""

    def coefficients(schedule: Schedule, t: Array) -> Coefficients:
        _, _, c_in, zero = _common_terms(schedule, t)
        return Coefficients(zero, zero + 1, c_in, _label(c_noise, schedule, t), a=zero + 1, b=zero)

    return coefficients


def v(c_noise: NoiseLabel = "time") -> Parameterization:
    """F predicts v = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""

    def coefficients(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma, c_in, _ = _common_terms(schedule, t)
        power = alpha**2 + sigma**2  # 1 for variance preserving schedules
        return Coefficients(alpha / power, -sigma / power, c_in, _label(c_noise, schedule, t), a=-sigma, b=alpha)

    return coefficients


def velocity(c_noise: NoiseLabel = "time") -> Parameterization:
    """F predicts dx_t/dt = alpha' x0 + sigma' eps (Lipman et al. 2023, arXiv 2210.02747).

    Undefined at t = 0 if sigma' is infinite there, as it is for `vp_sde` and `ve`.
    """

    def coefficients(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma, c_in, _ = _common_terms(schedule, t)
        d_alpha, d_sigma = derivative(schedule.alpha, t), derivative(schedule.sigma, t)
        determinant = alpha * d_sigma - sigma * d_alpha
        label = _label(c_noise, schedule, t)
        return Coefficients(d_sigma / determinant, -sigma / determinant, c_in, label, a=d_alpha, b=d_sigma)

    return coefficients


def score(c_noise: NoiseLabel = "time") -> Parameterization:
    """F predicts the score, -eps / sigma (Song et al. 2021, arXiv 2011.13456). Undefined where sigma or alpha is 0."""

    def coefficients(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma, c_in, zero = _common_terms(schedule, t)
        return Coefficients(1 / alpha, sigma**2 / alpha, c_in, _label(c_noise, schedule, t), a=zero, b=-1 / sigma)

    return coefficients


def edm(sigma_data: float = 0.5, c_noise: NoiseLabel = "log_sigma", negative: bool = False) -> Parameterization:
    """EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364, table 1).

    It is applied to x_t / alpha at noise level sigma / alpha.

    Args:
      sigma_data: Standard deviation of the data, for which input and target have unit variance.
      c_noise: The noise label.
      negative: Whether F has the opposite sign, as with `prediction_type="v_prediction"` of diffusers' EDM schedulers.
        With sigma_data = 1, F is then v of Salimans & Ho (2022) for x_t / sqrt(alpha^2 + sigma^2).
    """
    checks.positive(sigma_data=sigma_data)
    sign = -1 if negative else 1

    def coefficients(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        power = sigma**2 + sigma_data**2 * alpha**2  # in this form c_skip is exactly 1 at t = 0
        total = jnp.sqrt(power)
        return Coefficients(
            c_skip=sigma_data**2 * alpha / power,
            c_out=sign * sigma_data * sigma / total,
            c_in=1 / total,
            c_noise=_label(c_noise, schedule, t),
            a=sign * sigma / (sigma_data * total),
            b=-sign * sigma_data * alpha / total,
        )

    return coefficients


def consistency(
    sigma_data: float = 0.5, sigma_min: float = 0.002, c_noise: NoiseLabel = "log_sigma"
) -> Parameterization:
    """EDM's preconditioning, shifted to satisfy the boundary condition of consistency models.

    f(x, sigma_min) = x holds exactly for sigma / alpha <= sigma_min (Song et al. 2023, arXiv 2303.01469, appendix C);
    it is x / alpha where alpha is not 1. The training target of a denoiser is defined above `sigma_min` only.

    Args:
      sigma_data: Standard deviation of the data.
      sigma_min: Noise level sigma / alpha of the boundary condition.
      c_noise: The noise label.
    """
    checks.positive(sigma_data=sigma_data)
    checks.at_least(0, sigma_min=sigma_min)

    def coefficients(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        above = jnp.maximum(sigma - sigma_min * alpha, 0)
        total = jnp.sqrt(sigma**2 + (sigma_data * alpha) ** 2)
        shifted = above**2 + (sigma_data * alpha) ** 2
        # The boundary condition must hold exactly, and the quotient would round.
        c_skip = jnp.where(above > 0, sigma_data**2 * alpha / shifted, 1 / alpha)
        c_out = sigma_data * above / total
        # The target is (x0 - c_skip x_t) / c_out with common factors cancelled: 1 - c_skip alpha = above^2 / shifted.
        return Coefficients(
            c_skip,
            c_out,
            c_in=1 / total,
            c_noise=_label(c_noise, schedule, t),
            a=above * total / (sigma_data * shifted),
            b=-sigma_data * alpha * sigma * total / (above * shifted),
        )

    return coefficients


def _common_terms(schedule: Schedule, t: Array) -> tuple[Array, Array, Array, Array]:
    """Returns alpha, sigma, c_in and zero.

    c_in is 1 for variance preserving and straight paths, as published networks expect, and scales the input of variance
    exploding paths down to unit variance.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha, sigma, 1 / jnp.maximum(jnp.sqrt(alpha**2 + sigma**2), 1), jnp.zeros_like(alpha)


def _label(kind: NoiseLabel, schedule: Schedule, t: Array) -> Array:
    """Returns the noise label, the network's input for the time.

    Args:
      kind: `time`: 1000 t. `unit`: t, for methods that differentiate the network with respect to t, because the
        derivative is a thousand times smaller. `index`: the index into the schedule's table, for weights that were
        trained with it. `log_sigma`: EDM's log(sigma / alpha) / 4, which is infinite at both ends. `log_sigma_1000`: a
        thousand times that, for the published consistency models.
    """
    if kind == "time":
        return 1000.0 * t
    if kind == "unit":
        return t
    if kind.startswith("log_sigma"):
        return -schedule.log_snr(t) / 8 * (1000 if kind == "log_sigma_1000" else 1)
    if not hasattr(schedule, "num_steps"):
        raise InputError("c_noise", "'index' requires a schedule with a table of steps (vp); use 'time'")
    return schedule.num_steps * t - 1.0
