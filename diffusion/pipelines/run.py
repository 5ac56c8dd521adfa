"""A trained model, read from its workdir."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion.core import files, images
from diffusion.core.build import build, call
from diffusion.core.types import InputError, ModelMetric, Network, Objective, Params, SampleMetric, Spec
from diffusion.distributed import mesh as meshes
from diffusion.distributed import sharding
from diffusion.pipelines.config import cond_drop_rate, config_and_spec
from diffusion.pipelines.generator import Generator
from diffusion.pipelines.model import model_of
from diffusion.process.posterior import x0_errors
from diffusion.sampling.loop import bind
from diffusion.training import ema
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.state import trainable


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

    def drawer(
        self, *, sampler: Mapping[str, Any], guidance: Mapping[str, Any], always_guided: bool = False
    ) -> Generator:
        """Draws from this model. What has to be measured on the run's own data first, or read from another run, is."""
        if (sampler.get("name"), sampler.get("variance")) == ("ancestral", "analytic") and "x0_errors" not in sampler:
            sampler = {**sampler, "x0_errors": self._x0_errors()}
        worse = None
        if guidance.get("name") == "autoguidance":
            worse = self._worse(guidance.get("worse"))
        return Generator(
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
        averages = call(ema.make_ema, config["ema"], field="ema").names
        name = ema_name or averages[-1]
        if name not in (*averages, "none"):
            raise InputError("ema", f"the run has no average {name!r}; one of: {', '.join(averages)}, none")
        name = None if name == "none" else name
        network, objective = model_of(meta)
        mesh = meshes.make_mesh()
        shapes = jax.eval_shape(lambda: objective.init(network, jax.random.key(0)))
        place = sharding.replicated(mesh)
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
        params = checkpoints.restore_params(step, trainable(abstract, objective), name)
        return Run(meta, config, spec, step, name, objective, network, params, mesh)

    run = checkpoints.newest_valid(read)[1] if step is None else read(step)
    checkpoints.close()
    return run
