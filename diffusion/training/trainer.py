"""The training loop: a short loop around the pure train step, with hooks for everything that happens now and then."""

import contextlib
import dataclasses
import inspect
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh

from diffusion.core import files, trees
from diffusion.core.arrays import is_empty
from diffusion.core.build import build, build_accepting, build_network, call, changed, model_spec, nearest
from diffusion.core.progress import Progress
from diffusion.core.types import (
    MACHINE_OPTIONS,
    Autoencoder,
    InputError,
    Network,
    Objective,
    Params,
    Source,
    TextEncoder,
)
from diffusion.data import captions, pipeline
from diffusion.distributed import multihost, sharding
from diffusion.distributed.mesh import make_mesh
from diffusion.encoders import text_conditions
from diffusion.objectives.base.gaussian import PartSpec
from diffusion.training.checkpoint import REFERENCE, Checkpoints, Retention
from diffusion.training.ema import EMA, make_ema
from diffusion.training.hooks import Hook
from diffusion.training.metrics import Metrics, Writer, default_writers
from diffusion.training.optimizer import Optimizer, make_optimizer
from diffusion.training.options import CONFIG_VERSION, CheckpointOptions, Options, check_drop_rate
from diffusion.training.program import Program, make_program
from diffusion.training.resilience.goodput import Goodput
from diffusion.training.resilience.guards import DUMP, Diverged, Guard, dump
from diffusion.training.resilience.preemption import Preempted
from diffusion.training.state import TrainState, averaged, pretrained_of

CONTINUE, SAVE, STOP = 0, 1, 2  # requests that a process sends to all others
FORESIGHT = 2  # batches that a process has read when it sends a request, which takes two steps to be followed

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model, from the newest checkpoint of the workdir if it has one.

    The trainer neither handles signals nor ends the process. A caller that wants to be stopped between two steps passes
    `should_stop`, and one that watches for hangs passes `heartbeat`; the training job passes both.

    Each part is an object, a name, a section `{"name": ..., **options}`, a callable that makes the part, or
    `"package.module:attribute"`.

    Args:
      source: The training data.
      network: A `Network`; a callable receives those of `shape`, `num_classes` and `conditions` that it accepts.
      objective: An `Objective`.
      optimizer: An `Optimizer`, an optax transformation, or the options of `make_optimizer`, which are the default.
      ema: An `EMA`, or the options of `make_ema`, which are the default.
      mesh: The devices; by default all, with the batch split over them.
      options: How long to train, and what to report; `**train_options` change fields of it.
      checkpoint: When to save, and which checkpoints to keep.
      seed: Determines initial parameters, the order of the data and all noise.
      workdir: Folder for checkpoints, metrics and previews. None keeps everything in memory.
      meta: JSON-able, saved with each checkpoint. By default it describes the parts, so that the workdir can be loaded.
      rules, sequence, fsdp_min_size: How arrays are sharded; see `program.make_program`.
      teacher: The dict of networks of the objective's teacher, for a run that starts; one that resumes has its own.
      start: Leaves of the dict of networks, in nested dicts, with which a run starts in place of random ones. A run
        that does not train all leaves (`options.trainable`, or an adapter) also reads the others from here when it
        resumes, and neither its state nor its checkpoints contain them.
      autoencoder: A frozen autoencoder, whose latents the network models; its parameters are in no checkpoint. Batches
        are encoded in the step, unless the source has been encoded in advance.
      text_encoder: Turns the captions of the source into the condition `text`. The parameters of a frozen one are in no
        checkpoint; one that is trained adds its parameters to those of the network.
      hooks: What to do at certain steps: before the checkpoint of that step if it returns metrics, otherwise after it.
      writers: Receive the metrics in addition to the workdir's own (`metrics.jsonl`, TensorBoard).
      should_stop: Returns whether to save and stop after this step.
      heartbeat: Called as `heartbeat(activity, limit_factor)` before each activity that may hang; `limit_factor` is how
        many times longer than a step it may take.
      during_steps: A context that is entered after the run is opened and left after its files are closed; the training
        job passes its signal handlers and watchdog.

    Attributes:
      state: The train state.
      step: Number of steps done.
      metrics: The metrics of the last step that was read, by name, without those of parts that had no example.

    Raises:
      InputError: A part cannot be built, there is no such option, or another encoder has encoded the source.
    """

    def __init__(
        self,
        source: Source | PartSpec,
        network: Network | PartSpec,
        objective: Objective | PartSpec,
        *,
        optimizer: Optimizer | optax.GradientTransformation | Mapping[str, Any] | None = None,
        ema: EMA | Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
        options: Options | None = None,
        checkpoint: CheckpointOptions | None = None,
        seed: int = 0,
        workdir: str | None = None,
        meta: Mapping[str, Any] | None = None,
        rules: tuple[sharding.Rule, ...] = (),
        sequence: str | None = None,
        fsdp_min_size: int = sharding.FSDP_MIN_SIZE,
        teacher: Mapping | None = None,
        start: Mapping[str, Params] | None = None,
        autoencoder: Autoencoder | PartSpec | None = None,
        text_encoder: TextEncoder | PartSpec | None = None,
        hooks: Sequence[Hook] = (),
        writers: Sequence[Writer] = (),
        should_stop: Callable[[], bool] = lambda: False,
        heartbeat: Callable[[str, float], None] = lambda activity, limit_factor: None,
        during_steps: contextlib.AbstractContextManager | None = None,
        **train_options: Any,
    ):
        self.source = source if hasattr(source, "__getitem__") and hasattr(source, "spec") else build("data", source)
        spec = self.spec = pipeline.decoded_spec(self.source)
        parts = {"data": source, "network": network, "objective": objective}
        if autoencoder is not None and not isinstance(autoencoder, Autoencoder):
            parts["autoencoder"] = autoencoder
            autoencoder = build("autoencoders", autoencoder, field="autoencoder", shape=spec.shape)
        pipeline.check_encoder(self.source, autoencoder)
        if text_encoder is not None and not isinstance(text_encoder, TextEncoder):
            parts["text_encoder"] = text_encoder
            text_encoder = build_accepting(
                "text_encoders", text_encoder, field="text_encoder", captions=captions.of_source(self.source),
                num_captions=len(self.source),
            )  # fmt: skip
        self.source = captions.with_text(self.source, text_encoder)
        modelled = model_spec(spec, autoencoder, text_encoder)
        self.network = network
        if not isinstance(network, Network):
            self.network = build_network(network, modelled)
            self.network = text_conditions.attached(self.network, text_encoder)
        self.objective = (
            objective if hasattr(objective, "denoiser") else build("objectives", objective, field="objective")
        )
        fields = [field.name for field in dataclasses.fields(Options)]
        for name in train_options:
            if name not in fields:
                own = [key for key, p in inspect.signature(Trainer).parameters.items() if p.kind is not p.VAR_KEYWORD]
                raise InputError(name, f"Trainer takes no {name!r}{nearest(name, [*own, *fields])}")
        self.options = dataclasses.replace(options or Options(), **train_options)
        droppable = text_encoder.parts if text_encoder and text_encoder.null else ()
        check_drop_rate(self.options.cond_drop_rate, modelled.conditions, droppable)
        self.ema = ema if isinstance(ema, EMA) else call(make_ema, ema or {}, field="ema")
        self.optimizer, self.mesh = optimizer, mesh or make_mesh()
        self.seed, self.workdir = seed, workdir and os.path.expanduser(workdir)
        self.checkpoint = checkpoint or CheckpointOptions()
        self.sharding = {"rules": rules, "sequence": sequence, "fsdp_min_size": fsdp_min_size}
        self.teacher, self.start, self.autoencoder = teacher, dict(start or {}), autoencoder
        if text_encoder is not None and text_encoder.start is not None:
            self.start = trees.merge({"net": {text_conditions.OWN: text_encoder.start}}, self.start)
        self.text_encoder = text_encoder
        self.hooks, self.extra_writers = tuple(hooks), tuple(writers)
        self.should_stop, self.heartbeat = should_stop, heartbeat
        self.during_steps = during_steps or contextlib.nullcontext()
        self.meta = dict(meta) if meta else self._describe(parts)
        if autoencoder:
            self.meta["autoencoder"] = {"sha256": autoencoder.digest}
        if text_encoder:
            self.meta["text_encoder"] = text_encoder.record
        pretrained = pretrained_of(self.objective)
        if pretrained:
            self.meta["pretrained"] = {name: trees.sha256(params) for name, params in pretrained.items()}
        self.state: TrainState | None = None
        self.program, self._program_steps, self._position, self.frozen = None, None, {}, {}
        self.step, self.skipped, self.rollbacks, self.metrics, self._measured = 0, 0, 0, {}, {}

    def fit(self, steps: int | None = None) -> TrainState:
        """Trains, and returns the last state.

        Args:
          steps: Number of steps of the whole run; `options.steps` by default. Another call with more steps continues.

        Raises:
          InputError: The mesh does not divide the batch, the workdir's checkpoint does not fit, or another training
            uses the workdir.
          Diverged: Too many consecutive steps were bad; the last checkpoint is kept.
          Preempted: `should_stop` returned True; the state is saved.
        """
        if self.options.workers:
            pipeline.end_if_imported()
        self._make_program(self.options.steps if steps is None else steps)
        check_keep_best(self.checkpoint, self.hooks, self.program, self.source, self.options.batch_size)
        # Before the newest checkpoint is read, which another training might be writing.
        lock = multihost.locked(self.workdir, "workdir") if self.workdir else contextlib.nullcontext()
        with lock, self._running():
            while self.step < self.options.steps and self._request < STOP:
                with self._saved_on_error():
                    batch = self._next_batch()
                self.step += 1
                self._beat(f"step {self.step}", 10 if self._is_first else 1)
                with self._spent("compile" if self._is_first else "step"):
                    self.state, metrics = self.program.step(self.state, batch, self.frozen)
                    # The device computes this step while the host reads the metrics of the previous one.
                    previous, self._pending = self._pending, (self.step, self.data.position()["examples"], metrics)
                    self._request = self._agreed_request(previous)
                    save = self._is_last or self.step % self.checkpoint.every == 0 or self._request > CONTINUE
                    due = [hook for hook in self.hooks if hook.is_due(self.step, self._is_last)]
                    try:
                        self._report(previous)
                        if save or due:
                            last, self._pending = self._pending, None
                            self._report(last, [hook for hook in due if hook.metrics])
                    except Diverged:
                        self._roll_back()
                        continue
                if self.checkpoints:
                    self.checkpoints.check()
                    if save:
                        self._save()
                for hook in due:
                    if not hook.metrics:
                        self._run(hook)
        if self.step < self.options.steps:
            multihost.wait_for_all(f"the save of step {self.step}")
            if self.data.error:
                raise self._with_save(self.data.error)
            raise Preempted(f"stopped after step {self.step:,} and saved; start it again to resume")
        return self.state

    def averaged_params(self) -> dict[str, Params]:
        """Returns the networks with the average that sampling uses in place of the trained ones."""
        return trees.merge(averaged(self.state, self.ema.main), self.frozen.get("params", {}))

    def position(self) -> dict[str, Any]:
        """Returns what a resumed run needs besides the state: its place in the data, and metrics not yet logged."""
        return {**self.data.position(), "skipped": self.skipped, "window": self.window.state()}

    def _make_program(self, steps: int) -> None:
        """Makes the train step for a run of `steps` steps, unless it exists; learning rates may depend on `steps`."""
        self.options = dataclasses.replace(self.options, steps=steps)
        if self.program is not None and self._program_steps == steps:
            return
        optimizer = self.optimizer
        if isinstance(optimizer, optax.GradientTransformation):
            optimizer = Optimizer(optimizer, None)
        elif not isinstance(optimizer, Optimizer):
            optimizer = call(make_optimizer, {**(optimizer or {}), "steps": steps}, field="optimizer")
        options = self.options
        self.program, self._program_steps = make_program(
            network=self.network, objective=self.objective, optimizer=optimizer, ema=self.ema, mesh=self.mesh,
            **self.sharding, seed=self.seed, batch_size=options.batch_size, cond_drop_rate=options.cond_drop_rate,
            accumulate=options.accumulate, guard=Guard(options.spike), teacher=self.teacher,
            trainable=options.trainable, autoencoder=self.autoencoder, encoded=pipeline.is_encoded(self.source),
            text_encoder=self.text_encoder, text_encoded=captions.is_text_encoded(self.source),
        ), steps  # fmt: skip
        if hasattr(self.source, "buckets"):  # a size that comes late must not end the run
            self.program.trace(self.source, options.batch_size)
        if not self.frozen:
            self.frozen = self.program.place_frozen(
                self.start, pretrained_of(self.objective), self.autoencoder, self.text_encoder
            )

    def _describe(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the `meta` of a run whose parts were given from Python."""
        config = {name: _section(part) for name, part in parts.items()}
        config |= {"version": CONFIG_VERSION, "seed": self.seed, "train": dataclasses.asdict(self.options)}
        config |= {"ema": dataclasses.asdict(self.ema), "checkpoint": dataclasses.asdict(self.checkpoint)}
        model = self.mesh.shape["model"]
        fsdp = self.mesh.size // self.mesh.shape["data"] // model
        config |= {"mesh": {"fsdp": fsdp, "model": model}, "sharding": self.sharding}
        return {"config": config, "spec": dataclasses.asdict(self.spec)}

    @property
    def _is_first(self) -> bool:
        return self.step == self._first

    @property
    def _is_last(self) -> bool:
        return self.step == self.options.steps

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Restores or initialises the state, opens the data and the files, and closes them at the end."""
        began = time.monotonic()
        position = self._restore()
        self._first, self._pending, self._request, self._saved_at = self.step + 1, None, CONTINUE, time.monotonic()
        part, parts = sharding.part_of_process(self.program.batch, self.options.batch_size, jax.process_index())
        self.data = pipeline.Batches(
            self.source, batch_size=self.options.batch_size, seed=self.seed, process=part, processes=parts,
            workers=self.options.workers, prefetch=self.options.prefetch, position=position or None,
            foresight=FORESIGHT if jax.process_count() > 1 else 0,
        )  # fmt: skip
        if self.state is None:
            self.state = self.program.init(self.teacher, self.start)
        self.start = {}  # the state and `frozen` have what is needed of it
        self._warn_of_replicated_arrays()
        self.window = Metrics(position.get("window"))
        self.meter = self.checkpoints = None
        self.writers = list(self.extra_writers)
        if self.workdir:
            self._open_workdir(began)
        count = parameter_overview.count_parameters(self.state.params)
        where = f" ({self.workdir}/parameters.txt)" if self.workdir else ""
        logger.info(
            f"{count:,} parameters{where}, {self.mesh.size} device{'s' if self.mesh.size > 1 else ''}, "
            f"{len(self.source):,} examples, "
            + (f"resuming from step {self.step:,}" if self.step else "starting from step 0")
        )
        if self.spec.class_names:
            logger.info(f"{self.spec.num_classes:,} classes: {self.spec.classes()}")
        self.progress = Progress("train", self.options.steps, done=self.step, weight=self.options.batch_size)
        with self.during_steps:
            try:
                yield
                self._beat("the last save", 10)
                if self.checkpoints:
                    with self._spent("checkpoint"):
                        self.checkpoints.wait()
            finally:
                self._position = self.position()
                self.data.close()
                self.progress.close()
                with contextlib.suppress(OSError):  # a full disk has been reported already
                    if self.meter:
                        self.meter.write(self.step)
                        self.meter.close()
                    for writer in self.writers:
                        writer.close()
                if self.checkpoints:
                    self.checkpoints.close()

    def _restore(self) -> dict[str, Any]:
        """Reads the newest valid checkpoint, and returns the position that it was saved with.

        Nothing is written before the checkpoint is known to fit.
        """
        self._corrupt = []
        if self.workdir is None or self.state is not None:  # a first or a further call of `fit`
            return self._position

        def restore(step: int) -> tuple[TrainState, dict]:
            check_steps(step, self.options.steps, self.workdir)
            check_same(found.meta(step), self.meta)
            return found.restore(step, self.program.state)

        found = Checkpoints(self.workdir, read_only=True)
        latest, restored, self._corrupt = found.newest_valid(restore)
        found.close()
        self.state, position = restored or (None, {})
        self.step, self.skipped = latest or 0, position.get("skipped", 0)
        return position

    def _open_workdir(self, began: float) -> None:
        workdir, checkpoint = self.workdir, self.checkpoint
        files.make_folder(workdir, "workdir")
        with self._writing():
            if "config" in self.meta:
                files.write_json(os.path.join(workdir, "config.json"), self.meta["config"])
            with files.replace(os.path.join(workdir, "parameters.txt")) as file:
                file.write(parameter_overview.get_parameter_overview(self.state.params) + "\n")
        retention = Retention(checkpoint.keep, checkpoint.keep_every, checkpoint.keep_best, checkpoint.keep_best_mode)
        self.checkpoints = Checkpoints(workdir, retention=retention)
        for step in self._corrupt:
            logger.warning(f"the checkpoint of step {step} was moved to {self.checkpoints.quarantine(step)}")
        with self._writing():
            self.writers += default_writers(workdir, self.step)
            self.meter = Goodput(workdir, self.step, since=began)

    def _next_batch(self) -> Any:
        self._beat(f"the data of step {self.step + 1}")
        with self._spent("data"):
            batch = next(self.data)
            if self.meter and self._pending and not self._pending[-1]["loss"].is_ready():
                self.meter.count_as("step")  # the device did not wait for the data
        if jax.process_count() > 1:  # requests travel through the step, so that all processes see them at the same step
            batch["request"] = np.full(batch["x"].shape[0], self._own_request(), np.int32)
        return sharding.to_global(batch, self.program.batch)

    def _own_request(self) -> int:
        minutes = self.checkpoint.minutes
        late = minutes and time.monotonic() - self._saved_at > 60 * minutes
        return STOP if self.should_stop() or self.data.error else SAVE if late else CONTINUE

    def _agreed_request(self, previous: tuple | None) -> int:
        if jax.process_count() == 1:
            return self._own_request()
        return int(previous[-1]["request"]) if previous else CONTINUE

    def _report(self, pending: tuple[int, int, Mapping[str, Any]] | None, hooks: Sequence[Hook] = ()) -> None:
        """Reads the metrics of a step, and writes their means at the end of a window, and what hooks measure.

        Raises:
          Diverged: `options.patience` consecutive steps were bad.
        """
        if pending is None:
            return
        step, examples, metrics = pending[0], pending[1], jax.device_get(pending[2])
        norms, in_row = metrics.pop("norms"), int(metrics.pop("in_row"))
        metrics.pop("request", None)
        values = {name: float(value) for name, value in metrics.items() if not is_empty(value)}
        if "skipped" in values:  # reported per step, logged for the whole run
            self.skipped += round(values["skipped"])
            values["skipped"] = self.skipped
        if in_row >= self.options.patience:
            raise Diverged(self._dump(step, examples, in_row, values, norms))
        self.metrics = values
        self.window.add(values)
        self.progress.update(step, loss=values["loss"])
        self._measured = {}
        for hook in hooks:
            found = self._run(hook)
            logger.info(f"step {step:,}:  " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))
            self._measured |= {name: value for name, value in found.items() if math.isfinite(value)}
        self.metrics |= self._measured
        line = dict(self._measured)
        ends_window = step % self.options.log_every == 0 or step == self.options.steps
        if ends_window:
            rate = self.progress.rate() * self.options.batch_size
            line = {**self.window.flush(), "images_per_second": rate, **line}
        with self._writing():
            for writer in self.writers if line else ():
                writer.write(step, line)
            if self.meter and ends_window:
                self.meter.write(step)

    def _run(self, hook: Hook) -> Mapping[str, float]:
        self._beat(f"{hook.name} of step {self.step}", 10)
        with self._saved_on_error(), self._spent("preview"), self._writing():
            return hook.run(self)

    def _dump(self, step: int, examples: int, in_row: int, values: Mapping[str, float], norms: Any) -> str:
        """Writes what is known of the step that ends the run, and returns a message."""
        message = f"{in_row} consecutive steps were bad; the last is step {step}, with loss {values['loss']}"
        if self.workdir is None:
            return message
        seen = {"seed": self.seed, "examples": [examples - self.options.batch_size, examples]}
        with self._writing():
            dump(self.workdir, step, {**seen, **values, "gradient_norms": norms})
        return f"{message}; {self._kept()}; see {self.workdir}/{DUMP}"

    def _kept(self) -> str:
        """Returns in words what is left of a run that ends by an error."""
        newest = self.checkpoints.latest() if self.checkpoints else None
        return "there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest:,} is kept"

    def _roll_back(self) -> None:
        """Restores the newest checkpoint after the exception being handled, or raises it again."""
        if self.checkpoints:
            self.checkpoints.wait()
        newest = self.checkpoints.latest() if self.checkpoints else None
        if self.rollbacks == self.options.rollbacks or newest is None:
            raise
        self.rollbacks += 1
        logger.warning(f"returning to step {newest:,}, and continuing with other data")
        self.state, position = self.checkpoints.restore(newest, self.program.state)
        self.step, self._pending = newest, None
        self.window = Metrics(position.get("window"))
        for writer in self.writers:
            if hasattr(writer, "cut"):
                writer.cut(newest)

    def _save(self) -> None:
        self._beat(f"the save of step {self.step}", 10)
        metrics = {**self.window.last, **self._measured}
        # Before the next batch is drawn, so that the saved position is the next step's.
        with self._spent("checkpoint"):
            self.checkpoints.save(self.step, self.state, self.position(), self.meta, metrics)
        self._saved_at = time.monotonic()

    @contextlib.contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Saves the state if data cannot be read or a hook fails between two steps, since that may happen at any step.

        Several processes save together, so none can do this alone; they learn of the errors of data in advance, by
        `Batches.error`.
        """
        try:
            yield
        except Exception as error:
            is_new = self.checkpoints is not None and self.step >= self._first
            if not is_new or isinstance(error, Diverged) or jax.process_count() > 1:
                raise
            pending, self._pending = self._pending, None
            self._report(pending)
            try:
                self._save()
                self.checkpoints.wait()
            except InputError:  # the disk is full, for example
                raise error from None
            raise self._with_save(error) from error.__cause__

    def _with_save(self, error: Exception) -> Exception:
        """Returns an error that ends the run, after saying which step is saved."""
        if isinstance(error, InputError):
            return InputError(error.field, f"{error.problem}; step {self.step:,} is saved")
        logger.warning(f"step {self.step:,} is saved before an error ends the run")
        return error

    def _beat(self, activity: str, limit_factor: float = 1) -> None:
        self.heartbeat(activity, limit_factor)

    def _spent(self, kind: str) -> contextlib.AbstractContextManager:
        return self.meter.spent(kind) if self.meter else contextlib.nullcontext()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"{self.workdir} cannot be written: {error.strerror or error}"
            there = "" if isinstance(error, FileNotFoundError) else f"; {self._kept()}"
            raise InputError("workdir", problem + there) from error

    def _warn_of_replicated_arrays(self) -> None:
        whole = sharding.replicated_arrays(self.program.state, self.sharding["fsdp_min_size"])
        if whole and self.mesh.shape["fsdp"] > 1:
            size = f"{sum(whole.values()) / 2**20:,.0f} MiB"
            logger.warning(f"every device holds all {size} of {', '.join(whole)}: no dimension divides; choose another "
                           "mesh.fsdp, or split them by sharding.rules")  # fmt: skip


def check_keep_best(
    checkpoint: CheckpointOptions, hooks: Iterable[Hook], program: Program, source: Source, batch_size: int
) -> None:
    """Checks that `checkpoint.keep_best` names a metric of a hook or of the train step, which is traced for it.

    Raises:
      InputError: It does not.
    """
    of_hooks = [name for hook in hooks for name in hook.metrics]
    if checkpoint.keep_best in (None, *of_hooks):
        return
    of_step = program.trace(source, batch_size).keys() - {"norms", "in_row"}
    names = [*sorted(of_step), *of_hooks]
    if checkpoint.keep_best not in names:
        problem = f"the run has no metric {checkpoint.keep_best!r}; one of: {', '.join(names)}"
        if checkpoint.keep_best.startswith("eval/"):
            problem += " (eval.every > 0 adds those of the evaluation)"
        raise InputError("checkpoint.keep_best", problem)


def check_steps(step: int, steps: int, workdir: str) -> None:
    """Checks that a run of `steps` steps resumes at a step that it reaches."""
    if step > steps:
        raise InputError("train.steps", f"is {steps}, but {workdir} is at step {step} already")


def _section(part: Any) -> dict[str, Any]:
    """Returns the section of a config that describes a part; that of an object or a local function cannot be built."""
    section = dict(part) if isinstance(part, Mapping) else {"name": part}
    name = section["name"]
    if callable(name) and "<" not in name.__qualname__ and name.__module__ != "__main__":
        section["name"] = f"{name.__module__}:{name.__qualname__}"
    elif not isinstance(name, str):
        section = {"object": type(name).__name__}
    return section


def check_trained(stored: Mapping[str, Any]) -> None:
    """Raises InputError if a checkpoint's `meta` is that of a converted model, which has no state to resume from."""
    if REFERENCE in stored:
        problem = "holds a converted model, which is not trained further in its place"
        raise InputError("workdir", f"{problem}; choose another workdir, and set init_from to this one")


def check_same(stored: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Checks that a run resumes with the model and the data that it started with.

    The rest of a config may change, and so may the options that say where the data lie or that suit the machine.
    Options that the stored config lacks were added to the project since; the arrays of the checkpoint are compared
    anyway.
    """
    check_trained(stored)
    for part in ("network", "adapters", "autoencoder", "text_encoder", "objective", "data"):
        ours, theirs = (files.plain(m.get("config", {}).get(part) or {}) for m in (meta, stored))
        may_change = {
            "network": MACHINE_OPTIONS,
            "autoencoder": ("path", "slices", "dtype"),
            "text_encoder": ("path", "tokenizer", "dtype"),
            "objective": [f"{name}_path" for name in stored.get("pretrained", {})],
        }.get(part, ())
        if part == "data":
            may_change = pipeline.location_keywords(theirs)
        key = changed(theirs, ours, may_change)
        if key is not None:
            raise InputError(
                f"{part}.{key}",
                f"is {ours.get(key)!r}, but the workdir was trained with {theirs.get(key)!r}; "
                "restore it or give another --workdir",
            )
    for name, sha256 in meta.get("pretrained", {}).items():
        before = stored.get("pretrained", {}).get(name, sha256)
        if before != sha256:
            problem = "has other weights than the run was trained with; restore them"
            raise InputError(f"objective.{name}_path", f"{problem} (SHA-256 {before[:12]}..., got {sha256[:12]}...)")
    _check_classes(stored, meta)


def _check_classes(stored: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Checks that the labels stand for the classes that a run started with."""
    specs = [m.get("spec", {}) for m in (stored, meta)]
    # The first checkpoints had no conditions but only a number of classes.
    theirs, ours = (spec.get("conditions", {"label": spec}).get("label", {}) for spec in specs)
    before, now = (list(label.get("class_names", ())) for label in (theirs, ours))
    fix = "restore them, or train another --workdir, from this one if init_from names it"
    if before and now and before != now:
        changes = [f"{sign}{name}" for sign, names, others in (("-", before, now), ("+", now, before))
                   for name in names if name not in others]  # fmt: skip
        problem = (
            f"has other classes than the run: {', '.join(changes[:10])}"
            if changes
            else "has its classes in another order"
        )
        raise InputError("data", f"{problem}; {fix}")
    counts = [label.get("num_classes", 0) for label in (theirs, ours)]
    if all(counts) and counts[0] != counts[1]:
        problem = f"has {counts[1]:,} classes, but the run started with {counts[0]:,}"
        raise InputError("data", f"{problem}; {fix}")
    by_name = meta.get("config", {}).get("data", {}).get("class_order") != "number" or now == sorted(now)
    if counts[0] and not before and not by_name:
        problem = "is 'number', and the run, which is older than this option, has its classes in the order of names"
        raise InputError("data.class_order", f"{problem}; set it to 'name'")
