"""What methods of editing consist of."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusion.core.types import Array, Denoised, Schedule
from diffusion.sampling.loop import AfterStep

# denoise(x [B, ...], t, **more) -> Denoised, with the conditions bound; see `sampling.loop.bind`.
Bound = Callable[..., Denoised]


class Known(NamedTuple):
    """What is known of the samples.

    Attributes:
      image: The image x0 `[B, ...]`, or what was measured of it.
      mask: `[B, ...]` in [0, 1], of size 1 or that of the image along each axis: 1 where the image is regenerated,
        0 where it is kept. None for methods without a mask.
    """

    image: Array
    mask: Array | None = None

    @property
    def is_drawn(self) -> Array:
        """Bool, where the image is regenerated: where the mask is at least one half."""
        return self.mask >= 0.5


class Hooks(NamedTuple):
    """What a method changes in `sampling.loop.sample`: the denoiser, and what follows each step, if anything."""

    denoise: Bound
    after_step: AfterStep | None = None


@dataclasses.dataclass(frozen=True)
class Editing:
    """A method.

    Attributes:
      hooks: `hooks(denoise, schedule, known, times [N + 1], keys [B]) -> Hooks`, traced. `keys` are those of
        `sampling.loop.prior`.
      keeps: Returns where a sample is the image itself; None for methods that do not promise it.
      times: Maps the falling times of a grid to those of the method, which may rise, on the host.
      needs_mask: Whether `Known.mask` must be given.
      measured: Maps the shape of an image to that of `Known.image`.
    """

    hooks: Callable[[Bound, Schedule, Known, Array, Array], Hooks]
    keeps: Callable[[Known], Array] | None = None
    times: Callable[[np.ndarray], np.ndarray] = lambda times: times
    needs_mask: bool = True
    measured: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape
