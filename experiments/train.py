"""Trains the model of a config, or goes on with the workdir's.

python -m experiments.train --config=configs/digits.py --workdir=runs/digits [--config.train.steps=200] [--check]
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from PIL import Image

from diffusion import visualize
from diffusion.build import build
from diffusion.training import preemption
from diffusion.training.loop import train
from diffusion.types import Network, Objective, Params, Source, Spec
from experiments import cli, parts
from experiments.drawing import Drawer

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, previews.")
CHECK = flags.DEFINE_bool(
    "check", False, "Build and trace all that the run needs, say what it would train, and write nothing."
)
flags.mark_flags_as_required(["config", "workdir"])

PREVIEW_SEED, PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_POINTS = 0, 8, 10, 5000


def main() -> None:
    config = CONFIG.value.to_dict()
    parts.check_sections(config)
    source = build("data", config["data"], field="data")
    meta, teacher = parts.meta_of(config, source.spec, WORKDIR.value)
    network, objective = parts.model_of(meta)
    keywords = parts.training(config)
    drawer = Drawer(
        network, objective, source.spec, keywords["mesh"],
        sampler=config["sampler"], guidance=config["guidance"], cond_drop_rate=keywords["options"].cond_drop_rate,
    )  # fmt: skip

    if CHECK.value:
        print(f"{WORKDIR.value}: {checked(source, network, objective, teacher, **keywords)}; nothing written")
        return
    train(
        WORKDIR.value,
        source=source,
        network=network,
        objective=objective,
        **keywords,
        meta=meta,
        teacher=teacher,
        preview=lambda params: preview(drawer, params, source.spec),
    )


def checked(source: Source, network: Network, objective: Objective, teacher: Mapping | None, **keywords: Any) -> str:
    """What a run would train, in a line, once its state and a whole step are traced: nothing is computed or compiled,
    and no array of the model exists. What is in the workdir already is not looked at.

    Args:
      keywords: as `parts.training` gives them.

    Raises:
      InputError: what the step, or the mesh, cannot do.
    """
    options, mesh = keywords["options"], keywords["mesh"]
    program = parts.program_of(network, objective, teacher, **keywords)
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
    return visualize.picture(drawer(params, labels, num, seed=PREVIEW_SEED, batch_size=num), PREVIEW_COLUMNS)


if __name__ == "__main__":
    preemption.stop_at_once()
    cli.run(main)
