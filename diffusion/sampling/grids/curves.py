"""Grids that are functions of even steps in t; see `diffusion.sampling.grids`."""

import numpy as np
from scipy.special import betaincinv

from diffusion.core import checks
from diffusion.core.types import InputError, Schedule
from diffusion.sampling.grids.common import decreasing, extreme


def quadratic(schedule: Schedule, steps: int, power: float = 2.0) -> np.ndarray:
    """Returns t = (i / steps)^power, DDIM's quadratic grid on [0, 1] (Song et al. 2021, arXiv 2010.02502, app. D.2).

    Args:
      power: above 1 places more steps near the data, below 1 near the noise.
    """
    checks.positive(power=power)
    return decreasing(np.linspace(1, 0, steps + 1) ** power, "power")


def sigmoid(schedule: Schedule, steps: int, scale: float = 6.0) -> np.ndarray:
    """Returns a logistic function of even steps, rescaled to [0, 1]: dense at both ends, as `beta` is by default.

    Args:
      scale: the width of the part of the logistic, centered at 0, that is mapped to [0, 1]; near 0 the steps are even.
    """
    checks.positive(scale=scale)
    even = np.linspace(1, -1, steps + 1)
    with np.errstate(invalid="ignore"):  # an infinite scale, which `decreasing` rejects
        # Written as a hyperbolic tangent the function is odd, so that both ends are exact.
        times = (1 + np.tanh(scale / 4 * even) / np.tanh(scale / 4)) / 2
    return decreasing(times, "scale")


def beta(schedule: Schedule, steps: int, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Returns the quantiles of Beta(a, b) at even probabilities (Lee et al. 2024, arXiv 2407.12173).

    Args:
      a, b: values of `a` below 1 place more steps near the data, of `b` near the noise; 1 and 1 give even steps.
    """
    checks.positive(a=a, b=b)
    return decreasing(betaincinv(a, b, np.linspace(1, 0, steps + 1)), extreme(a, b))


def shifted(schedule: Schedule, steps: int, shift: float = 3.0, last: float | None = None) -> np.ndarray:
    """Returns t = shift u / (1 + (shift - 1) u) for even u (Esser et al. 2024, arXiv 2403.03206, eq. 23).

    Args:
      shift: above 1 places more steps near the noise. It applies in addition to a shift of the schedule itself.
      last: the last u before 0, in (0, 1), up to which the steps are even. None: 1 / steps, so that all are.
    """
    checks.positive(shift=shift, last=last)
    if last is not None and last >= 1:
        raise InputError("last", f"must be below 1, got {last}")
    even = np.linspace(1, 0, steps + 1) if last is None else np.append(np.linspace(1, last, steps), 0)
    with np.errstate(invalid="ignore"):  # an infinite shift, which `decreasing` rejects
        # The denominator as a sum is rounded to `shift` at u = 1, so that no t is above 1.
        times = shift * even / (shift * even + (1 - even))
    return decreasing(times, "shift")


def linear_quadratic(schedule: Schedule, steps: int, threshold_noise: float = 0.025) -> np.ndarray:
    """Returns even small steps, followed by steps that grow linearly, for flows (Genmo's Mochi).

    With N steps and N' = N // 2, the first N' steps end at t = 1 - threshold_noise, and the others continue at the same
    rate with a quadratic term:

        1 - t_i = (threshold_noise / N') i + c max(i - N', 0)^2,    c such that t_N = 0

    Args:
      threshold_noise: the length in t of the linear part.
    """
    checks.positive(threshold_noise=threshold_noise)
    half, i = steps // 2, np.arange(steps + 1)
    rate = threshold_noise / half if half else 0.0
    with np.errstate(invalid="ignore"):  # an infinite threshold, which `decreasing` rejects
        times = 1 - rate * i - (1 - rate * steps) * (np.maximum(i - half, 0) / (steps - half)) ** 2
    return decreasing(np.append(times[:-1], 0), "threshold_noise")
