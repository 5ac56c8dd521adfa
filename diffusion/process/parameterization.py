"""What the network's output F stands for. Each parameterization is one affine row, read both ways:

    x0 = c_skip x_t + c_out F(c_in x_t, c_noise)        to sample
    F  = a x0 + b eps                                   to train

Both readings agree because c_skip = b / (alpha b - sigma a) and c_out = -sigma / (alpha b - sigma a); each row writes
its own coefficients so that they stay finite where that quotient is 0 / 0.

The functions here are the rows by name: `eps()(schedule, t)` gives the coefficients at times `t`.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core.arrays import derivative, expand
from diffusion.core.types import Array, InputError, Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coefficients:
    """The coefficients of a parameterization at times t; each has t's shape, `[B]` or `[]`."""

    c_skip: Array
    c_out: Array
    c_in: Array
    c_noise: Array
    a: Array
    b: Array

    def target(self, x0: Array, eps: Array) -> Array:
        """F's training target, `[B, ...]`."""
        return expand(self.a, x0) * x0 + expand(self.b, x0) * eps

    def to_x0(self, output: Array, x_t: Array) -> Array:
        """x0 from the network's output, `[B, ...]`."""
        return expand(self.c_skip, x_t) * x_t + expand(self.c_out, x_t) * output

    def from_x0(self, x0: Array, x_t: Array, alpha: Array, sigma: Array) -> Array:
        """The output that `to_x0` turns into x0, for sigma > 0: with it, any row converts into any other."""
        eps = (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)
        return self.target(x0, eps)


Parameterization = Callable[[Schedule, Array], Coefficients]
NoiseLabel = Literal["time", "unit", "index", "log_sigma"]


def eps(c_noise: NoiseLabel = "time") -> Parameterization:
    """F is the noise (Ho et al. 2020). Does not exist where alpha is 0."""

    def row(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma, c_in, zero = _coefficients(schedule, t)
        return Coefficients(1 / alpha, -sigma / alpha, c_in, _label(c_noise, schedule, t), a=zero, b=zero + 1)

    return row


def x0(c_noise: NoiseLabel = "time") -> Parameterization:
    """F is the clean example."""

    def row(schedule: Schedule, t: Array) -> Coefficients:
        _, _, c_in, zero = _coefficients(schedule, t)
        return Coefficients(zero, zero + 1, c_in, _label(c_noise, schedule, t), a=zero + 1, b=zero)

    return row


def v(c_noise: NoiseLabel = "time") -> Parameterization:
    """F is alpha eps - sigma x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""

    def row(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma, c_in, _ = _coefficients(schedule, t)
        power = alpha**2 + sigma**2  # 1 where the schedule is variance preserving
        return Coefficients(alpha / power, -sigma / power, c_in, _label(c_noise, schedule, t), a=-sigma, b=alpha)

    return row


def velocity(c_noise: NoiseLabel = "time") -> Parameterization:
    """F is dx_t/dt = alpha' x0 + sigma' eps (Lipman et al. 2023, arXiv 2210.02747). At t = 0 it exists where sigma' is
    finite there: not for `vp_sde` and `ve`."""

    def row(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma, c_in, _ = _coefficients(schedule, t)
        d_alpha, d_sigma = derivative(schedule.alpha, t), derivative(schedule.sigma, t)
        determinant = alpha * d_sigma - sigma * d_alpha
        label = _label(c_noise, schedule, t)
        return Coefficients(d_sigma / determinant, -sigma / determinant, c_in, label, a=d_alpha, b=d_sigma)

    return row


def score(c_noise: NoiseLabel = "time") -> Parameterization:
    """F is the score, -eps / sigma (Song et al. 2021, arXiv 2011.13456). Exists where sigma and alpha are not 0."""

    def row(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma, c_in, zero = _coefficients(schedule, t)
        return Coefficients(1 / alpha, sigma**2 / alpha, c_in, _label(c_noise, schedule, t), a=zero, b=-1 / sigma)

    return row


def edm(sigma_data: float = 0.5, c_noise: NoiseLabel = "log_sigma") -> Parameterization:
    """EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364, table 1), on x_t / alpha at noise sigma / alpha:
    input and target have unit variance if the data's standard deviation is `sigma_data`, positive."""
    _check_sigma_data(sigma_data)

    def row(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        power = sigma**2 + sigma_data**2 * alpha**2  # written so that c_skip is 1 at t = 0 bit for bit
        total = jnp.sqrt(power)
        return Coefficients(
            c_skip=sigma_data**2 * alpha / power,
            c_out=sigma_data * sigma / total,
            c_in=1 / total,
            c_noise=_label(c_noise, schedule, t),
            a=sigma / (sigma_data * total),
            b=-sigma_data * alpha / total,
        )

    return row


def consistency(
    sigma_data: float = 0.5, sigma_min: float = 0.002, c_noise: NoiseLabel = "log_sigma"
) -> Parameterization:
    """EDM's preconditioning moved so that f(x, sigma_min) = x exactly, at sigma / alpha = sigma_min and below (Song et
    al. 2023, arXiv 2303.01469, appendix C); x / alpha where alpha is not 1. As a denoiser's row it exists above
    `sigma_min`."""
    _check_sigma_data(sigma_data)
    if sigma_min < 0:
        raise InputError("sigma_min", f"must be at least 0, got {sigma_min}")

    def row(schedule: Schedule, t: Array) -> Coefficients:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        above = jnp.maximum(sigma - sigma_min * alpha, 0)
        total = jnp.sqrt(sigma**2 + (sigma_data * alpha) ** 2)
        moved = above**2 + (sigma_data * alpha) ** 2
        # The quotient rounds, and at the boundary x is to come back bit for bit.
        c_skip = jnp.where(above > 0, sigma_data**2 * alpha / moved, 1 / alpha)
        c_out = sigma_data * above / total
        # The target is (x0 - c_skip x_t) / c_out with the common factors cancelled: 1 - c_skip alpha = above^2 / moved.
        return Coefficients(
            c_skip,
            c_out,
            c_in=1 / total,
            c_noise=_label(c_noise, schedule, t),
            a=above * total / (sigma_data * moved),
            b=-sigma_data * alpha * sigma * total / (above * moved),
        )

    return row


def _check_sigma_data(sigma_data: float) -> None:
    if sigma_data <= 0:
        raise InputError("sigma_data", f"must be positive, got {sigma_data}")


def _coefficients(schedule: Schedule, t: Array) -> tuple[Array, Array, Array, Array]:
    """alpha, sigma, c_in and a zero. c_in leaves the input as it is, as published networks of variance preserving and
    straight paths want it, and brings that of variance exploding paths down to unit scale."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha, sigma, 1 / jnp.maximum(jnp.sqrt(alpha**2 + sigma**2), 1), jnp.zeros_like(alpha)


def _label(kind: NoiseLabel, schedule: Schedule, t: Array) -> Array:
    """The number that tells the network the time: 1000 t; t itself, `unit`, for methods that differentiate the network
    in t, whose derivative is then a thousand times less; the index into the schedule's table (weights that were
    trained on tables want exactly that); or EDM's log(sigma / alpha) / 4, infinite at both ends."""
    if kind == "time":
        return 1000.0 * t
    if kind == "unit":
        return t
    if kind == "log_sigma":
        return -schedule.log_snr(t) / 8
    if not hasattr(schedule, "num_steps"):
        raise InputError("c_noise", "'index' needs a schedule with a table of steps (vp); use 'time'")
    return schedule.num_steps * t - 1.0
