"""Grids with steps in the noise level sigma / alpha; see `diffusion.sampling.grids`."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaincinv

from diffusion.core import checks
from diffusion.core.types import InputError, Schedule
from diffusion.sampling.grids.common import (
    GridSpec,
    extreme,
    falling,
    log_snr_ends,
    log_snr_range,
    sigma_ends,
    times_of,
)

# sigma / alpha of the published ten steps. The last step goes to 0 instead of the last level.
_ALIGNED = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def karras(
    schedule: Schedule,
    steps: int,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    ends: GridSpec | None = None,
    points: int | None = None,
) -> np.ndarray:
    """Returns times whose sigma / alpha are even in the power 1 / rho (Karras et al. 2022, arXiv 2206.00364, eq. 5).

        sigma_i = (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    Args:
      rho: larger values place more steps at low noise.
      sigma_min, sigma_max: the lowest and the highest level. The defaults are the schedule's own, if it has them;
        otherwise 0.002, and 80 where the schedule ends in pure noise.
      ends: another grid, whose first and last time before 0 have these levels, as in diffusers' `use_karras_sigmas`.
      points: the length of a list of which every (points // steps)-th level is taken from the highest on, as for
        consistency models (Song et al. 2023, arXiv 2303.01469). None: the number of steps, so that all are.
    """
    checks.positive(rho=rho)
    if points is not None and points < max(steps, 2):
        raise InputError("points", f"must be at least 2 and at least the number of steps, {steps}, got {points}")
    lowest, highest = _ends(schedule, steps, ends, sigma_min, sigma_max)
    # Computed in logarithms, because sigma^(1/rho) overflows for small rho and cancels for large rho. For small rho the
    # last level is lost to rounding, so it is set explicitly.
    share, last = np.linspace(0, 1, steps), (lowest - highest) / 2 / rho
    if points is not None:
        share = np.arange(steps) * (points // steps) / (points - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(share < 1, np.log1p(share * np.expm1(last)), last)
        log_snr = lowest - 2 * rho * logs
    return times_of(schedule, log_snr, "rho")


def exponential(
    schedule: Schedule,
    steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    ends: GridSpec | None = None,
) -> np.ndarray:
    """Returns times whose sigma / alpha form a geometric sequence: `log_snr` in other units, `karras` for infinite rho.

    Args:
      sigma_min, sigma_max, ends: the lowest and the highest level, as for `karras`.
    """
    return times_of(schedule, np.linspace(*_ends(schedule, steps, ends, sigma_min, sigma_max), steps), "sigma_min")


def polyexponential(
    schedule: Schedule,
    steps: int,
    rho: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> np.ndarray:
    """Returns times whose log(sigma / alpha) fall as the power rho of even steps, as k-diffusion's grid of this name.

    Args:
      rho: 1 is `exponential`; larger values place more steps at low noise.
      sigma_min, sigma_max: the lowest and the highest level, as for `karras`.
    """
    checks.positive(rho=rho)
    lowest, highest = sigma_ends(schedule, sigma_min, sigma_max)
    return times_of(schedule, highest + np.linspace(1, 0, steps) ** rho * (lowest - highest), "rho")


def kl_optimal(
    schedule: Schedule, steps: int, sigma_min: float | None = None, sigma_max: float | None = None
) -> np.ndarray:
    """Returns times whose arctan(sigma / alpha) are even (Align Your Steps: Sabour et al. 2024, arXiv 2404.14507).

    They minimize an upper bound on the KL divergence for Gaussian data of unit variance.

    Args:
      sigma_min, sigma_max: the lowest and the highest level, as for `karras`.
    """
    low, high = (math.atan(math.exp(-end / 2)) for end in sigma_ends(schedule, sigma_min, sigma_max)[::-1])
    return times_of(schedule, -2 * np.log(np.tan(np.linspace(high, low, steps))), "sigma_min")


def beta_sigmas(
    schedule: Schedule,
    steps: int,
    a: float = 0.6,
    b: float = 0.6,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    ends: GridSpec | None = None,
) -> np.ndarray:
    """Returns times whose sigma / alpha are the quantiles of Beta(a, b), scaled to [sigma_min, sigma_max].

    It is the form of Lee et al. 2024 (arXiv 2407.12173) that diffusers has as `use_beta_sigmas`; `beta` has the
    quantiles in t.

    Args:
      a, b: as for `beta`, in units of the noise level.
      sigma_min, sigma_max, ends: the lowest and the highest level, as for `karras`.
    """
    checks.positive(a=a, b=b)
    lowest, highest = _ends(schedule, steps, ends, sigma_min, sigma_max)
    low, high = math.exp(-highest / 2), math.exp(-lowest / 2)
    levels = low + betaincinv(a, b, np.linspace(1, 0, steps)) * (high - low)
    return times_of(schedule, -2 * np.log(levels), extreme(a, b))


def log_snr(schedule: Schedule, steps: int, lowest: float | None = None, highest: float | None = None) -> np.ndarray:
    """Returns times that are even in log(alpha^2 / sigma^2), then 0 (Lu et al. 2022, arXiv 2206.00927, section 3.3).

    Args:
      lowest: the log-SNR of the first time. The default is the schedule's at t = 1, or that of sigma / alpha = 80 where
        the schedule ends in pure noise.
      highest: the log-SNR of the last time before 0. The default is that of the schedule's `sigma_min`, or of
        sigma / alpha = 0.002.
    """
    return times_of(schedule, np.linspace(*log_snr_ends(schedule, lowest, highest), steps), "highest")


def align_your_steps(schedule: Schedule, steps: int, model: Literal["sd15", "sdxl", "svd"] = "sd15") -> np.ndarray:
    """Returns noise levels optimized for a published model (Align Your Steps, Sabour et al. 2024, arXiv 2404.14507).

    The levels are independent of the schedule. For other numbers of steps than 10 they are interpolated linearly in
    log sigma, as the authors do.

    Args:
      model: Stable Diffusion 1.5, Stable Diffusion XL or Stable Video Diffusion.
    """
    levels = np.array(_ALIGNED[model])
    start, _ = log_snr_range(schedule)
    top = np.exp(-start / 2)
    if top < 0.99 * levels[0]:
        raise InputError("model", f"must suit the schedule: {model} begins at sigma / alpha = {levels[0]:g}, above the "
                         f"schedule's {top:g} at t = 1; use another grid or a schedule with more noise")  # fmt: skip
    levels[0] = min(levels[0], top)  # the table is rounded, and Stable Diffusion's own schedule ends just below it
    positions = np.linspace(0, 1, steps + 1)[:-1]
    return times_of(schedule, -2 * np.interp(positions, np.linspace(0, 1, len(levels)), np.log(levels)), "model")


def _ends(
    schedule: Schedule, steps: int, ends: GridSpec | None, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """Returns the log-SNR of the first time and of the last one before t = 0."""
    if ends is None:
        return sigma_ends(schedule, sigma_min, sigma_max)
    if sigma_min is not None or sigma_max is not None:
        raise InputError("ends", "replaces sigma_min and sigma_max; remove them, or ends")
    times = falling(ends, schedule, steps, "ends")
    with jax.enable_x64(True):
        lowest, highest = np.asarray(schedule.log_snr(jnp.asarray(times[[0, -2]]))).tolist()
    if not math.isfinite(lowest):
        raise InputError("ends", "must not begin in pure noise, where sigma / alpha is infinite; use 'leading'")
    return lowest, highest
