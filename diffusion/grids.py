"""Where a sampler evaluates, by name: `trailing(schedule, steps)` gives the times `[steps + 1]`, float64, falling from
t = 1 or near it to 0. The first three names are those of Lin et al. 2024 (arXiv 2305.08891, table 2)."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.types import InputError, Schedule


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
    with jax.enable_x64(True):
        top = float(jnp.exp(-schedule.log_snr(jnp.float64(1)) / 2))
        high = sigma_max or (top if np.isfinite(top) else 80.0)
        low = sigma_min or getattr(schedule, "sigma_min", 0.002)
        if not 0 < low < high:
            raise InputError("sigma_min", f"must be above 0 and below sigma_max = {high:g}, got {low:g}")
        if high > top * (1 + 1e-9):
            raise InputError("sigma_max", f"must be at most {top:g}, the schedule's at t = 1, got {high:g}")
        if rho <= 0:
            raise InputError("rho", f"must be positive, got {rho}")
        levels = np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho
        times = np.array(schedule.time(jnp.asarray(-2 * np.log(levels))))
        return np.append(np.minimum(times, 1), 0)


def _table(schedule: Schedule, steps: int) -> int:
    """The length of the schedule's table, or 0 where there is none or it is too short for so many steps."""
    table = getattr(schedule, "num_steps", 0)
    return table if table >= steps else 0
