"""Where a sampler evaluates, by name: `trailing(schedule, steps)` gives the times `[steps + 1]`, float64, falling from
t = 1 or near it to 0, or to where `given` is told to end. The first three names are those of Lin et al. 2024 (arXiv
2305.08891, table 2)."""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaincinv

from diffusion.core.types import InputError, Schedule


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """Even steps from t = 1, rounded to the schedule's table if it has one and it is long enough."""
    times = np.linspace(1, 0, steps + 1)
    table = _table(schedule, steps)
    return np.round(times * table) / table if table else times


def leading(schedule: Schedule, steps: int) -> np.ndarray:
    """Every (T // steps)-th point of the table from its first on, which leaves out t = 1 (DDPM's and DDIM's own)."""
    table = _table(schedule, steps)
    if not table:
        return np.append(np.arange(steps, 0, -1) / (steps + 1), 0)
    return np.append((np.arange(steps)[::-1] * (table // steps) + 1) / table, 0)


def linspace(schedule: Schedule, steps: int) -> np.ndarray:
    """Even steps over the table from its last point to its first, both included, then 0."""
    table = _table(schedule, steps)
    if not table:
        return np.linspace(1, 0, steps + 1)
    return np.append((np.round(np.linspace(table - 1, 0, steps)) + 1) / table, 0)


def quadratic(schedule: Schedule, steps: int, power: float = 2.0) -> np.ndarray:
    """t = (i / steps)^power, DDIM's quadratic choice (Song et al. 2021, arXiv 2010.02502, appendix D.2) on [0, 1].

    Args:
      power: above 1 spends more steps near the data, below 1 near the noise.
    """
    _positive("power", power)
    return _falling(np.linspace(1, 0, steps + 1) ** power, "power")


def sigmoid(schedule: Schedule, steps: int, scale: float = 6.0) -> np.ndarray:
    """A logistic at even steps, rescaled to [0, 1]: densest at both ends, where it is flat, as `beta` by default is.

    Args:
      scale: how wide a piece of the logistic, centred on 0, is spread over [0, 1]; near 0 the steps are even.
    """
    _positive("scale", scale)
    even = np.linspace(1, -1, steps + 1)
    # As a hyperbolic tangent it is odd, so both ends are exact.
    return _falling((1 + np.tanh(scale / 4 * even) / np.tanh(scale / 4)) / 2, "scale")


def beta(schedule: Schedule, steps: int, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """The quantiles of Beta(a, b) at even probabilities (Lee et al. 2024, arXiv 2407.12173).

    Args:
      a, b: below 1, `a` makes the steps dense near the data and `b` near the noise; 1 and 1 are even steps.
    """
    _positive("a", a)
    _positive("b", b)
    extreme = "a" if abs(math.log(a)) >= abs(math.log(b)) else "b"
    return _falling(betaincinv(a, b, np.linspace(1, 0, steps + 1)), extreme)


def shifted(schedule: Schedule, steps: int, shift: float = 3.0) -> np.ndarray:
    """Even times u moved to t = shift u / (1 + (shift - 1) u) (Esser et al. 2024, arXiv 2403.03206, eq. 23).

    Args:
      shift: above 1 spends more steps near the noise. It comes on top of a shift that the schedule itself has.
    """
    _positive("shift", shift)
    even = np.linspace(1, 0, steps + 1)
    # The same denominator as a sum, which rounds to `shift` at u = 1, so that no t is above 1.
    return _falling(shift * even / (shift * even + (1 - even)), "shift")


def karras(
    schedule: Schedule,
    steps: int,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> np.ndarray:
    """Noise levels sigma / alpha even in their power 1 / rho (Karras et al. 2022, arXiv 2206.00364, eq. 5).

    Args:
      rho: larger spends more steps at low noise.
      sigma_min, sigma_max: the lowest and the highest level; the schedule's own where left out, or 0.002, and where
        the schedule ends in pure noise 80.
    """
    _positive("rho", rho)
    lowest, highest = _sigma_ends(schedule, sigma_min, sigma_max)
    # Logs of the levels, for their own powers overflow where rho is small and cancel where it is large. Where rho is
    # small the last one drowns in rounding, so it is put in.
    share, last = np.linspace(0, 1, steps), (lowest - highest) / 2 / rho
    with np.errstate(divide="ignore"):
        logs = np.where(share < 1, np.log1p(share * np.expm1(last)), last)
    return _at(schedule, lowest - 2 * rho * logs, "rho")


def exponential(
    schedule: Schedule, steps: int, sigma_min: float | None = None, sigma_max: float | None = None
) -> np.ndarray:
    """Noise levels sigma / alpha in a geometric row: `log_snr` in other units, and `karras` with rho to infinity.

    Args:
      sigma_min, sigma_max: the lowest and the highest level, as for `karras`.
    """
    return _at(schedule, np.linspace(*_sigma_ends(schedule, sigma_min, sigma_max), steps), "sigma_min")


def log_snr(schedule: Schedule, steps: int, lowest: float | None = None, highest: float | None = None) -> np.ndarray:
    """Points even in log(alpha^2 / sigma^2), then 0 (DPM-Solver, Lu et al. 2022, arXiv 2206.00927, section 3.3).

    Args:
      lowest: the first point's; if left out the schedule's at t = 1, or where that is pure noise sigma / alpha = 80's.
      highest: the last point's before t = 0; if left out that of the schedule's sigma_min, or of sigma / alpha = 0.002.
    """
    return _at(schedule, np.linspace(*_ends(schedule, lowest, highest), steps), "highest")


# Noise levels sigma / alpha of the published ten steps, the last of which goes to 0 and not to the last level.
_ALIGNED = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def align_your_steps(schedule: Schedule, steps: int, model: Literal["sd15", "sdxl", "svd"] = "sd15") -> np.ndarray:
    """Noise levels optimised for a published model (Align Your Steps, Sabour et al. 2024, arXiv 2404.14507), whatever
    schedule takes them; for other step counts than 10 interpolated linearly in log sigma, as its authors do.

    Args:
      model: Stable Diffusion 1.5, Stable Diffusion XL or Stable Video Diffusion.
    """
    levels = np.array(_ALIGNED[model])
    start, _ = _reach(schedule)
    top = np.exp(-start / 2)
    if top < 0.99 * levels[0]:
        raise InputError("model", f"{model}'s steps begin at sigma / alpha = {levels[0]:g}, above the schedule's "
                         f"{top:g} at t = 1; use another grid, or a schedule with more noise")  # fmt: skip
    levels[0] = min(levels[0], top)  # the table is rounded, and Stable Diffusion's own schedule ends just below it
    places = np.linspace(0, 1, steps + 1)[:-1]
    return _at(schedule, -2 * np.interp(places, np.linspace(0, 1, len(levels)), np.log(levels)), "model")


def given(schedule: Schedule, steps: int, times: tuple[float, ...]) -> np.ndarray:
    """Times by hand.

    Args:
      times: `steps + 1` of them, falling, within [0, 1]; if the last is not 0, sampling ends in noise of that time.
    """
    if len(times) != steps + 1:
        raise InputError("times", f"must be {steps + 1} numbers for {steps} steps, got {len(times)}")
    for time in times:
        if not 0 <= time <= 1:
            raise InputError("times", f"must be within [0, 1], got {time}")
    for time, following in itertools.pairwise(times):
        if not following < time:
            raise InputError("times", f"must fall from each to the next, got {time} and then {following}")
    return np.array(times, np.float64)


def _table(schedule: Schedule, steps: int) -> int:
    """The length of the schedule's table, or 0 where there is none or it is too short for so many steps."""
    table = getattr(schedule, "num_steps", 0)
    return table if table >= steps else 0


def _reach(schedule: Schedule) -> tuple[float, float]:
    """The schedule's log-SNR at t = 1 and at t = 0."""
    with jax.enable_x64(True):
        return tuple(np.asarray(schedule.log_snr(jnp.asarray([1.0, 0.0]))).tolist())


def _ends(
    schedule: Schedule,
    lowest: float | None,
    highest: float | None,
    fields: tuple[str, str] = ("lowest", "highest"),
    show: Callable[[float], float] = float,
) -> tuple[float, float]:
    """The log-SNR that a grid begins with and the one it has last before t = 0, filled in and checked.

    Args:
      lowest, highest: None for the defaults, which `karras` tells.
      fields, show: what the two are called in messages, and a log-SNR in the unit of the messages.
    """
    start, end = _reach(schedule)
    for field, value in zip(fields, (lowest, highest), strict=True):
        if value is not None and not math.isfinite(value):
            raise InputError(field, f"must be finite, got {show(value):g}")
    if lowest is None:
        lowest = start if math.isfinite(start) else -2 * math.log(80)
    if highest is None:
        highest = -2 * math.log(getattr(schedule, "sigma_min", 0.002))
    if lowest < start - 1e-6:  # what it loses by rounding does not count
        raise InputError(fields[0], f"must be no noisier than the schedule at t = 1, {show(start):g}; "
                         f"got {show(lowest):g}")  # fmt: skip
    if highest >= end:
        raise InputError(fields[1], f"must be noisier than the schedule at t = 0, {show(end):g}; got {show(highest):g}")
    if highest <= lowest:
        raise InputError(fields[1], f"must be less noisy than {fields[0]} = {show(lowest):g}, got {show(highest):g}")
    return lowest, highest


def _sigma_ends(schedule: Schedule, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """`_ends` for two levels sigma / alpha."""
    for field, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if value is not None:
            _positive(field, value)
    lowest, highest = (None if level is None else -2 * math.log(level) for level in (sigma_max, sigma_min))
    return _ends(schedule, lowest, highest, ("sigma_max", "sigma_min"), lambda log_snr: math.exp(-log_snr / 2))


def _at(schedule: Schedule, log_snr: np.ndarray, field: str) -> np.ndarray:
    """The times of log-SNRs `[steps]`, none above 1, and 0 after them."""
    with jax.enable_x64(True):
        times = np.asarray(schedule.time(jnp.asarray(log_snr)))
    return _falling(np.append(np.minimum(times, 1), 0), field)


def _falling(times: np.ndarray, field: str) -> np.ndarray:
    """The times, if a value of the keyword `field` is not so extreme that in float64 some of them are equal."""
    falls = np.diff(times) < 0
    if not np.all(falls):
        raise InputError(field, f"puts two of {len(falls)} steps at the same time, {times[np.argmin(falls)]:g}; "
                         "take a milder value or fewer steps")  # fmt: skip
    return times


def _positive(field: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InputError(field, f"must be a positive number, got {value}")
