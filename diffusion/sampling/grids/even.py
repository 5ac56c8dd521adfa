"""Grids with even steps in t, on the points of the schedule's table if it has one; see `diffusion.sampling.grids`.

Index i of a table of T steps is at t = (i + 1) / T.
"""

import numpy as np

from diffusion.core.types import InputError, Schedule


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """Returns even steps from t = 1, rounded to the schedule's table if it has one of at least `steps` points."""
    times = np.linspace(1, 0, steps + 1)
    table = _table_length(schedule, steps)
    return np.round(times * table) / table if table else times


def leading(schedule: Schedule, steps: int, steps_offset: int = 0, endpoint: bool = True) -> np.ndarray:
    """Returns every (T // steps)-th point of the table from the first, without t = 1 (the grid of DDPM and DDIM).

    Args:
      steps_offset: what is added to the indices of the table, such as 1 for Stable Diffusion; it requires a table.
      endpoint: whether the first point of the table is among the times. If not, it is left out of `steps` + 1 times, as
        in diffusers' multistep solvers.
    """
    points = steps + (not endpoint)
    table = _table_length(schedule, points)
    if not table:
        if steps_offset:
            raise InputError("steps_offset", f"requires a schedule with a table of at least {points} points; use 0")
        return np.append(np.arange(points, points - steps, -1) / (points + 1), 0)
    indices = np.arange(points)[::-1][:steps] * (table // points) + steps_offset
    if steps_offset < 0 or indices[0] >= table:
        raise InputError("steps_offset", f"must be at least 0 and leave the indices below {table}, got {steps_offset}")
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


def _table_length(schedule: Schedule, steps: int) -> int:
    """Returns the length of the schedule's table, or 0 if it has none or one with fewer points than steps."""
    table = getattr(schedule, "num_steps", 0)
    return table if table >= steps else 0
