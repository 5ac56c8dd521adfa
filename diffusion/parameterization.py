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

import jax.numpy as jnp

from diffusion.types import Array, InputError, Schedule


@dataclasses.dataclass(frozen=True)
class Row:
    """The coefficients of a parameterization at times t; each has t's shape."""

    c_skip: Array
    c_out: Array
    c_in: Array
    c_noise: Array
    a: Array
    b: Array


Parameterization = Callable[[Schedule, Array], Row]
NoiseLabel = Literal["time", "index"]


def eps(c_noise: NoiseLabel = "time") -> Parameterization:
    """F is the noise (Ho et al. 2020). Does not exist where alpha is 0."""

    def row(schedule: Schedule, t: Array) -> Row:
        alpha, sigma, zero, one = _coefficients(schedule, t)
        return Row(1 / alpha, -sigma / alpha, one, _label(c_noise, schedule, t), a=zero, b=one)

    return row


def x0(c_noise: NoiseLabel = "time") -> Parameterization:
    """F is the clean example."""

    def row(schedule: Schedule, t: Array) -> Row:
        _, _, zero, one = _coefficients(schedule, t)
        return Row(zero, one, one, _label(c_noise, schedule, t), a=one, b=zero)

    return row


def v(c_noise: NoiseLabel = "time") -> Parameterization:
    """F is alpha eps - sigma x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""

    def row(schedule: Schedule, t: Array) -> Row:
        alpha, sigma, _, one = _coefficients(schedule, t)
        power = alpha**2 + sigma**2  # 1 where the schedule is variance preserving
        return Row(alpha / power, -sigma / power, one, _label(c_noise, schedule, t), a=-sigma, b=alpha)

    return row


def _coefficients(schedule: Schedule, t: Array) -> tuple[Array, Array, Array, Array]:
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha, sigma, jnp.zeros_like(alpha), jnp.ones_like(alpha)


def _label(kind: NoiseLabel, schedule: Schedule, t: Array) -> Array:
    """The number that tells the network the time: 1000 t, or the index into the schedule's table (weights that were
    trained on tables want exactly that)."""
    if kind == "time":
        return 1000.0 * t
    if not hasattr(schedule, "num_steps"):
        raise InputError("c_noise", "'index' needs a schedule with a table of steps (vp); use 'time'")
    return schedule.num_steps * t - 1.0
