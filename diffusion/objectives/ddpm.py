"""Denoising diffusion: regress F at a random time (Ho et al. 2020, arXiv 2006.11239)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.arrays import expand
from diffusion.build import build
from diffusion.parameterization import Parameterization
from diffusion.times import Times
from diffusion.types import Apply, Array, Batch, Denoised, Denoiser, Network, Params, Schedule
from diffusion.weighting import Weighting


@dataclasses.dataclass(frozen=True)
class DDPM:
    """E over t, eps of w(t) mean (F - target)^2. See `make` for the parts."""

    schedule: Schedule
    parameterization: Parameterization
    times: Times
    weighting: Weighting
    frozen: tuple[str, ...] = ()

    def init(self, network: Network, key: Array) -> dict[str, Params]:
        return {"net": network.init(key)}

    def draw(self, batch: Batch, key: Array, step: Array) -> Mapping[str, Array]:
        x0 = batch["x"]
        key_t, key_eps = jax.random.split(key)
        return {
            "t": self.times(self.schedule, key_t, x0.shape[0]),
            "eps": jax.random.normal(key_eps, x0.shape, x0.dtype),
        }

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        noise = batch["noise"] if "noise" in batch else self.draw(batch, key, step)
        x0, t, eps = batch["x"], noise["t"], noise["eps"]
        x_t = expand(self.schedule.alpha(t), x0) * x0 + expand(self.schedule.sigma(t), x0) * eps
        row = self.parameterization(self.schedule, t)
        output = net(params["net"], expand(row.c_in, x0) * x_t, row.c_noise, batch["cond"], key=key)
        target = expand(row.a, x0) * x0 + expand(row.b, x0) * eps
        error = jnp.mean(jnp.square(output - target), axis=tuple(range(1, x0.ndim)))
        return self.weighting(self.schedule, row, t) * error, {}

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        def denoise(x: Array, t: Array, cond: Mapping[str, Array]) -> Denoised:
            t = jnp.broadcast_to(t, x.shape[:1])
            row = self.parameterization(self.schedule, t)
            output = net(params["net"], expand(row.c_in, x) * x, row.c_noise, cond)
            return Denoised(expand(row.c_skip, x) * x + expand(row.c_out, x) * output)

        return denoise


def make(
    schedule: str | Mapping[str, Any] = "vp",
    parameterization: str | Mapping[str, Any] = "eps",
    times: str | Mapping[str, Any] = "uniform",
    weighting: str | Mapping[str, Any] = "simple",
) -> DDPM:
    """DDPM from the specs of its parts, each a name or `{"name": ..., **keywords}`."""
    return DDPM(
        schedule=build("schedules", schedule, field="schedule"),
        parameterization=build("parameterization", parameterization, field="parameterization"),
        times=build("times", times, field="times"),
        weighting=build("weighting", weighting, field="weighting"),
    )
