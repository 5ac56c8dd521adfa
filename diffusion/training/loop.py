"""The train loop, from top to bottom."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh
from PIL import Image

from diffusion import files, visualize
from diffusion.checkpoint import Checkpoints
from diffusion.data import pipeline
from diffusion.distributed import sharding
from diffusion.progress import Progress
from diffusion.training.ema import EMA
from diffusion.training.metrics import MetricWriter
from diffusion.training.optimizer import Optimizer
from diffusion.training.state import TrainState, averaged, init_state
from diffusion.training.step import make_step
from diffusion.types import InputError, Network, Objective, Params, Source

PLACES = ("path", "data_dir", "index", "on_error")  # keywords of sources that say nothing of what the examples are


class Diverged(Exception):
    """The loss is no longer a number."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How long to train and what to report.

    Attributes:
      steps: of the whole run, counted over restarts.
      batch_size: over all devices.
      accumulate: micro-batches a step.
      cond_drop_rate: share of the examples trained without their condition; guidance needs more than 0.
      log_every: steps between lines of metrics.
      preview_every: steps between sample grids; 0 for none.
      prefetch: batches read ahead.
      workers: processes that read the data; 0 for what needs little work, read in threads.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    cond_drop_rate: float = 0.1
    log_every: int = 50
    preview_every: int = 0
    prefetch: int = 8
    workers: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "prefetch"):
            if getattr(self, name) < 1:
                raise InputError(name, f"must be at least 1, got {getattr(self, name)}")
        for name in ("preview_every", "workers"):
            if getattr(self, name) < 0:
                raise InputError(name, f"must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.cond_drop_rate < 1:
            raise InputError("cond_drop_rate", f"must be in [0, 1), got {self.cond_drop_rate}")
        if self.batch_size % self.accumulate:
            raise InputError("accumulate", f"{self.accumulate} does not divide the batch of {self.batch_size}")


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When to save.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep: how many of the newest to keep.
    """

    every: int = 1000
    keep: int = 3

    def __post_init__(self):
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(name, f"must be at least 1, got {getattr(self, name)}")


def train(
    workdir: str,
    *,
    source: Source,
    network: Network,
    objective: Objective,
    optimizer: Optimizer,
    ema: EMA,
    mesh: Mesh,
    rules: tuple[sharding.Rule, ...] = (),
    options: Options,
    checkpoint: CheckpointOptions,
    seed: int,
    meta: Mapping[str, Any],
    teacher: Mapping | None = None,
    preview: Callable[[Params], Image.Image] | None = None,
) -> TrainState:
    """Trains to `options.steps`, from the workdir's newest checkpoint if it has one.

    Args:
      workdir: for checkpoints, `metrics.jsonl` and `previews/`.
      meta: JSON-able, saved with every checkpoint.
      teacher: the dict of networks that the objective's teacher has, for a run that begins; one that goes on has it.
      preview: averaged parameters -> a picture of samples, from the same noise each time.

    Raises:
      InputError: the mesh does not divide the batch, or the workdir's checkpoint does not fit.
      Diverged: a loss was not finite; the last checkpoint stays.
    """
    if source.spec.captions:
        raise InputError("data.captions", "no network reads captions yet; set it False to train without")
    shards = sharding.batch_shards(mesh)
    if options.batch_size % (shards * options.accumulate):
        micro = f" in {options.accumulate} micro-batches" if options.accumulate > 1 else ""
        raise InputError(
            "train.batch_size",
            f"{options.batch_size} examples{micro} cannot be divided over the mesh's data x fsdp = {shards}; "
            f"use a multiple of {shards * options.accumulate}",
        )

    # The state, described before it exists: every array's shape, dtype and place on the mesh.
    def init(teacher: Mapping | None) -> TrainState:
        return init_state(objective, network, optimizer.transform, ema, jax.random.key(seed), teacher)

    shapes = jax.eval_shape(init, teacher)
    state_sharding = sharding.of_state(shapes, mesh, rules)
    abstract = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                            shapes, state_sharding)  # fmt: skip
    batch_sharding = sharding.by_example(mesh)
    train_step = jax.jit(
        make_step(objective, network, optimizer, ema, seed=seed, cond_drop_rate=options.cond_drop_rate,
                  accumulate=options.accumulate),
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
        donate_argnums=0,
    )  # fmt: skip

    # Start, or go on. Nothing is written before the checkpoint is known to fit.
    found = Checkpoints(workdir, read_only=True)
    latest = found.latest()
    start, position = latest or 0, {}
    if latest is not None:
        if start > options.steps:
            raise InputError("train.steps", f"is {options.steps}, but {workdir} is at step {start} already")
        if start:
            _check_same(found.meta(start), meta)
        state, position = found.restore(start, abstract)  # converted weights, at step 0, have no position
    found.close()
    skipped = position.get("skipped", 0)
    data = pipeline.Batches(
        source, batch_size=options.batch_size, seed=seed, process=jax.process_index(), processes=jax.process_count(),
        workers=options.workers, prefetch=options.prefetch, position=position or None,
    )  # fmt: skip
    previews = os.path.join(workdir, "previews")
    files.make_folder(workdir, "workdir")
    files.make_folder(previews, "workdir")
    with files.replace(os.path.join(workdir, "config.json")) as file:
        json.dump(meta["config"], file, indent=2)
    if latest is None:
        state = jax.jit(init, out_shardings=state_sharding)(teacher)
    overview = parameter_overview.get_parameter_overview(state.params)
    with files.replace(os.path.join(workdir, "parameters.txt")) as file:
        file.write(overview + "\n")
    print(
        f"{parameter_overview.count_parameters(state.params):,} parameters ({workdir}/parameters.txt), "
        f"{mesh.size} device{'s' if mesh.size > 1 else ''}, {len(source):,} examples, "
        + ("from the start" if latest is None else f"going on from step {start:,}")
    )

    checkpoints = Checkpoints(workdir, keep=checkpoint.keep)
    writer = MetricWriter(workdir, start)
    progress = Progress("train", options.steps, done=start, weight=options.batch_size)

    def report(step: int, metrics: Mapping[str, jax.Array]) -> None:
        nonlocal skipped
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if "skipped" in values:  # of this step, here of the whole run
            skipped += round(values["skipped"])
            values["skipped"] = skipped
        # Not every metric exists at every step: there may be no example in a bin of noise levels.
        values = {name: value for name, value in values.items() if name == "loss" or math.isfinite(value)}
        if not math.isfinite(values["loss"]):
            raise Diverged(f"the loss of step {step} is {values['loss']}; the last checkpoint is untouched")
        if step % options.log_every == 0 or step == options.steps:
            writer.write(step, {**values, "images_per_second": progress.rate() * options.batch_size})
        progress.update(step, loss=values["loss"])

    try:
        waiting = None
        for step in range(start + 1, options.steps + 1):
            batch = sharding.to_global(next(data), batch_sharding)
            state, metrics = train_step(state, batch)
            # The device works on this step while the host reads the one before.
            if waiting:
                report(*waiting)
            waiting = (step, metrics)
            last = step == options.steps
            save = last or step % checkpoint.every == 0
            show = preview is not None and options.preview_every and (last or step % options.preview_every == 0)
            if save or show:
                report(*waiting)
                waiting = None
            if save:
                # Before the next batch is drawn, so the position that is saved is the next step's.
                checkpoints.save(step, state, {**data.position(), "skipped": skipped}, meta)
            if show:
                sheet = preview(averaged(state, ema.names[-1]))
                visualize.save_png(sheet, os.path.join(previews, f"step_{step:07d}.png"))
        checkpoints.wait()
    finally:
        data.close()
        progress.close()
        writer.close()
        checkpoints.close()
    return state


def _check_same(stored: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """A run goes on with the network, objective and data it began with; the rest of a config may change, and where the
    data lie."""
    for part in ("network", "objective", "data"):
        ours, theirs = (json.loads(json.dumps(m["config"][part])) for m in (meta, stored))
        if part == "data":
            ours, theirs = (
                {key: value for key, value in section.items() if key not in PLACES} for section in (ours, theirs)
            )
        if ours != theirs:
            field = next(f"{part}.{key}" for key in {**theirs, **ours} if ours.get(key) != theirs.get(key))
            key = field.partition(".")[2]
            raise InputError(
                field,
                f"is {ours.get(key)!r}, but the workdir was trained with {theirs.get(key)!r}; "
                "restore it or give another --workdir",
            )
