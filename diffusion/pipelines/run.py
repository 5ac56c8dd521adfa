"""From a config to its parts, and from a workdir to a trained model: what every job begins with.

A config here is a plain dict, with tuples for lists, as `ConfigDict.to_dict()` gives it and `from_json` gives it back.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion.core import files, images
from diffusion.core.checks import at_most
from diffusion.core.build import build, call, check, find
from diffusion.training.checkpoint import Checkpoints
from diffusion.objectives.base.teacher import Teacher
from diffusion.distributed import mesh as meshes
from diffusion.distributed import sharding
from diffusion.process.posterior import x0_errors
from diffusion.sampling.loop import bind
from diffusion.training import ema, optimizer
from diffusion.training import program as programs
from diffusion.training.resilience.guards import Guard
from diffusion.training.trainer import CheckpointOptions, Options
from diffusion.training.program import Program
from diffusion.training.state import trainable
from diffusion.core.types import InputError, ModelMetric, Network, Objective, Params, SampleMetric, Spec
from diffusion.pipelines.generator import MOST_SAMPLES, Drawer

SECTIONS = ("seed", "data", "objective", "network", "optimizer", "ema", "train", "checkpoint", "sampler", "guidance",
            "eval", "mesh", "sharding")  # fmt: skip


def check_sections(config: Mapping[str, Any]) -> None:
    """A config has exactly the sections there are: one that nothing reads would be a wish not granted."""
    for name in config:
        if name not in SECTIONS:
            raise InputError(f"config.{name}", f"no such section; one of: {', '.join(SECTIONS)}")
    for name in SECTIONS:
        if name not in config:
            raise InputError(f"config.{name}", "is missing")
        if not isinstance(config[name], int if name == "seed" else Mapping):
            raise InputError(f"config.{name}", f"must be {'an integer' if name == 'seed' else 'a section'}")
    if not 0 <= config["seed"] < 2**32:
        raise InputError("config.seed", f"must be from 0 to 2^32 - 1, got {config['seed']}")
    section = call(_eval, config["eval"], field="eval")
    for name, options in section["metrics"].items():
        field = f"eval.metrics.{name}"
        metric = find("evaluation", name, field="eval.metrics")
        if not isinstance(options, Mapping):
            raise InputError(field, f"must be a section, as {{'num': 1000}}, got {options!r}")
        check(metric, options, field=field, later=("train", "held_out"))
        at_most(MOST_SAMPLES, options.get("num", 0), f"{field}.num")


def _eval(data: Mapping[str, Any], metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `eval` section: held-out `data`, and the keywords of each metric by its name."""
    return {"data": data, "metrics": metrics}


def from_json(value: Any) -> Any:
    """JSON's lists back to the tuples that configs are written with."""
    if isinstance(value, Mapping):
        return {key: from_json(item) for key, item in value.items()}
    return tuple(from_json(item) for item in value) if isinstance(value, list) else value


def network_and_objective(
    config: Mapping[str, Any], spec: Spec, teacher: Teacher | None = None
) -> tuple[Network, Objective]:
    """The model of a config for data of a spec; `teacher` stands for the workdir that the objective names one by."""
    network = build("networks", config["network"], field="network", shape=spec.shape, num_classes=spec.num_classes)
    objective = {**config["objective"], "teacher": teacher} if teacher else config["objective"]
    return network, build("objectives", objective, field="objective")


def model_of(meta: Mapping[str, Any]) -> tuple[Network, Objective]:
    """The model that a checkpoint's `meta` describes, its teacher and the teacher's own included."""
    return network_and_objective(*config_and_spec(meta), teacher_of(meta))


def teacher_of(meta: Mapping[str, Any]) -> Teacher | None:
    """The teacher of the model that a checkpoint's `meta` describes."""
    if "teacher" not in meta:
        return None
    theirs = meta["teacher"]
    config, spec = config_and_spec(theirs)
    return Teacher(*model_of(theirs), spec, cond_drop_rate(config))


def config_and_spec(meta: Any) -> tuple[dict[str, Any], Spec]:
    """The config that a checkpoint's `meta` holds, and what its data are. Raises InputError if it is no such thing."""
    if not isinstance(meta, Mapping) or not {"config", "spec"} <= meta.keys():
        raise InputError("workdir", "its checkpoint does not say what was trained; train anew in another workdir")
    config, spec = from_json(meta["config"]), from_json(meta["spec"])
    for name, section in (("config", config), ("spec", spec)):
        if not isinstance(section, Mapping):
            raise InputError(name, f"must be a section, got {section!r}")
    check_sections(config)
    found = call(Spec, spec, field="spec")
    if not found.shape or min(found.shape) < 1 or found.num_classes < 0:
        raise InputError("spec", f"describes no data: {found}")
    at_most(10**8, math.prod(found.shape), "spec.shape")
    at_most(10**7, found.num_classes, "spec.num_classes")
    return config, found


def cond_drop_rate(config: Mapping[str, Any]) -> float:
    """The share of examples that a model was trained on without their condition."""
    return call(Options, config["train"], field="train").cond_drop_rate


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
    latest, stored, _ = begun.newest_sound(begun.meta)
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
        "optimizer": call(optimizer.make, {**config["optimizer"], "steps": options.steps}, field="optimizer"),
        "ema": call(ema.make, config["ema"], field="ema"),
        "checkpoint": call(CheckpointOptions, config["checkpoint"], field="checkpoint"),
        "mesh": call(meshes.make, {"devices": devices, **config["mesh"]}, field="mesh"),
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
    return programs.make(
        network=network, objective=objective, teacher=teacher, batch_size=options.batch_size,
        cond_drop_rate=options.cond_drop_rate, accumulate=options.accumulate, guard=Guard(options.spike), **keywords,
    )  # fmt: skip


def _sharding(rules: tuple[sharding.Rule, ...] = (), sequence: Literal["model"] | None = None) -> dict[str, Any]:
    """The `sharding` section: see `training.program.make`."""
    return {"rules": rules, "sequence": sequence}


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, read from its workdir alone; `meta` is its checkpoint's."""

    meta: Mapping[str, Any]
    config: Mapping[str, Any]
    spec: Spec
    step: int
    ema: str | None
    objective: Objective
    network: Network
    params: Params
    mesh: Mesh

    def drawer(self, *, sampler: Mapping[str, Any], guidance: Mapping[str, Any], always_guided: bool = False) -> Drawer:
        """Draws from this model. What has to be measured on the run's own data first, or read from another run, is."""
        if (sampler.get("name"), sampler.get("variance")) == ("ancestral", "analytic") and "x0_errors" not in sampler:
            sampler = {**sampler, "x0_errors": self._x0_errors()}
        worse = None
        if guidance.get("name") == "autoguidance":
            worse = self._worse(guidance.get("worse"))
        return Drawer(
            self.network, self.objective, self.spec, self.mesh, sampler=sampler, guidance=guidance, worse=worse,
            cond_drop_rate=cond_drop_rate(self.config),
            always_guided=always_guided,
        )  # fmt: skip

    def metrics(self) -> list[SampleMetric | ModelMetric]:
        """The metrics of the config's `eval` section."""
        section = self.config["eval"]
        real = {
            "train": build("data", self.config["data"], field="data"),
            "held_out": build("data", section["data"], field="eval.data"),
        }
        return [
            build("evaluation", {"name": name, **options}, field=f"eval.metrics.{name}", **real)
            for name, options in section["metrics"].items()
        ]

    def measured(self, metric: SampleMetric, x: np.ndarray, labels: np.ndarray | None) -> Mapping[str, float]:
        """A metric of samples; images as a viewer gets them, rounded to 8 bits."""
        if self.spec.is_image:
            x = images.from_uint8(images.to_uint8(x))
        return metric(x, labels)

    def _worse(self, where: Any) -> tuple[Network, Objective, Params]:
        if not isinstance(where, Mapping):
            raise InputError(
                "guidance.worse", "is missing: the other model, as {'workdir': ..., 'ema': ..., 'step': ...}"
            )
        keywords = {("ema_name" if key == "ema" else key): value for key, value in where.items()}
        run = call(open_run, keywords, field="guidance.worse")
        if run.spec != self.spec:
            raise InputError("guidance.worse.workdir", f"was trained on data of another kind: {run.spec}")
        return run.network, run.objective, run.params

    def _x0_errors(self, num: int = 512, points: int = 50) -> tuple[tuple[float, float], ...]:
        """What the analytic variance goes by, measured on the first examples of the run's data."""
        source = build("data", self.config["data"], field="data")
        examples = [source[index] for index in range(min(num, len(source)))]
        x0 = jnp.stack([example["x"] for example in examples])
        cond = {name: jnp.stack([example["cond"][name] for example in examples]) for name in examples[0]["cond"]}
        denoise = bind(self.objective.denoiser(self.network.apply, self.params), cond)
        times = jnp.arange(1, points + 1) / points
        return x0_errors(denoise, self.objective.schedule_for(self.params), x0, times, jax.random.key(0))


def open_run(workdir: str, ema_name: str | None = None, step: int | None = None) -> Run:
    """Reads a checkpoint of a workdir onto all devices.

    Args:
      ema_name: which average to read; the config's last if None, the raw parameters if "none".
      step: of which step; the newest if None.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    there = checkpoints.steps()
    if not there:
        problem = "holds no checkpoint" if files.is_folder(workdir, "workdir") else "does not exist"
        raise InputError("workdir", f"{workdir} {problem}; train one: python -m experiments.train --workdir={workdir}")
    if step is not None and step not in there:
        raise InputError(
            "step", f"{workdir} holds no checkpoint of step {step}; there are: {', '.join(map(str, there))}"
        )

    def read(step: int) -> Run:
        meta = checkpoints.meta(step)
        config, spec = config_and_spec(meta)
        averages = call(ema.make, config["ema"], field="ema").names
        name = ema_name or averages[-1]
        if name not in (*averages, "none"):
            raise InputError("ema", f"the run has no average {name!r}; one of: {', '.join(averages)}, none")
        name = None if name == "none" else name
        network, objective = model_of(meta)
        mesh = meshes.make()
        shapes = jax.eval_shape(lambda: objective.init(network, jax.random.key(0)))
        place = sharding.replicated(mesh)
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
        params = checkpoints.restore_params(step, trainable(abstract, objective), name)
        return Run(meta, config, spec, step, name, objective, network, params, mesh)

    run = checkpoints.newest_sound(read)[1] if step is None else read(step)
    checkpoints.close()
    return run
