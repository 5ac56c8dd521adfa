"""From a config to its parts, and from a workdir to a trained model: what every job begins with.

A config here is a plain dict, with tuples for lists, as `ConfigDict.to_dict()` gives it and `from_json` gives it back.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion import sample
from diffusion.build import build, call, check, find
from diffusion.checkpoint import Checkpoints
from diffusion.distributed import mesh as meshes
from diffusion.distributed import sharding
from diffusion.progress import Progress
from diffusion.training import ema, optimizer
from diffusion.training.loop import CheckpointOptions, Options
from diffusion.types import Array, InputError, Network, Objective, Params, Schedule, Spec

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


def from_json(value: Any) -> Any:
    """JSON's lists back to the tuples that configs are written with."""
    if isinstance(value, Mapping):
        return {key: from_json(item) for key, item in value.items()}
    return tuple(from_json(item) for item in value) if isinstance(value, list) else value


def network_and_objective(config: Mapping[str, Any], spec: Spec) -> tuple[Network, Objective]:
    """The model of a config for data of a spec."""
    network = build("networks", config["network"], field="network", shape=spec.shape, num_classes=spec.num_classes)
    return network, build("objectives", config["objective"], field="objective")


def training(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `training.loop.train` that do not depend on the data or the model."""
    options = call(Options, config["train"], field="train")
    call(_rules, config["sharding"], field="sharding")
    return {
        "options": options,
        "optimizer": call(optimizer.make, {**config["optimizer"], "steps": options.steps}, field="optimizer"),
        "ema": call(ema.make, config["ema"], field="ema"),
        "checkpoint": call(CheckpointOptions, config["checkpoint"], field="checkpoint"),
        "mesh": call(meshes.make, config["mesh"], field="mesh"),
        "rules": config["sharding"]["rules"],
        "seed": config["seed"],
    }


def _rules(rules: tuple[tuple[str, tuple], ...] = ()) -> None:
    """The `sharding` section: see `distributed.sharding.of_state`."""


class Drawer:
    """Draws samples from a model: one compiled scan. Labels, seed, guidance's numbers and times do not recompile it.

    Args:
      sampler: the config's section: the sampler's name and keywords, `steps`, and the `grid` they lie on.
      guidance: the config's section. A scale of 1 is no guidance, and costs half as much.
      cond_drop_rate: what the model was trained with.

    Raises:
      InputError: a bad section, or a sampler or guidance that the model does not suit.
    """

    def __init__(
        self, network: Network, objective: Objective, spec: Spec, mesh: Mesh, *,
        sampler: Mapping[str, Any], guidance: Mapping[str, Any], cond_drop_rate: float,
    ):  # fmt: skip
        self.spec, self.mesh = spec, mesh
        where = {key: sampler[key] for key in ("steps", "grid") if key in sampler}
        solver = build("samplers", {key: sampler[key] for key in sampler if key not in where}, field="sampler")
        self.times = jnp.asarray(call(_grid, where, field="sampler")(objective.schedule), jnp.float32)
        guide = find("guidance", guidance.get("name", ""), field="guidance.name")
        options = {key: value for key, value in guidance.items() if key != "name"}
        check(guide, options, field="guidance", later=("denoise",))
        self.numbers = {key: jnp.float32(value) for key, value in options.items() if isinstance(value, (int, float))}
        guided = options.get("scale", 1.0) != 1.0
        if guided and not spec.num_classes:
            raise InputError("guidance.scale", "the data has no classes to guide by; use 1")
        if guided and not cond_drop_rate:
            raise InputError("guidance.scale", "the model was trained with train.cond_drop_rate = 0; use 1, or train "
                             "it with a rate above 0")  # fmt: skip

        def draw(params: Params, keys: Array, cond: Mapping[str, Array], times: Array, numbers: Mapping) -> Array:
            denoise = objective.denoiser(network.apply, params)
            if guided:
                denoise = guide(denoise, **numbers)
            schedule = objective.schedule_for(params)
            x = sample.prior(schedule, times[0], keys, spec.shape)
            return sample.sample(sample.bind(denoise, cond), schedule, solver, x, times, keys)

        # Trace it once without computing anything, so that what the model cannot do is refused here.
        shapes = jax.eval_shape(lambda: objective.init(network, jax.random.key(0)))
        cond = {"label": jnp.zeros(1, jnp.int32)} if spec.num_classes else {}
        jax.eval_shape(draw, shapes, jax.random.split(jax.random.key(0), 1), cond, self.times, self.numbers)
        self._draw = jax.jit(draw)

    def __call__(
        self, params: Params, labels: Sequence[int] | None, num: int, *, seed: int, batch_size: int = 250,
        title: str | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Draws `num` samples, float32 `[num, ...]`.

        Args:
          labels: `[num]`, or None where the data has no classes.
          seed: sample i depends on this and i alone.
          batch_size: samples at a time, rounded up to a multiple of the mesh's data x fsdp.
          title: of the progress line; None for none.
        """
        shards = sharding.batch_shards(self.mesh)
        batch_size = -(-min(batch_size, num) // shards) * shards
        place = sharding.by_example(self.mesh)

        def draw(keys: Array, cond: Mapping[str, np.ndarray]) -> Array:
            keys, cond = jax.device_put((keys, cond), place)
            return self._draw(params, keys, cond, self.times, self.numbers)

        cond = {} if labels is None else {"label": np.asarray(labels, np.int32)}
        progress = Progress(title, num) if title else None
        drawn = []
        for x in sample.in_batches(draw, cond, num, batch_size, jax.random.key(seed)):
            drawn.append(x)
            if progress:
                progress.update(sum(map(len, drawn)))
        if progress:
            progress.close()
        return np.concatenate(drawn)


def _grid(steps: int, grid: str | Mapping[str, Any] = "trailing") -> Callable[[Schedule], np.ndarray]:
    """The `sampler` section's own keywords; all others are the sampler's."""
    if steps < 1:
        raise InputError("steps", f"must be at least 1, got {steps}")
    options = {"name": grid} if isinstance(grid, str) else dict(grid)
    make = find("grids", options.pop("name", ""), field="grid")
    check(make, options, field="grid", later=("schedule", "steps"))

    def times(schedule: Schedule) -> np.ndarray:
        try:
            return make(schedule, steps, **options)
        except InputError as error:
            raise error.within("sampler.grid") from None

    return times


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, read from its workdir alone."""

    config: Mapping[str, Any]
    spec: Spec
    step: int
    ema: str | None
    objective: Objective
    network: Network
    params: Params
    drawer: Callable[..., Drawer]  # drawer(sampler=..., guidance=...)


def open_run(workdir: str, ema_name: str | None = None) -> Run:
    """Reads the newest checkpoint of a workdir onto all devices.

    Args:
      ema_name: which average to read; the config's last if None, the raw parameters if "none".
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.latest()
    if step is None:
        there = "holds no checkpoint" if os.path.isdir(workdir) else "does not exist"
        raise InputError("workdir", f"{workdir} {there}; train one: python -m experiments.train --workdir={workdir}")
    meta = checkpoints.meta(step)
    config, spec = from_json(meta["config"]), Spec(**from_json(meta["spec"]))
    averages = call(ema.make, config["ema"], field="ema").names
    ema_name = ema_name or averages[-1]
    if ema_name not in (*averages, "none"):
        raise InputError("ema", f"the run has no average {ema_name!r}; one of: {', '.join(averages)}, none")
    ema_name = None if ema_name == "none" else ema_name
    network, objective = network_and_objective(config, spec)

    mesh = meshes.make()
    shapes = jax.eval_shape(lambda: objective.init(network, jax.random.key(0)))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                                              sharding=sharding.replicated(mesh)), shapes)  # fmt: skip
    fixed = {name: net for name, net in abstract.items() if name in objective.frozen}
    learned = {name: net for name, net in abstract.items() if name not in objective.frozen}
    params = checkpoints.restore_params(step, learned, fixed, ema_name)
    checkpoints.close()

    def drawer(*, sampler: Mapping[str, Any], guidance: Mapping[str, Any]) -> Drawer:
        rate = config["train"].get("cond_drop_rate", Options.cond_drop_rate)
        return Drawer(network, objective, spec, mesh, sampler=sampler, guidance=guidance, cond_drop_rate=rate)

    return Run(config, spec, step, ema_name, objective, network, params, drawer)
