"""What methods of editing consist of."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusion.core.types import Array, Cond, Denoised, Denoiser, Schedule
from diffusion.sampling import loop
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


class Sampling(NamedTuple):
    """What a method receives of the sampling that it changes, traced.

    Attributes:
      denoiser: The model, with guidance.
      schedule: The schedule of the model.
      cond: The conditions of the samples.
      known: What is known of the samples, in the space of the model.
      times: `[N + 1]`.
      keys: `[B]`, those of `loop.prior`.
    """

    denoiser: Denoiser
    schedule: Schedule
    cond: Cond
    known: Known
    times: Array
    keys: Array

    @property
    def denoise(self) -> Bound:
        """The model with the conditions of the samples."""
        return loop.bind(self.denoiser, self.cond)


class Hooks(NamedTuple):
    """What a method changes in `loop.sample`: the denoiser, and what follows each step, if anything."""

    denoise: Bound
    after_step: AfterStep | None = None


@dataclasses.dataclass(frozen=True)
class Editing:
    """A method.

    Attributes:
      hooks: Returns what changes in a sampling; traced.
      keeps: Returns where a sample is the image itself; None for methods that do not promise it.
      times: Maps the falling times of a grid to those of the method, which may rise, on the host.
      needs_mask: Whether `Known.mask` must be given.
      measured: Maps the shape of an image to that of `Known.image`.
    """

    hooks: Callable[[Sampling], Hooks]
    keeps: Callable[[Known], Array] | None = None
    times: Callable[[np.ndarray], np.ndarray] = lambda times: times
    needs_mask: bool = True
    measured: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape
