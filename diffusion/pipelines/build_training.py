"""From a config to all that its training needs, before anything of it is computed or written."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from diffusion.core import images
from diffusion.core.build import build, call
from diffusion.core.types import InputError, Network, Objective, Params, Spec
from diffusion.distributed import mesh as meshes
from diffusion.distributed import sharding
from diffusion.pipelines.config import check_sections
from diffusion.pipelines.generator import Generator
from diffusion.pipelines.model import model_of
from diffusion.pipelines.run import open_run
from diffusion.training import ema, optimizer
from diffusion.training import program as programs
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.program import Program
from diffusion.training.resilience.guards import Guard
from diffusion.training.trainer import CheckpointOptions, Options

PREVIEW_SEED, PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_POINTS = 0, 8, 10, 5000


def prepared(config: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """The keyword arguments of `training.loop.train`. Raises InputError for what does not fit together in a config."""
    check_sections(config)
    source = build("data", config["data"], field="data")
    meta, teacher = meta_of(config, source.spec, workdir)
    network, objective = model_of(meta)
    keywords = training(config)
    drawer = Generator(
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


def preview(drawer: Generator, params: Params, spec: Spec) -> Image.Image:
    """A grid of fixed seed, the classes in columns: what differs between two of them is the training."""
    num = PREVIEW_ROWS * PREVIEW_COLUMNS if len(spec.shape) == 3 else PREVIEW_POINTS
    labels = np.arange(num) % PREVIEW_COLUMNS % spec.num_classes if spec.num_classes else None
    return images.picture(drawer(params, labels, num, seed=PREVIEW_SEED, batch_size=num), PREVIEW_COLUMNS)


def meta_of(config: Mapping[str, Any], spec: Spec, workdir: str) -> tuple[dict[str, Any], Mapping[str, Params] | None]:
    """What a run of a config keeps with its checkpoints, and the parameters of the teacher that the objective names by
    its workdir; None if it has none, or if the run has begun: then it has its own copy."""
    meta = {"config": config, "spec": dataclasses.asdict(spec)}
    where = config["objective"].get("teacher")
    if where is None:
        return meta, None
    if not isinstance(where, str):
        raise InputError("objective.teacher", f"must be the workdir of a trained model, got {where!r}")
    begun = Checkpoints(workdir, read_only=True)
    latest, stored, _ = begun.newest_valid(begun.meta)
    if latest and "teacher" in stored:
        return {**meta, "teacher": stored["teacher"]}, None
    try:
        run = open_run(where)
    except InputError as error:
        raise error.within("objective.teacher") from None
    if run.spec != spec:
        raise InputError("objective.teacher", f"{where} was trained on data of another kind: {run.spec}, not {spec}")
    return {**meta, "teacher": {**run.meta, "step": run.step, "ema": run.ema}}, run.params


def training(config: Mapping[str, Any], devices: Sequence[Any] | None = None) -> dict[str, Any]:
    """The keyword arguments of `training.loop.train` that do not depend on the data or the model.

    Args:
      devices: of the mesh; all by default.
    """
    options = call(Options, config["train"], field="train")
    return {
        "options": options,
        "optimizer": call(optimizer.make_optimizer, {**config["optimizer"], "steps": options.steps}, field="optimizer"),
        "ema": call(ema.make_ema, config["ema"], field="ema"),
        "checkpoint": call(CheckpointOptions, config["checkpoint"], field="checkpoint"),
        "mesh": call(meshes.make_mesh, {"devices": devices, **config["mesh"]}, field="mesh"),
        **call(_sharding, config["sharding"], field="sharding"),
        "seed": config["seed"],
    }


def program_of(
    network: Network, objective: Objective, teacher: Mapping | None, *, options: Options, checkpoint: Any,
    **keywords: Any
) -> Program:  # fmt: skip
    """The train step that `training.loop.train` would run, of which nothing is computed yet.

    Args:
      options, checkpoint, keywords: as `training` gives them.
    """
    return programs.make_program(
        network=network, objective=objective, teacher=teacher, batch_size=options.batch_size,
        cond_drop_rate=options.cond_drop_rate, accumulate=options.accumulate, guard=Guard(options.spike), **keywords,
    )  # fmt: skip


def _sharding(rules: tuple[sharding.Rule, ...] = (), sequence: Literal["model"] | None = None) -> dict[str, Any]:
    """The `sharding` section: see `training.program.make`."""
    return {"rules": rules, "sequence": sequence}
