"""Time grids by name: `trailing(schedule, steps)` returns the times at which a sampler evaluates the denoiser.

Every grid returns float64 times that decrease from t = 1, or near it, to 0, `[steps + 1]`; only `given` and
`to_sigma_min` end elsewhere. `repaint` and `restart` repeat parts of another grid: their times, more than `steps + 1`,
also rise, where noise is added. A grid whose times may rise has the attribute `may_rise`.

The first three names are those of Lin et al. 2024 (arXiv 2305.08891, table 2). Index i of a table of T steps
is at t = (i + 1) / T.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaincinv

from diffusion.core import checks
from diffusion.core.build import build
from diffusion.core.types import InputError, Schedule
from diffusion.sampling.noise_levels import decreasing, log_snr_ends, log_snr_range, sigma_ends, times_of

GridSpec = Annotated[str | Mapping[str, Any] | Callable[..., np.ndarray], "grids", ("schedule", "steps")]


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """Returns even steps from t = 1, rounded to the schedule's table if it has one of at least `steps` points."""
    times = np.linspace(1, 0, steps + 1)
    table = _table_length(schedule, steps)
    return np.round(times * table) / table if table else times


def leading(schedule: Schedule, steps: int, offset: int = 0, endpoint: bool = True) -> np.ndarray:
    """Returns every (T // steps)-th point of the table from the first, without t = 1 (the grid of DDPM and DDIM).

    Args:
      offset: what is added to the indices of the table, such as 1 for Stable Diffusion; it requires a table.
      endpoint: whether the first point of the table is among the times. If not, it is left out of `steps` + 1 times, as
        in diffusers' multistep solvers.
    """
    points = steps + (not endpoint)
    table = _table_length(schedule, points)
    if not table:
        if offset:
            raise InputError("offset", f"requires a schedule with a table of at least {points} points; use 0")
        return np.append(np.arange(points, points - steps, -1) / (points + 1), 0)
    indices = np.arange(points)[::-1][:steps] * (table // points) + offset
    if offset < 0 or indices[0] >= table:
        raise InputError("offset", f"must be at least 0 and leave the indices below {table}, got {offset}")
    return np.append((indices + 1) / table, 0)


def linspace(schedule: Schedule, steps: int, rounded: bool = True, endpoint: bool = True) -> np.ndarray:
    """Returns even steps over the table from its last point to its first, then 0.

    Args:
      rounded: whether the times are rounded to points of the table.
      endpoint: whether the first point of the table is among the times. If not, it is left out of `steps` + 1 times, as
        in diffusers' multistep solvers.
    """
    table = _table_length(schedule, steps)
    if not table:
        return np.linspace(1, 0, steps + 1)
    indices = np.linspace(table - 1, 0, steps, endpoint=endpoint)
    return np.append(((np.round(indices) if rounded else indices) + 1) / table, 0)


def lattice(schedule: Schedule, steps: int, points: int = 50) -> np.ndarray:
    """Returns times of the lattice on which latent consistency models are trained, t = i / points (Luo et al. 2023,
    arXiv 2310.04378, section 4.3), at even distances from t = 1, then 0.

    Args:
      points: the number of points of the lattice, at least `steps`. They are points of the schedule's table, if it has
        one: every (T // points)-th.
    """
    table = _table_length(schedule, points) or points
    if steps > points:
        raise InputError("points", f"must be at least the number of steps, {steps}, got {points}")
    indices = np.arange(points, 0, -1)[np.floor(np.linspace(0, points, steps, endpoint=False)).astype(int)]
    return np.append(indices * (table // points) / table, 0)


def simple(schedule: Schedule, steps: int) -> np.ndarray:
    """Returns even steps from t = 1, rounded up to the schedule's table: `simple` of ComfyUI."""
    table = _table_length(schedule, steps)
    if not table:
        return np.linspace(1, 0, steps + 1)
    return np.append((table - np.arange(steps) * table // steps) / table, 0)


def sgm_uniform(schedule: Schedule, steps: int) -> np.ndarray:
    """Returns even steps over the table from its last point to its first, without the first, then 0.

    They may lie between points of the table, as in Stability AI's generative models.
    """
    table = _table_length(schedule, steps)
    if not table:
        return np.linspace(1, 0, steps + 1)
    return np.append((np.linspace(table - 1, 0, steps + 1)[:-1] + 1) / table, 0)


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
    return decreasing(betaincinv(a, b, np.linspace(1, 0, steps + 1)), _extreme(a, b))


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
    return times_of(schedule, -2 * np.log(levels), _extreme(a, b))


def log_snr(schedule: Schedule, steps: int, lowest: float | None = None, highest: float | None = None) -> np.ndarray:
    """Returns times that are even in log(alpha^2 / sigma^2), then 0 (Lu et al. 2022, arXiv 2206.00927, section 3.3).

    Args:
      lowest: the log-SNR of the first time. The default is the schedule's at t = 1, or that of sigma / alpha = 80 where
        the schedule ends in pure noise.
      highest: the log-SNR of the last time before 0. The default is that of the schedule's `sigma_min`, or of
        sigma / alpha = 0.002.
    """
    return times_of(schedule, np.linspace(*log_snr_ends(schedule, lowest, highest), steps), "highest")


# sigma / alpha of the published ten steps. The last step goes to 0 instead of the last level.
_ALIGNED = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


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
    times = _falling(grid, schedule, steps)
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
    return _falling(grid, schedule, steps)[indices]


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
    times = _falling(grid, schedule, steps)
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
_MOST_TIMES = 10**6  # limit for repeated times: a larger number is a typing error


def _falling(grid: GridSpec, schedule: Schedule, steps: int, field: str = "grid") -> np.ndarray:
    """Returns the times of a grid that another one uses; raises InputError if they rise."""
    times = np.asarray(build("grids", grid, field=field, schedule=schedule, steps=steps), np.float64)
    if not (np.diff(times) < 0).all():
        raise InputError(field, "must have falling times; use another grid")
    return times


def _ends(
    schedule: Schedule, steps: int, ends: GridSpec | None, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """Returns the log-SNR of the first time and of the last one before t = 0."""
    if ends is None:
        return sigma_ends(schedule, sigma_min, sigma_max)
    if sigma_min is not None or sigma_max is not None:
        raise InputError("ends", "replaces sigma_min and sigma_max; remove them, or ends")
    times = _falling(ends, schedule, steps, "ends")
    with jax.enable_x64(True):
        lowest, highest = np.asarray(schedule.log_snr(jnp.asarray(times[[0, -2]]))).tolist()
    if not math.isfinite(lowest):
        raise InputError("ends", "must not begin in pure noise, where sigma / alpha is infinite; use 'leading'")
    return lowest, highest


def _table_length(schedule: Schedule, steps: int) -> int:
    """Returns the length of the schedule's table, or 0 if it has none or one with fewer points than steps."""
    table = getattr(schedule, "num_steps", 0)
    return table if table >= steps else 0


def _extreme(a: float, b: float) -> str:
    """Returns which parameter of a beta distribution is further from 1, for error messages."""
    return "a" if abs(math.log(a)) >= abs(math.log(b)) else "b"
