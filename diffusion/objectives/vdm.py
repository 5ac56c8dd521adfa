"""Variational diffusion models: training on the variational bound, with a learned noise schedule (Kingma et al. 2021,
arXiv 2107.00630)."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import derivative, expand, flat_mean
from diffusion.core.types import Apply, Array, Batch, InputError, Network, Params, Schedule
from diffusion.objectives.base.gaussian import (
    Gaussian,
    ParameterizationSpec,
    ScheduleSpec,
    TimeSamplerSpec,
    apply_network,
    build_parts,
    corrupt,
)
from diffusion.process.decoders import level_log_likelihood


@dataclasses.dataclass(frozen=True)
class VDM(Gaussian):
    """A variational diffusion model; see `make`. The dict of networks has `net` and `gamma`, the schedule."""

    levels: int | None = None

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        key_net, key_gamma = jax.random.split(key)
        return {**super().init(network, key_net), "gamma": self.schedule.init(key_gamma)}

    def schedule_for(self, params: Mapping) -> Schedule:
        return self.schedule.at(params["gamma"])

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        key, key_decode = jax.random.split(key)
        draws = super().draw(batch, key, step, objective_state)
        return {**draws, "decode": jax.random.normal(key_decode, batch["x"].shape, batch["x"].dtype)}

    def update_state(
        self, objective_state: Mapping[str, Array], draws: Mapping[str, Array], loss: Array
    ) -> tuple[Mapping[str, Array], dict[str, Array]]:
        """Updates the time sampler's state. There are no metrics per log-SNR bin, since the schedule changes."""
        return self.time_sampler.update_state(objective_state, draws["t"], loss / draws["weight"]), {}

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the bound of each example, in nats per dimension."""
        draws = batch["draws"]
        x0, t = batch["x"], draws["t"]
        gamma = params["gamma"]
        ends, shape = {"ends": gamma["ends"]}, {name: value for name, value in gamma.items() if name != "ends"}

        def diffusion(net_params: Params, gamma_t: Array, d_gamma: Array) -> Array:
            """Returns gamma'(t) / 2 |eps - eps_hat|^2, `[B]` (eq. 17), as a function of gamma and gamma' at t."""
            schedule = _FixedGamma(gamma_t)
            x_t = corrupt(schedule, x0, draws["eps"], t)
            coefficients = self.parameterization(schedule, t)
            output = apply_network(net, net_params, x_t, coefficients, batch["cond"], key)
            error = flat_mean(jnp.square(x0 - coefficients.to_x0(output, x_t)))
            return d_gamma / 2 * jnp.exp(-gamma_t) * error

        def values(gamma: Mapping) -> tuple[Array, Array]:
            schedule = self.schedule.at(gamma)
            return schedule.gamma(t), derivative(schedule.gamma, t)

        # The network and the ends of gamma minimise the bound. The mean of the bound does not depend on gamma between
        # the ends, which minimises the variance and so receives the gradient of the square: 2 loss d loss (appendix
        # I.2).
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
            seen = x0 + expand(std, x0) * draws["decode"]
            decoded = level_log_likelihood(x0, seen, expand(expand(std, x0), seen[..., None]), self.levels)
            reconstruction = -flat_mean(decoded)
        weighted = draws["weight"] * term
        bound = weighted + prior + reconstruction
        metrics = {
            "for_state": weighted,
            "bits_per_dim": jnp.mean(bound) / math.log(2),
            "diffusion": jnp.mean(weighted),
            "prior": jnp.mean(prior),
            "reconstruction": jnp.mean(reconstruction),
            "gamma_min": schedule.gamma(zero)[0],
            "gamma_max": schedule.gamma(one)[0],
        }
        return bound, metrics


@dataclasses.dataclass(frozen=True)
class _FixedGamma:
    """The schedule at times t for which gamma is given."""

    gamma: Array

    def alpha(self, t: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(-self.gamma))

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(self.gamma))

    def log_snr(self, t: Array) -> Array:
        return -self.gamma


def make(
    schedule: ScheduleSpec = "learned",
    parameterization: ParameterizationSpec = "eps",
    time_sampler: TimeSamplerSpec = "stratified",
    levels: int | None = None,
) -> VDM:
    """Builds training on the bound in nats per dimension; the metric `bits_per_dim` is the same in bits.

    Args:
      schedule: The schedule `learned`.
      parameterization: Any parameterization that does not need a derivative of the schedule.
      time_sampler: A time sampler that is uniform on (0, 1], or that returns importance weights.
      levels: The number of values of a data channel, evenly spaced from -1 to 1; None for the density of continuous
        data.
    """
    parts = build_parts(schedule, parameterization, time_sampler, "simple", learned=True)
    checks.at_least(2, levels=levels)
    name = parameterization.get("name") if isinstance(parameterization, Mapping) else parameterization
    if name == "velocity":
        raise InputError("parameterization.name", "must not be velocity, which needs a derivative of the schedule; use "
                         "eps, x0 or v")  # fmt: skip
    return VDM(**parts, levels=levels)
