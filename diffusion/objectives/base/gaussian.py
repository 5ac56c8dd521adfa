"""What all objectives with Gaussian corruption share: x_t = alpha x0 + sigma eps, and a network trained on an affine
combination of x0 and eps. DDPM and flow matching are its schedules, parameterizations, laws of t and weightings."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand, flat_mean
from diffusion.core.build import build
from diffusion.core.types import Apply, Array, Batch, Denoised, Denoiser, InputError, Network, Params, Schedule
from diffusion.process.parameterization import Parameterization
from diffusion.process.time_sampling import TimeSampler
from diffusion.process.weighting import Weighting

PartSpec = str | Mapping[str, Any]  # a part's name, or {"name": ..., **keywords}
LOG_SNR_EDGES = (-4, -2, 0, 2, 4)  # the loss is logged between each two


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """E over t, eps of w(t) mean (F - target)^2; an `Objective`."""

    schedule: Schedule
    parameterization: Parameterization
    time_sampler: TimeSampler
    weighting: Weighting
    frozen: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Values for each channel that the network has to give."""
        return 1

    @property
    def scalar_conditions(self) -> tuple[str, ...]:
        """The numbers that the network has to take beside the noise label (`Network.conditions`)."""
        return ()

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        if network.outputs != self.outputs:
            raise InputError("network.outputs", f"is {network.outputs}, but the objective needs {self.outputs}")
        for name in self.scalar_conditions:
            if name not in network.scalar_conditions:
                all_of_them = tuple(dict.fromkeys((*network.scalar_conditions, *self.scalar_conditions)))
                raise InputError("network.conditions", f"lacks {name!r}, which the objective tells it; "
                                 f"set network.conditions = {all_of_them}")  # fmt: skip
        return {"net": network.init(key)}

    def schedule_for(self, params: Mapping) -> Schedule:
        return self.schedule

    def initial_state(self) -> Mapping[str, Array]:
        return self.time_sampler.initial_state()

    def before_step(
        self,
        params: Mapping,
        ema_params: Mapping,
        batch: Batch,
        objective_state: Mapping[str, Array],
        key: Array,
        step: Array,
    ) -> tuple[dict[str, Params], Mapping[str, Array]]:
        return dict(params), objective_state

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """`t [B]`, the factor `weight [B]` that makes up for its law, and `eps [B, ...]`."""
        key_t, key_eps = jax.random.split(key)
        t, weight = self.time_sampler.draw(self.schedule, key_t, batch["x"].shape[0], objective_state)
        return {"t": t, "weight": weight, "eps": jax.random.normal(key_eps, batch["x"].shape, batch["x"].dtype)}

    def update_state(
        self, objective_state: Mapping[str, Array], noise: Mapping[str, Array], loss: Array
    ) -> tuple[Mapping[str, Array], dict[str, Array]]:
        """The law's memory; the mean loss between each two of LOG_SNR_EDGES, NaN where there is no example."""
        t, loss = noise["t"], loss / noise["weight"]
        edges = np.array([-np.inf, *LOG_SNR_EDGES, np.inf])
        bins = jnp.digitize(self.schedule.log_snr(t), edges[1:-1])
        metrics = {
            f"loss_log_snr_{low:g}_{high:g}": jnp.mean(loss, where=bins == index)
            for index, (low, high) in enumerate(itertools.pairwise(edges))
        }
        return self.time_sampler.update_state(objective_state, t, loss), metrics

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        noise = batch["draws"]
        x0, t, eps = batch["x"], noise["t"], noise["eps"]
        x_t = corrupt(self.schedule, x0, eps, t)
        row = self.parameterization(self.schedule, t)
        output = net(params["net"], expand(row.c_in, x0) * x_t, row.c_noise, batch["cond"], key=key)
        output, second = jnp.split(output, self.outputs, axis=-1) if self.outputs == 2 else (output, None)
        error = flat_mean(jnp.square(output - row.target(x0, eps)))
        loss = self.weighting(self.schedule, row, t) * error
        if second is not None:
            loss += self.second_loss(second, jax.lax.stop_gradient(row.to_x0(output, x_t)), x0, x_t, t)
        return noise["weight"] * loss, {}

    def second_loss(self, second: Array, x0_hat: Array, x0: Array, x_t: Array, t: Array) -> Array:
        """The loss `[B]` of the network's second head."""
        raise AssertionError("an objective with two outputs says what the second is for")

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        schedule = self.schedule_for(params)

        def denoise(x: Array, t: Array, cond: Mapping[str, Array]) -> Denoised:
            t = jnp.broadcast_to(t, x.shape[:1])
            row = self.parameterization(schedule, t)
            output = net(params["net"], expand(row.c_in, x) * x, row.c_noise, cond)
            if self.outputs == 1:
                return Denoised(row.to_x0(output, x))
            output, second = jnp.split(output, 2, axis=-1)
            return Denoised(row.to_x0(output, x), (second + 1) / 2)

        return denoise


def build_parts(
    schedule: PartSpec,
    parameterization: PartSpec,
    time_sampler: PartSpec,
    weighting: PartSpec,
    *,
    learned: bool = False,
) -> dict[str, Any]:
    """The parts of a `Gaussian` from their specs, held against one another.

    Args:
      learned: whether the objective trains its schedule.

    Raises:
      InputError: the parameterization does not exist on the schedule, or the law of t has nothing to go by.
    """
    parts = {
        "schedule": build("schedules", schedule, field="schedule"),
        "parameterization": build("parameterization", parameterization, field="parameterization"),
        "time_sampler": build("time_sampling", time_sampler, field="time_sampler"),
        "weighting": build("weighting", weighting, field="weighting"),
    }
    if learned != hasattr(parts["schedule"], "at"):
        problem = "the objective learns its schedule; use learned" if learned else "only vdm can train this schedule"
        raise InputError("schedule.name", problem)
    start = parts["parameterization"](parts["schedule"], jnp.float32(1))
    for name, value in vars(start).items():
        if not np.isfinite(value):
            raise InputError(
                "parameterization",
                f"{parameterization!r} does not exist at t = 1 of schedule {schedule!r}: {name} is {value}; "
                + ("use c_noise = 'time'" if name == "c_noise" else "use v, x0 or velocity there"),
            )
    jax.eval_shape(
        lambda key: parts["time_sampler"].draw(parts["schedule"], key, 1, parts["time_sampler"].initial_state()),
        jax.random.key(0),
    )
    return parts


def corrupt(schedule: Schedule, x0: Array, eps: Array, t: Array) -> Array:
    """x_t, `[B, ...]`, at t `[B]`."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps
