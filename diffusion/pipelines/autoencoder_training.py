"""What the training of an autoencoder has in place of samples: previews of reconstructions, and a model folder."""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from diffusion.core import images
from diffusion.core.arrays import scaled
from diffusion.core.trees import matcher
from diffusion.core.types import InputError, Params, Source
from diffusion.distributed import sharding
from diffusion.encoders import autoencoder_folder
from diffusion.encoders.autoencoder_folder import Scale, Stored
from diffusion.pipelines.conditions import MEASURED
from diffusion.pipelines.model import Model
from diffusion.pipelines.run import Run
from diffusion.training.options import Options

PREVIEW_ROWS, PREVIEW_COLUMNS = 4, 10
CODEBOOK = "net/quantize/embedding/embedding"
BATCH_SIZE = 16  # of images that are encoded at once

logger = logging.getLogger(__name__)


def check(model: Model, options: Options) -> None:
    """Raises InputError if a run ends before its critic starts, or would train on latents or change fixed codes."""
    if model.autoencoder is not None:
        problem = "must be None for the objective autoencoder, which trains on images; data must be images, not latents"
        raise InputError("autoencoder", problem)
    start = getattr(model.objective, "disc_start", 0)
    if getattr(model.objective, "players", None) is not None and start >= options.steps:
        raise InputError("objective.disc_start", f"must be below train.steps = {options.steps:,}, got {start:,}; or "
                         "set objective.disc_weight to 0")  # fmt: skip
    trained = options.trainable is None or matcher(options.trainable, "train.trainable")(CODEBOOK)
    if getattr(model.objective, "codebook", None) is not None and not trained:
        problem = f"must include {CODEBOOK}, or set objective.codebook to gradient and objective.restart_threshold to 0"
        raise InputError("train.trainable", problem)


def preview(model: Model, mesh: Mesh, source: Source) -> Callable[[Params], Image.Image]:
    """Returns the function that draws a grid for parameters: rows of the first examples, each above the row of their
    reconstructions from the most probable latents. Those of another size than the first are left out."""
    reconstruct = jax.jit(
        lambda params, x: model.objective.reconstruct(model.network.apply, params, x),
        out_shardings=sharding.replicated(mesh),
    )

    def draw(params: Params) -> Image.Image:
        found = [scaled(source[index]["x"]) for index in range(min(PREVIEW_ROWS * PREVIEW_COLUMNS, len(source)))]
        x = np.stack([image for image in found if image.shape == found[0].shape]).astype(np.float32)
        y = np.asarray(reconstruct(params, x))
        bad = int((~np.isfinite(y)).any(axis=(1, 2, 3)).sum())
        if bad:
            logger.warning("%d of the %d reconstructions of the preview are not finite", bad, len(y))
        rows = [part[start : start + PREVIEW_COLUMNS] for start in range(0, len(x), PREVIEW_COLUMNS) for part in (x, y)]
        return images.picture(np.concatenate(rows), min(PREVIEW_COLUMNS, len(x)))

    return draw


def write_folder(run: Run, folder: str, shift: bool) -> str:
    """Writes the autoencoder of a run as a model folder of diffusers, with the scale of its latents.

    The scale is measured on `MEASURED` images of the run's data, evenly spaced, with fixed noise for the samples of a
    variational autoencoder.

    Args:
      run: The run.
      folder: An empty folder.
      shift: Whether to write the mean of the latents as `shift_factor`, which the class must have.

    Returns:
      What was written, in words.

    Raises:
      InputError: The class has no shift, the latents have no scale, or the data cannot be read.
    """
    params, apply, source = run.params["net"], run.network.apply, run.source

    @jax.jit
    def latents(params, x, keys):
        return jax.vmap(apply.sample)(apply.encode(params, x), keys)

    rows = np.unique(np.linspace(0, len(source) - 1, MEASURED).astype(int))
    keys, found = jax.random.split(jax.random.key(0), len(rows)), []
    for start in range(0, len(rows), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        x = jnp.asarray(np.stack([scaled(source[int(row)]["x"]) for row in rows[part]]), jnp.float32)
        found.append(np.asarray(latents(params, x, keys[part]), np.float64))
    z = np.concatenate(found)
    mean, std = float(z.mean()), float(z.std())
    if not std > 0 or not np.isfinite(std):
        raise InputError("--from", f"the latents have the standard deviation {std}, which no scale can make 1")
    scale = Scale(1 / std, mean if shift else None)
    stored = Stored(run.config["network"], jax.device_get(params), run.spec.shape, scale)
    try:
        autoencoder_folder.write(folder, stored)
    except InputError as error:
        raise (InputError("--shift", error.problem) if error.field == "shift_factor" else error) from None
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    shifted = f", shift_factor {mean:.5g}" if shift else ""
    return f"{apply.name}, {count:,} parameters; scaling_factor {1 / std:.5g}{shifted}"
