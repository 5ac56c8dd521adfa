"""The train loop, from top to bottom."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from PIL import Image

from diffusion.core import files, images
from diffusion.core.checks import at_most
from diffusion.core.progress import Progress
from diffusion.core.types import InputError, Network, Objective, Params, Source
from diffusion.data import pipeline
from diffusion.distributed import sharding
from diffusion.training import program as programs
from diffusion.training.checkpoint import Checkpoints, Retention
from diffusion.training.ema import EMA
from diffusion.training.metrics import MetricWriter
from diffusion.training.optimizer import Optimizer
from diffusion.training.resilience.goodput import Goodput
from diffusion.training.resilience.guards import DUMP, Diverged, Guard, dump
from diffusion.training.resilience.preemption import Preempted, Preemption
from diffusion.training.resilience.watchdog import Watchdog
from diffusion.training.state import TrainState, averaged

SAVE, STOP = 1, 2  # what a process may wish that all do
FIRST = 10  # times as long as another step the first may take, which is compiled
LOCATION_KEYWORDS = (
    "path",
    "data_dir",
    "index",
    "on_error",
)  # keywords of sources that say nothing of what the examples are


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
      patience: bad steps in a row that end the run; a step is bad, and changes nothing, if its loss or its gradient is
        no finite number.
      spike: a loss above so many times the running mean is bad too; None for no such limit.
      rollbacks: how often the run goes back to its newest checkpoint, and on with data not seen yet, before bad steps
        end it.
      hang_timeout: minutes without a step that end the run, with the stacks of all threads; 0 for no such watch. The
        first step, which is compiled, saves and previews have ten times as long.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    cond_drop_rate: float = 0.1
    log_every: int = 50
    preview_every: int = 0
    prefetch: int = 8
    workers: int = 0
    patience: int = 10
    spike: float | None = None
    rollbacks: int = 0
    hang_timeout: float = 10.0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "prefetch", "patience"):
            if getattr(self, name) < 1:
                raise InputError(name, f"must be at least 1, got {getattr(self, name)}")
        for name, most in (("batch_size", 10**7), ("prefetch", 10**4), ("workers", 10**4)):
            at_most(most, getattr(self, name), name)
        for name in ("preview_every", "workers", "rollbacks", "hang_timeout"):
            if getattr(self, name) < 0:
                raise InputError(name, f"must be at least 0, got {getattr(self, name)}")
        Guard(self.spike)
        if not 0 <= self.cond_drop_rate < 1:
            raise InputError("cond_drop_rate", f"must be in [0, 1), got {self.cond_drop_rate}")
        if self.batch_size % self.accumulate:
            raise InputError("accumulate", f"{self.accumulate} does not divide the batch of {self.batch_size}")


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When to save, and what to keep.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      minutes: save after so many as well; None for no such clock.
      keep: how many of the newest to keep.
      keep_every: keep those of steps divisible by it for good.
      keep_best: name of a metric; keep the checkpoint at which it was the lowest.
    """

    every: int = 1000
    minutes: float | None = None
    keep: int = 3
    keep_every: int | None = None
    keep_best: str | None = None

    def __post_init__(self):
        for name in ("every", "minutes", "keep", "keep_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(name, f"must be above 0, got {value}")


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
    sequence: str | None = None,
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
      rules, sequence, seed: see `program.make_program`.
      meta: JSON-able, saved with every checkpoint.
      teacher: the dict of networks that the objective's teacher has, for a run that begins; one that goes on has it.
      preview: averaged parameters -> a picture of samples, from the same noise each time.

    Raises:
      InputError: the mesh does not divide the batch, or the workdir's checkpoint does not fit.
      Diverged: too many steps in a row were bad; the last checkpoint stays.
      Preempted: it was told to stop, and is saved.
    """
    if source.spec.captions:
        raise InputError("data.captions", "no network reads captions yet; set it False to train without")
    program = programs.make_program(
        network=network, objective=objective, optimizer=optimizer, ema=ema, mesh=mesh, rules=rules, sequence=sequence,
        seed=seed, batch_size=options.batch_size, cond_drop_rate=options.cond_drop_rate, accumulate=options.accumulate,
        guard=Guard(options.spike), teacher=teacher,
    )  # fmt: skip
    whole = sharding.replicated_arrays(program.state) if mesh.shape["fsdp"] > 1 else {}
    if whole:
        size = f"{sum(whole.values()) / 2**20:,.0f} MiB"
        print(f"warning: every device has all {size} of {', '.join(whole)}: no dimension divides; choose another "
              "mesh.fsdp, or split them by sharding.rules", file=sys.stderr)  # fmt: skip

    # Start, or go on. Nothing is written before the checkpoint is known to fit.
    def restore(step: int) -> tuple[TrainState, dict]:
        if step > options.steps:
            raise InputError("train.steps", f"is {options.steps}, but {workdir} is at step {step} already")
        if step:
            _check_same(found.meta(step), meta)
        return found.restore(step, program.state)

    began = time.monotonic()
    found = Checkpoints(workdir, read_only=True)
    latest, restored, damaged = found.newest_valid(restore)
    found.close()
    state, position = restored or (None, {})  # converted weights, at step 0, have no position either
    start, skipped = latest or 0, position.get("skipped", 0)
    part, parts = sharding.part_of_process(program.batch, options.batch_size, jax.process_index())
    data = pipeline.Batches(
        source, batch_size=options.batch_size, seed=seed, process=part, processes=parts,
        workers=options.workers, prefetch=options.prefetch, position=position or None,
    )  # fmt: skip
    previews = os.path.join(workdir, "previews")
    files.make_folder(workdir, "workdir")
    files.make_folder(previews, "workdir")
    with _writing(workdir), files.replace(os.path.join(workdir, "config.json")) as file:
        json.dump(meta["config"], file, indent=2)
    if latest is None:
        state = program.init(teacher)
    overview = parameter_overview.get_parameter_overview(state.params)
    with _writing(workdir), files.replace(os.path.join(workdir, "parameters.txt")) as file:
        file.write(overview + "\n")
    retention = Retention(checkpoint.keep, checkpoint.keep_every, checkpoint.keep_best)
    checkpoints = Checkpoints(workdir, retention=retention)
    for step in damaged:
        print(f"warning: step {step} is kept in {checkpoints.quarantine(step)}", file=sys.stderr)
    print(
        f"{parameter_overview.count_parameters(state.params):,} parameters ({workdir}/parameters.txt), "
        f"{mesh.size} device{'s' if mesh.size > 1 else ''}, {len(source):,} examples, "
        + ("from the start" if latest is None else f"going on from step {start:,}")
    )

    with _writing(workdir):
        writer = MetricWriter(workdir, start)
        meter = Goodput(workdir, start, since=began)
    progress = Progress("train", options.steps, done=start, weight=options.batch_size)
    known = {}  # the last finite value of each metric, for what is kept as the best; infinity before there is one

    def report(step: int, end: int, metrics: Mapping[str, Any]) -> None:
        nonlocal skipped
        metrics = jax.device_get(metrics)
        norms, in_row = metrics.pop("norms"), int(metrics.pop("in_row"))
        metrics.pop("request", None)
        values = {name: float(value) for name, value in metrics.items()}
        if "skipped" in values:  # of this step, here of the whole run
            skipped += round(values["skipped"])
            values["skipped"] = skipped
        if in_row >= options.patience:
            examples = {"seed": seed, "examples": [end - options.batch_size, end]}
            with _writing(workdir):
                dump(workdir, step, {**examples, **values, "gradient_norms": norms})
            raise Diverged(f"{in_row} steps in a row were bad, the last is {step}, of loss {values['loss']}; the last "
                           f"checkpoint is untouched; see {workdir}/{DUMP}")  # fmt: skip
        progress.update(step, loss=values["loss"])
        # Not every metric exists at every step: there may be no example in a bin of noise levels.
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        known.update({**dict.fromkeys(values.keys() - known.keys(), math.inf), **finite})
        if step % options.log_every == 0 or step == options.steps:
            with _writing(workdir):
                writer.write(step, {**finite, "images_per_second": progress.rate() * options.batch_size})
                meter.write(step)

    def own_request() -> int:
        late = checkpoint.minutes and time.monotonic() - saved_at > 60 * checkpoint.minutes
        return STOP if preemption.requested else SAVE if late else 0

    alone = jax.process_count() == 1
    watchdog = Watchdog(60 * options.hang_timeout, os.path.join(workdir, "stuck.txt"))
    with watchdog, Preemption() as preemption:
        try:
            step, waiting, request, rollbacks, saved_at = start, None, 0, 0, time.monotonic()
            while step < options.steps and request < STOP:
                step += 1
                watchdog.beat(f"the data of step {step}")
                with meter.spent("data"):
                    batch = next(data)
                    if waiting and not waiting[-1]["loss"].is_ready():
                        meter.count_as("step")  # the device was not kept waiting
                if not alone:  # all save the same step: what one wishes goes through the step, and comes back to all
                    batch["request"] = np.full(batch["x"].shape[0], own_request(), np.int32)
                first = step == start + 1
                watchdog.beat(f"step {step}", FIRST * watchdog.limit if first else None)
                with meter.spent("compile" if first else "step"):
                    state, metrics = program.step(state, sharding.to_global(batch, program.batch))
                    # The device works on this step while the host reads the one before.
                    previous, waiting = waiting, (step, data.position()["examples"], metrics)
                    request = own_request() if alone else int(previous[-1]["request"]) if previous else 0
                    save = step == options.steps or step % checkpoint.every == 0 or request
                    show = (preview is not None and options.preview_every
                            and (step == options.steps or step % options.preview_every == 0))  # fmt: skip
                    try:
                        if previous:
                            report(*previous)
                        if save or show:
                            report(*waiting)
                            waiting = None
                    except Diverged:
                        checkpoints.wait()
                        newest = checkpoints.latest()
                        if rollbacks == options.rollbacks or newest is None:
                            raise
                        rollbacks += 1
                        print(f"warning: back to step {newest:,}, and on with other data", file=sys.stderr)
                        (state, _), step, waiting = checkpoints.restore(newest, program.state), newest, None
                        writer.cut(step)
                        continue
                checkpoints.check()
                if save:
                    watchdog.beat(f"the save of step {step}", FIRST * watchdog.limit)
                    # Before the next batch is drawn, so the position that is saved is the next step's.
                    with meter.spent("checkpoint"):
                        checkpoints.save(step, state, {**data.position(), "skipped": skipped}, meta, known)
                    saved_at = time.monotonic()
                if show:
                    watchdog.beat(f"the preview of step {step}", FIRST * watchdog.limit)
                    with meter.spent("preview"), _writing(workdir):
                        sheet = preview(averaged(state, ema.names[-1]))
                        images.save_png(sheet, os.path.join(previews, f"step_{step:07d}.png"))
            watchdog.beat("the last save", FIRST * watchdog.limit)
            with meter.spent("checkpoint"):
                checkpoints.wait()
        finally:
            data.close()
            progress.close()
            with contextlib.suppress(OSError):  # of a full disk, which has been told of
                meter.write(step)
                meter.close()
                writer.close()
            checkpoints.close()
    if step < options.steps:
        raise Preempted(f"stopped at step {step:,}, and saved; start it again to go on")
    return state


@contextlib.contextmanager
def _writing(workdir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"{workdir} cannot be written: {error.strerror or error}"
        there = "" if isinstance(error, FileNotFoundError) else "; its checkpoints are untouched"
        raise InputError("workdir", problem + there) from error


def _check_same(stored: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """A run goes on with the network, objective and data it began with; the rest of a config may change, and where the
    data lie."""
    for part in ("network", "objective", "data"):
        ours, theirs = (json.loads(json.dumps(m.get("config", {}).get(part, {}))) for m in (meta, stored))
        if part == "data":
            ours, theirs = (
                {key: value for key, value in section.items() if key not in LOCATION_KEYWORDS}
                for section in (ours, theirs)
            )
        if ours != theirs:
            field = next(f"{part}.{key}" for key in {**theirs, **ours} if ours.get(key) != theirs.get(key))
            key = field.partition(".")[2]
            raise InputError(
                field,
                f"is {ours.get(key)!r}, but the workdir was trained with {theirs.get(key)!r}; "
                "restore it or give another --workdir",
            )
