"""What the training of an autoencoder has in place of samples: previews of reconstructions, and a model folder."""

import logging
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from diffusion.core import images
from diffusion.core.types import InputError, Objective, Params, Source
from diffusion.distributed import sharding
from diffusion.evaluation.reference import first_of
from diffusion.pipelines.model import Model

PREVIEW_ROWS, PREVIEW_COLUMNS = 4, 10

logger = logging.getLogger(__name__)


def check(objective: Objective, steps: int) -> None:
    """Raises InputError if a run of `steps` steps ends before its critic starts."""
    start = getattr(objective, "disc_start", 0)
    if objective.players is not None and start >= steps:
        raise InputError("objective.disc_start", f"must be below train.steps = {steps:,}, got {start:,}; or set "
                         "objective.disc_weight to 0")  # fmt: skip


def preview(model: Model, mesh: Mesh, source: Source) -> Callable[[Params], Image.Image]:
    """Returns the function that draws a grid for parameters: rows of the first examples, each above the row of their
    reconstructions from the most probable latents."""
    reconstruct = jax.jit(
        lambda params, x: model.objective.reconstruct(model.network.apply, params, x),
        out_shardings=sharding.replicated(mesh),
    )

    def draw(params: Params) -> Image.Image:
        x, _ = first_of(source, PREVIEW_ROWS * PREVIEW_COLUMNS)
        y = np.asarray(reconstruct(params, x))
        bad = int((~np.isfinite(y)).any(axis=(1, 2, 3)).sum())
        if bad:
            logger.warning("%d of the %d reconstructions of the preview are not finite", bad, len(y))
        rows = [part[start : start + PREVIEW_COLUMNS] for start in range(0, len(x), PREVIEW_COLUMNS) for part in (x, y)]
        return images.picture(np.concatenate(rows), min(PREVIEW_COLUMNS, len(x)))

    return draw
