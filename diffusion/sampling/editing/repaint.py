"""RePaint: inpainting by replacement that goes back in time, so that the drawn part can follow the known one.

(Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1.)

After every `length` steps, noise is added again up to the time before them, and the steps are repeated, `resamples`
times in all. The known part has fresh noise in each step.
"""

import dataclasses

import numpy as np

from diffusion.core import checks
from diffusion.sampling.editing import replacement
from diffusion.sampling.editing.common import Editing


def make(length: int = 10, resamples: int = 10) -> Editing:
    """Builds the method.

    Args:
      length: The number of steps that are repeated (`jump_length` of the authors).
      resamples: How often, the first time included (`jump_n_sample`); 1 is replacement.
    """
    checks.at_least(1, length=length, resamples=resamples)

    def times(falling: np.ndarray) -> np.ndarray:
        steps, found = len(falling) - 1, [falling[0]]
        left = dict.fromkeys(range(0, steps - length, length), resamples - 1)  # jumps by the number of steps to go
        remaining = steps
        while remaining:
            remaining -= 1
            found.append(falling[steps - remaining])
            if left.get(remaining):
                left[remaining] -= 1
                remaining += length
                found.append(falling[steps - remaining])
        return np.asarray(found)

    return dataclasses.replace(replacement.make(noise="fresh"), times=times)
