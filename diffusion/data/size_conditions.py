"""Conditions on the size of images: SDXL's `time_ids` (Podell et al. 2023, arXiv 2307.01952, section 2.2), and
`resolution` and `aspect_ratio` of PixArt-alpha (Chen et al. 2023, arXiv 2310.00426).

They are facts of the file that an example was made from, in pixels, height before width. Samples are drawn as if they
were whole images of their size.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from diffusion.core.types import NULL, ConditionSpec

TIME_IDS, RESOLUTION, ASPECT_RATIO = "time_ids", "resolution", "aspect_ratio"
SCORE, NEGATIVE_SCORE = 6.0, 2.5  # aesthetic scores that SDXL's refiner is sampled with
_BASE, _REFINER = ConditionSpec("vector", (6,)), ConditionSpec("vector", (5,))
_OTHERS = {RESOLUTION: ConditionSpec("vector", (2,)), ASPECT_RATIO: ConditionSpec("scalar")}

Pair = tuple[int, int]
Kind = Literal["sdxl", "pixart"]
SPECS: Mapping[Kind, Mapping[str, ConditionSpec]] = {"sdxl": {TIME_IDS: _BASE}, "pixart": _OTHERS}  # of training data


def time_ids(original: Pair, crop: Pair, target: Pair) -> np.ndarray:
    """Returns SDXL's condition, float32 `[6]`.

    Args:
      original: Height and width of the image before it was resized.
      crop: How many pixels of the resized image were cut off at the top and on the left.
      target: Height and width of the result.
    """
    return np.float32([*original, *crop, *target])


def refiner_time_ids(original: Pair, crop: Pair, score: float = SCORE) -> np.ndarray:
    """Returns the condition of SDXL's refiner, float32 `[5]`, which ends in an aesthetic score from 0 to 10."""
    return np.float32([*original, *crop, score])


def of_example(kind: Kind, original: Pair, crop: Pair, target: Pair) -> dict[str, Any]:
    """Returns the conditions of an example for training by name, as `SPECS` describes them.

    Args:
      kind: The model whose conditions they are.
      original, crop, target: As for `time_ids`.
    """
    if kind == "sdxl":
        return {TIME_IDS: time_ids(original, crop, target)}
    return {RESOLUTION: np.float32(original), ASPECT_RATIO: np.float32(target[0] / target[1])}


def of_samples(
    conditions: Mapping[str, ConditionSpec], size: Pair, original: Pair | None = None, crop: Pair = (0, 0)
) -> dict[str, Any]:
    """Returns those of `conditions` that are about the size of images, for samples of a size, `[1, ...]` each.

    Args:
      conditions: The conditions of a model. One of another kind or shape than those above is left out.
      size: Height and width of the samples.
      original: The size of the image that they are to look like parts of; by default their own.
      crop: As for `time_ids`.

    Returns:
      The values by name. For the refiner, `null` holds those of the unconditional half of guidance, with
      `NEGATIVE_SCORE`; the other conditions are the same in both halves.
    """
    original, found = original or size, {}
    if conditions.get(TIME_IDS) == _BASE:
        found[TIME_IDS] = time_ids(original, crop, size)[None]
    elif conditions.get(TIME_IDS) == _REFINER:
        found[TIME_IDS] = refiner_time_ids(original, crop)[None]
        found[NULL] = {TIME_IDS: refiner_time_ids(original, crop, NEGATIVE_SCORE)[None]}
    values = {RESOLUTION: np.float32([original]), ASPECT_RATIO: np.float32([original[0] / original[1]])}
    return found | {name: value for name, value in values.items() if conditions.get(name) == _OTHERS[name]}
