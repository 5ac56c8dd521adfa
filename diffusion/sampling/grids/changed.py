"""Explicit times, and grids that change those of another grid; see `diffusion.sampling.grids`."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.types import InputError, Schedule
from diffusion.sampling.grids.common import GridSpec, falling, log_snr_range, sigma_ends, times_of
from diffusion.sampling.grids.noise_levels import karras

_MOST_TIMES = 10**6  # limit for repeated times: a larger number is a typing error


def given(schedule: Schedule, steps: int, times: tuple[float, ...]) -> np.ndarray:
    """Returns the given times.

    Args:
      times: `steps + 1` decreasing numbers in [0, 1]. If the last one is not 0, samples contain the noise of that time.
    """
    if len(times) != steps + 1:
        raise InputError("times", f"must be {steps + 1} numbers for {steps} steps, got {len(times)}")
    for time in times:
        if not 0 <= time <= 1:
            raise InputError("times", f"must be in [0, 1], got {time}")
    for time, following in itertools.pairwise(times):
        if not following < time:
            raise InputError("times", f"must be strictly decreasing, got {time} followed by {following}")
    return np.array(times, np.float64)


def to_sigma_min(
    schedule: Schedule, steps: int, sigma_min: float | None = None, grid: GridSpec = "trailing"
) -> np.ndarray:
    """Returns the times of another grid, whose last step ends at sigma_min instead of at t = 0.

    Samples then contain the noise of this level, as with `final_sigmas_type="sigma_min"` in diffusers. If the last step
    begins there, as with `linspace` on a table, it has length 0.

    Args:
      sigma_min: the level sigma / alpha of the end. The default is the schedule's own, the first point of its table, or
        0.002.
      grid: the other grid.
    """
    times = falling(grid, schedule, steps)
    if sigma_min is None and hasattr(schedule, "num_steps"):
        end = 1 / schedule.num_steps
    else:
        _, highest = sigma_ends(schedule, sigma_min, None)
        end = times_of(schedule, np.array([highest]), "sigma_min")[0]
    if times[-2] < end * (1 - 1e-9):
        raise InputError("sigma_min", f"must be at or below the time at which the last of {steps} steps begins, "
                         f"t = {times[-2]:g}, but it is at t = {end:g}")  # fmt: skip
    return np.append(times[:-1], min(end, times[-2]))


to_sigma_min.to_data = False  # whether a grid ends at t = 0


def repaint(
    schedule: Schedule,
    steps: int,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    grid: GridSpec = "trailing",
) -> np.ndarray:
    """Returns the times of another grid with RePaint's resampling (Lugmayr et al. 2022, arXiv 2201.09865, section 4.2).

    Whenever 1, 1 + jump_length, 1 + 2 jump_length, ... steps remain, the noise of the last `jump_length` steps is added
    and these steps are repeated. With jump_length = 1 this is algorithm 1, in which jump_n_sample is U.

    Args:
      jump_length: j, the number of steps that are repeated at once.
      jump_n_sample: r, how often they are done; 1 gives the times of the grid itself.
      grid: the repeated grid.
    """
    checks.at_least(1, jump_length=jump_length, jump_n_sample=jump_n_sample)
    checks.at_most(_MOST_TIMES, steps * jump_n_sample, "jump_n_sample")
    indices = [0]
    for index in range(1, steps + 1):
        indices.append(index)
        remaining = steps - index
        if remaining > 0 and remaining % jump_length == 1 % jump_length and index >= jump_length:
            indices += [*range(index - jump_length, index + 1)] * (jump_n_sample - 1)
    return falling(grid, schedule, steps)[indices]


def restart(
    schedule: Schedule,
    steps: int,
    intervals: tuple[tuple[float, ...], ...] = ((3, 2, 0.06, 0.3),),
    rho: float = 7.0,
    grid: GridSpec = "karras",
) -> np.ndarray:
    """Returns the times of another grid with those of Restart (Xu et al. 2023, arXiv 2306.14878, algorithm 1).

    At each interval's t_min the noise between t_min and t_max is added and the interval is solved again, K times.

    Args:
      intervals: (N_restart, K, t_min, t_max) each: the number of times in the interval, both ends included; the number
        of restarts; and the ends, in units of sigma / alpha. t_min is rounded to a time of the grid. The default is a
        setting of the authors for CIFAR-10 with 18 steps.
      rho: places the times in an interval, as in `karras`.
      grid: the grid of the main process.
    """
    times = falling(grid, schedule, steps)
    with jax.enable_x64(True):
        levels = np.exp(-np.asarray(schedule.log_snr(jnp.asarray(times[1:-1]))) / 2)
    if not len(levels):
        raise InputError("intervals", f"require at least 2 steps, got {steps}")
    top, restarts = math.exp(-log_snr_range(schedule)[0] / 2), {}
    for interval in intervals:
        if len(interval) != 4 or any(number != int(number) for number in interval[:2]):
            raise InputError("intervals", "must be tuples (N_restart, K, t_min, t_max), of which the first two are "
                             f"whole numbers; got {interval}")  # fmt: skip
        n_restart, k, t_min, t_max = int(interval[0]), int(interval[1]), *interval[2:]
        if n_restart < 2 or k < 1 or not 0 < t_min < t_max <= top:
            raise InputError("intervals", "must have N_restart >= 2, K >= 1 and 0 < t_min < t_max, at most the "
                             f"schedule's sigma / alpha at t = 1, {top:g}; got {interval}")  # fmt: skip
        checks.at_most(_MOST_TIMES, n_restart * k, "intervals")
        nearest = int(np.argmin(np.abs(levels - t_min)))
        low = float(levels[nearest])
        if nearest in restarts or not low < t_max:
            raise InputError("intervals", f"t_min = {t_min:g} is rounded to the grid's {low:g}, which must be below "
                             "t_max and belong to one interval only; use more steps or other intervals")  # fmt: skip
        inner = karras(schedule, n_restart, rho, sigma_min=low, sigma_max=t_max)[:-2]
        restarts[nearest] = np.tile([*inner, times[nearest + 1]], k)
    return np.concatenate([times[:1], *([time, *restarts.get(index, ())] for index, time in enumerate(times[1:]))])


repaint.may_rise = restart.may_rise = True
