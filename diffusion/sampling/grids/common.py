"""What the grids share: another grid as an option, a schedule's noise levels, and the times of levels.

A level is given as sigma / alpha, or as the log-SNR, log(alpha^2 / sigma^2).
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.build import build
from diffusion.core.types import InputError, Schedule

GridSpec = Annotated[str | Mapping[str, Any] | Callable[..., np.ndarray], "grids", ("schedule", "steps")]


def falling(grid: GridSpec, schedule: Schedule, steps: int, field: str = "grid") -> np.ndarray:
    """Returns the times of a grid that another one uses; raises InputError if they rise."""
    times = np.asarray(build("grids", grid, field=field, schedule=schedule, steps=steps), np.float64)
    if not (np.diff(times) < 0).all():
        raise InputError(field, "must have falling times; use another grid")
    return times


def log_snr_range(schedule: Schedule) -> tuple[float, float]:
    """Returns the schedule's log-SNR at t = 1 and at t = 0."""
    with jax.enable_x64(True):
        return tuple(np.asarray(schedule.log_snr(jnp.asarray([1.0, 0.0]))).tolist())


def log_snr_ends(
    schedule: Schedule,
    lowest: float | None,
    highest: float | None,
    fields: tuple[str, str] = ("lowest", "highest"),
    show: Callable[[float], float] = float,
) -> tuple[float, float]:
    """Returns the log-SNR of a grid's first time and of the last one before t = 0, with defaults, checked.

    Args:
      lowest, highest: None for the defaults, which `karras` describes.
      fields, show: the names of the two in error messages, and a function from log-SNR to the unit of the messages.
    """
    start, end = log_snr_range(schedule)
    for field, value in zip(fields, (lowest, highest), strict=True):
        if value is not None and not math.isfinite(value):
            raise InputError(field, f"must be finite, got {show(value):g}")
    if lowest is None:
        lowest = start if math.isfinite(start) else -2 * math.log(80)
    if highest is None:
        highest = -2 * math.log(getattr(schedule, "sigma_min", 0.002))
    if lowest < start - 1e-6:  # with a tolerance for rounding errors
        raise InputError(fields[0], f"must be no noisier than the schedule at t = 1, {show(start):g}; "
                         f"got {show(lowest):g}")  # fmt: skip
    if highest >= end:
        raise InputError(fields[1], f"must be noisier than the schedule at t = 0, {show(end):g}; got {show(highest):g}")
    if highest <= lowest:
        raise InputError(fields[1], f"must be less noisy than {fields[0]} = {show(lowest):g}, got {show(highest):g}")
    return lowest, highest


def sigma_ends(schedule: Schedule, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """Returns `log_snr_ends` for two levels sigma / alpha."""
    checks.positive(sigma_min=sigma_min, sigma_max=sigma_max)
    lowest, highest = (None if level is None else -2 * math.log(level) for level in (sigma_max, sigma_min))
    return log_snr_ends(schedule, lowest, highest, ("sigma_max", "sigma_min"), lambda log_snr: math.exp(-log_snr / 2))


def times_of(schedule: Schedule, log_snr: np.ndarray, field: str) -> np.ndarray:
    """Returns the times of log-SNRs `[steps]`, at most 1, followed by 0."""
    with jax.enable_x64(True):
        times = np.asarray(schedule.time(jnp.asarray(log_snr)))
    return decreasing(np.append(np.minimum(times, 1), 0), field)


def decreasing(times: np.ndarray, field: str) -> np.ndarray:
    """Returns the times; raises InputError, naming the keyword `field`, if they do not decrease in float64."""
    steps = np.diff(times) < 0
    if not np.all(steps):
        raise InputError(field, f"must be less extreme, or the steps fewer: two of {len(steps)} steps are at the same "
                         f"time, {times[np.argmin(steps)]:g}")  # fmt: skip
    return times


def extreme(a: float, b: float) -> str:
    """Returns which parameter of a beta distribution is further from 1, for error messages."""
    return "a" if abs(math.log(a)) >= abs(math.log(b)) else "b"
