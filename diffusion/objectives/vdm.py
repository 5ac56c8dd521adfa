"""Variational diffusion models: the variational bound itself, its noise schedule learned with it (Kingma et al. 2021,
arXiv 2107.00630)."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core.arrays import derivative, expand, flat_mean
from diffusion.core.types import Apply, Array, Batch, InputError, Network, Params, Schedule
from diffusion.objectives.base.gaussian import Gaussian, PartSpec, build_parts, corrupt
from diffusion.process.decoders import level_log_likelihood


@dataclasses.dataclass(frozen=True)
class VDM(Gaussian):
    """See `make`. The dict of networks is `{"net", "gamma"}`."""

    levels: int | None = None

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        key_net, key_gamma = jax.random.split(key)
        return {**super().init(network, key_net), "gamma": self.schedule.init(key_gamma)}

    def schedule_for(self, params: Mapping) -> Schedule:
        return self.schedule.at(params["gamma"])

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        key, key_decode = jax.random.split(key)
        noise = super().draw(batch, key, step, objective_state)
        return {**noise, "decode": jax.random.normal(key_decode, batch["x"].shape, batch["x"].dtype)}

    def update_state(
        self, objective_state: Mapping[str, Array], noise: Mapping[str, Array], loss: Array
    ) -> tuple[Mapping[str, Array], dict[str, Array]]:
        return self.time_sampler.update_state(
            objective_state, noise["t"], loss
        ), {}  # bins of a schedule that moves would tell nothing

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The bound of each example, nats a dimension."""
        noise = batch["draws"]
        x0, t = batch["x"], noise["t"]
        gamma = params["gamma"]
        ends, shape = {"ends": gamma["ends"]}, {name: value for name, value in gamma.items() if name != "ends"}

        def diffusion(net_params: Params, gamma_t: Array, d_gamma: Array) -> Array:
            """gamma'(t) / 2 |eps - eps_hat|^2, `[B]` (eq. 17), as a function of gamma's values."""
            schedule = _At(gamma_t)
            x_t = corrupt(schedule, x0, noise["eps"], t)
            row = self.parameterization(schedule, t)
            output = net(net_params, expand(row.c_in, x0) * x_t, row.c_noise, batch["cond"], key=key)
            error = flat_mean(jnp.square(x0 - row.to_x0(output, x_t)))
            return d_gamma / 2 * jnp.exp(-gamma_t) * error

        def values(gamma: Mapping) -> tuple[Array, Array]:
            schedule = self.schedule.at(gamma)
            return schedule.gamma(t), derivative(schedule.gamma, t)

        # The network and the ends of gamma minimise the bound. Its mean does not depend on what is between the ends;
        # that minimises its variance, so gets the gradient of the square: 2 loss d loss (appendix I.2).
        fixed = jax.lax.stop_gradient
        between, net_params = values({**fixed(ends), **shape}), fixed(params["net"])
        term = diffusion(params["net"], *values({**ends, **fixed(shape)}))
        slopes = jax.grad(lambda pair: jnp.sum(diffusion(net_params, *pair)))(fixed(between))
        for value, slope in zip(between, slopes, strict=True):
            term += fixed(2 * term * slope) * (value - fixed(value))

        schedule = self.schedule.at({**ends, **shape})
        zero, one = jnp.zeros((1,), t.dtype), jnp.ones((1,), t.dtype)
        signal, variance = (expand(c(one) ** 2, x0) for c in (schedule.alpha, schedule.sigma))
        prior = flat_mean(variance + signal * x0**2 - 1 - jnp.log(variance)) / 2
        std = jnp.exp(schedule.gamma(zero) / 2)
        if self.levels is None:
            reconstruction = jnp.broadcast_to((jnp.log(2 * jnp.pi * std**2) + 1) / 2, t.shape)
        else:
            seen = x0 + expand(std, x0) * noise["decode"]
            decoded = level_log_likelihood(x0, seen, expand(expand(std, x0), seen[..., None]), self.levels)
            reconstruction = -flat_mean(decoded)
        bound = noise["weight"] * term + prior + reconstruction
        metrics = {
            "bits_per_dim": jnp.mean(bound) / math.log(2),
            "diffusion": jnp.mean(term),
            "prior": jnp.mean(prior),
            "reconstruction": jnp.mean(reconstruction),
            "gamma_min": schedule.gamma(zero)[0],
            "gamma_max": schedule.gamma(one)[0],
        }
        return bound, metrics


@dataclasses.dataclass(frozen=True)
class _At:
    """The schedule at times whose gamma is known."""

    gamma: Array

    def alpha(self, t: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(-self.gamma))

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(self.gamma))

    def log_snr(self, t: Array) -> Array:
        return -self.gamma


def make(
    schedule: PartSpec = "learned",
    parameterization: PartSpec = "eps",
    time_sampler: PartSpec = "stratified",
    levels: int | None = None,
) -> VDM:
    """The bound in nats a dimension; the metric `bits_per_dim` is the same in bits.

    Args:
      schedule: `learned`.
      parameterization: any that needs no derivative of the schedule.
      time_sampler: a law of t that is uniform on (0, 1], or says by how much it is not.
      levels: values that a channel of the data can take, evenly from -1 to 1; None for a density.
    """
    parts = build_parts(schedule, parameterization, time_sampler, "simple", learned=True)
    if levels is not None and levels < 2:
        raise InputError("levels", f"must be at least 2, got {levels}")
    name = parameterization if isinstance(parameterization, str) else parameterization["name"]
    if name == "velocity":
        raise InputError("parameterization.name", "velocity needs the schedule's derivative; use eps, x0 or v")
    return VDM(**parts, levels=levels)
