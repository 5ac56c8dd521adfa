"""The Laplace schedule, which spends most of its time near one log-SNR (Hang et al. 2024, arXiv 2407.03297)."""

import numpy as np

from diffusion.core import checks
from diffusion.process.schedules.table import VP


def make(mean: float = 0.0, scale: float = 0.5, num_steps: int = 1000) -> VP:
    """Builds the variance preserving schedule whose log-SNR has a Laplace distribution for uniform t:

        log SNR = mean - scale sign(1/2 - t) log(1 - 2 |t - 1/2|)

    Both ends are infinite, and so are the derivatives of sigma and alpha there. The path therefore goes through a table
    of this function, which has finite derivatives and ends in zero SNR.

    Args:
      mean: The log-SNR at t = 1/2.
      scale: The scale b of the distribution, positive; its standard deviation is sqrt(2) b.
      num_steps: The length of the table.
    """
    checks.positive(scale=scale)
    checks.at_least(2, num_steps=num_steps)
    checks.at_most(10**6, num_steps, "num_steps")
    t = np.arange(1, num_steps + 1) / num_steps
    with np.errstate(divide="ignore"):
        tail = np.log(2 * np.minimum(t, 1 - t))
    return VP(mean - scale * np.sign(0.5 - t) * np.where(t == 0.5, 0, tail))
