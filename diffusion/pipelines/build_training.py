"""From a config to all that its training needs, before anything of it is computed or written."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from diffusion.core import images
from diffusion.core.build import build
from diffusion.core.types import Params, Spec
from diffusion.pipelines.build_training import meta_of, program_of, training
from diffusion.pipelines.config import check_sections
from diffusion.pipelines.model import model_of
from diffusion.pipelines.generator import Drawer

PREVIEW_SEED, PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_POINTS = 0, 8, 10, 5000


def prepared(config: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """The keyword arguments of `training.loop.train`. Raises InputError for what does not fit together in a config."""
    check_sections(config)
    source = build("data", config["data"], field="data")
    meta, teacher = meta_of(config, source.spec, workdir)
    network, objective = model_of(meta)
    keywords = training(config)
    drawer = Drawer(
        network, objective, source.spec, keywords["mesh"],
        sampler=config["sampler"], guidance=config["guidance"], cond_drop_rate=keywords["options"].cond_drop_rate,
    )  # fmt: skip
    return {
        **keywords, "source": source, "network": network, "objective": objective, "meta": meta, "teacher": teacher,
        "preview": lambda params: preview(drawer, params, source.spec),
    }  # fmt: skip


def traced(run: Mapping[str, Any]) -> str:
    """What a run would train, in a line, once its state and a whole step are traced: nothing is computed or compiled,
    and no array of the model exists. What is in the workdir already is not looked at.

    Args:
      run: as `prepared` gives it.

    Raises:
      InputError: what the step, or the mesh, cannot do.
    """
    source, options, mesh = run["source"], run["options"], run["mesh"]
    program = program_of(**{name: run[name] for name in run.keys() - {"source", "meta", "preview"}})
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((options.batch_size, *np.shape(leaf)), np.asarray(leaf).dtype), source[0]
    )
    jax.eval_shape(program.step, program.state, batch)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.state.params))
    devices = f"{mesh.size} device{'s' if mesh.size > 1 else ''}"
    return (f"{count:,} parameters on {devices}, {options.steps:,} steps of {options.batch_size:,} of the "
            f"{len(source):,} examples")  # fmt: skip


def preview(drawer: Drawer, params: Params, spec: Spec) -> Image.Image:
    """A grid of fixed seed, the classes in columns: what differs between two of them is the training."""
    num = PREVIEW_ROWS * PREVIEW_COLUMNS if len(spec.shape) == 3 else PREVIEW_POINTS
    labels = np.arange(num) % PREVIEW_COLUMNS % spec.num_classes if spec.num_classes else None
    return images.picture(drawer(params, labels, num, seed=PREVIEW_SEED, batch_size=num), PREVIEW_COLUMNS)
