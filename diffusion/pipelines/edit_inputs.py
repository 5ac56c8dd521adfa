"""Checks the images and masks that `Run.edit` is given."""

from typing import Any

import numpy as np

from diffusion.core.types import InputError
from diffusion.sampling.editing.common import Editing, Known


def images(x: Any, shape: tuple[int, ...], num: int | None) -> np.ndarray:
    """Returns images `[num, *shape]`, float32, repeated in turn. Raises InputError for another shape or dtype.

    Args:
      x: `[n, *shape]`, or one image without the first axis.
      shape: The shape of one image.
      num: Number of images; that of `x` if None.
    """
    x = np.asarray(x)
    if x.shape == shape:
        x = x[None]
    if x.shape[1:] != shape or x.dtype.kind != "f" or not len(x):
        expected = f"floats [n, {', '.join(map(str, shape))}] in [-1, 1]"
        raise InputError("image", f"must be {expected}, as uint8 / 127.5 - 1; got {x.dtype}{[*x.shape]}")
    return np.take(x.astype(np.float32), np.arange(num or len(x)), axis=0, mode="wrap")


def known(image: np.ndarray, mask: Any, method: Editing) -> Known:
    """Returns what is known of the samples. Raises InputError if the mask does not fit the images or the method.

    Args:
      image: As `images` returns them, `[num, H, W, C]`.
      mask: `[n, H, W]` or `[H, W]` in [0, 1], or None.
      method: The method.
    """
    if not method.needs_mask:
        if mask is not None:
            raise InputError("mask", "is not for this method; leave it out")
        return Known(image)
    if mask is None:
        raise InputError("mask", "is missing; give 1 where the image is regenerated, and 0 where it is kept")
    mask, sides = np.asarray(mask, np.float32), image.shape[1:-1]
    mask = mask[None] if mask.shape == sides else mask
    if mask.shape[1:] != sides or not len(mask):
        size = ", ".join(map(str, sides))
        raise InputError("mask", f"must be [{size}] or [n, {size}], the sides of the images, got {[*mask.shape]}")
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise InputError("mask", f"must be in [0, 1], got {mask.min():g} to {mask.max():g}")
    found = Known(image, np.take(mask, np.arange(len(image)), axis=0, mode="wrap")[..., None])
    if np.all(~found.is_drawn if method.keeps is None else method.keeps(found)):
        raise InputError("mask", "regenerates nothing; set it to 1 where the image is regenerated")
    if mask.min() >= 1:
        raise InputError("mask", "keeps nothing; set it to 0 where the image is kept, or draw samples without an image")
    return found
