"""Where a sampler evaluates, by name: `trailing(schedule, steps)` gives the times `[steps + 1]`, float64, falling from
t = 1 or near it to 0. The names are those of Lin et al. 2024 (arXiv 2305.08891, table 2)."""

import numpy as np

from diffusion.types import Schedule


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


def _table(schedule: Schedule, steps: int) -> int:
    """The length of the schedule's table, or 0 where there is none or it is too short for so many steps."""
    table = getattr(schedule, "num_steps", 0)
    return table if table >= steps else 0
