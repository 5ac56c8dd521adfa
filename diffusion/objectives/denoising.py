"""Denoising diffusion: regression of F at a random time (Ho et al. 2020, arXiv 2006.11239).

Its parts make it DDPM, v-prediction (Salimans & Ho 2022, arXiv 2202.00512), EDM (Karras et al. 2022, arXiv 2206.00364)
or score matching in continuous time (Song et al. 2021, arXiv 2011.13456). The reverse variance can be learned as in
improved DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672).
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import expand, flat_mean, per_example
from diffusion.core.types import Apply, Array, Batch, Cond, Denoised, Denoiser, InputError
from diffusion.objectives.base.gaussian import (
    Gaussian,
    ParameterizationSpec,
    ScheduleSpec,
    TimeSamplerSpec,
    WeightingSpec,
    apply_network,
    build_parts,
)
from diffusion.process.decoders import discretized_log_likelihood
from diffusion.process.posterior import posterior


@dataclasses.dataclass(frozen=True)
class Denoising(Gaussian):
    """Denoising diffusion; see `make`.

    With a learned variance, the network's second output, in [-1, 1], interpolates the log-variance of the reverse step
    between its two bounds; see `Posterior.log_variance`.
    """

    learned_variance: bool = False
    bound_weight: float = 0.001
    levels: int = 256

    @property
    def outputs(self) -> int:
        return 2 if self.learned_variance else 1

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        if not self.learned_variance:
            return super().loss(net, params, ema_params, batch, key, step)
        output, x_t, coefficients = self.forward(net, params["net"], batch, key)
        mean, variance = jnp.split(output, 2, axis=-1)
        loss = self.weighted_error(mean, batch, coefficients, params)
        x0_hat = jax.lax.stop_gradient(coefficients.to_x0(mean, x_t))
        loss += self.variance_loss(variance, x0_hat, batch["x"], batch["draws"]["t"])
        return batch["draws"]["weight"] * loss, {}

    def variance_loss(self, variance: Array, x0_hat: Array, x0: Array, t: Array) -> Array:
        """Returns the loss `[B]` that trains the variance alone (Nichol & Dhariwal 2021, eq. 16).

        It is `bound_weight` times T times the term of the variational bound at t, in bits per dimension.

        Args:
          variance: The second output of the network, `[B, ...]`.
          x0_hat: The estimate of x0, without a gradient.
        """
        num_steps = self.schedule.num_steps
        # beta-tilde of the last step is 0. As is common practice, replace it by that of the step before.
        first = t < 1.5 / num_steps
        s = jnp.where(first, 0.0, t - 1 / num_steps)
        reverse = posterior(self.schedule, t, s)
        floor = posterior(self.schedule, jnp.float32(min(2 / num_steps, 1)), jnp.float32(1 / num_steps))
        beta_tilde = jnp.where(first, floor.beta_tilde, reverse.beta_tilde)
        clipped = dataclasses.replace(reverse, beta=expand(reverse.beta, x0), beta_tilde=expand(beta_tilde, x0))
        log_variance = clipped.log_variance((variance + 1) / 2)
        shift = expand(reverse.from_x0, x0) * (x0 - x0_hat)
        log_ratio = jnp.log(clipped.beta_tilde) - log_variance
        divergence = (jnp.exp(log_ratio) - 1 - log_ratio + shift**2 * jnp.exp(-log_variance)) / 2
        decoder = -discretized_log_likelihood(x0, x0_hat, jnp.exp(log_variance / 2), self.levels)
        bits = flat_mean(jnp.where(expand(first, x0), decoder, divergence)) / math.log(2)
        return self.bound_weight * num_steps * bits

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        if not self.learned_variance:
            return super().denoiser(net, params)

        def denoise(x: Array, t: Array, cond: Cond) -> Denoised:
            coefficients = self.parameterization(self.schedule, per_example(t, x))
            output = apply_network(net, params["net"], x, coefficients, cond)
            mean, variance = jnp.split(output, 2, axis=-1)
            return Denoised(coefficients.to_x0(mean, x), (variance + 1) / 2)

        return denoise


def make(
    schedule: ScheduleSpec = "vp",
    parameterization: ParameterizationSpec = "eps",
    time_sampler: TimeSamplerSpec = "uniform",
    weighting: WeightingSpec = "simple",
    learned_variance: bool = False,
    bound_weight: float = 0.001,
    levels: int = 256,
    learned_weight: bool = False,
    offset_noise: float = 0.0,
    pyramid_noise: float = 0.0,
    input_perturbation: float = 0.0,
    self_conditioning: bool = False,
) -> Denoising:
    """Builds denoising diffusion from the specs of its parts, each a name or `{"name": ..., **keywords}`.

    Args:
      schedule: Any schedule that is not learned.
      parameterization: Any parameterization that is defined on the schedule.
      time_sampler: Any time sampler; `discrete` is DDPM's chain, the others are continuous.
      weighting: Any weighting.
      learned_variance: Whether the network's second output is the variance of the reverse step, trained on the
        variational bound, for `ancestral(variance="learned")`. Requires a schedule with a table of steps and a network
        with `outputs = 2`.
      bound_weight: The weight of that bound, for each of the T steps.
      levels: The number of values of a data channel, for the last step of the bound.
      learned_weight: Whether a weight of each noise level is learned in addition to the weighting, as EDM2 does; see
        `base.uncertainty`.
      offset_noise: The strength of noise that all pixels share, such as 0.1, for images and videos; see `base.noise`.
      pyramid_noise: The discount per level of noise at lower resolutions, such as 0.8; see `base.noise`.
      input_perturbation: The scale of noise on the network's input that the target does not contain, such as 0.1, which
        imitates the errors of sampling (Ning et al. 2023, arXiv 2301.11706).
      self_conditioning: Whether the network reads its own earlier estimate of x0 (Chen et al. 2022, arXiv 2208.04202),
        at the cost of one more forward pass in training. Requires `network.self_conditioning`.
    """
    parts = build_parts(schedule, parameterization, time_sampler, weighting)
    if learned_variance and not hasattr(parts["schedule"], "num_steps"):
        raise InputError("learned_variance", "must be False for a schedule without a table of steps; or use vp")
    if learned_variance and parts["schedule"].num_steps < 2:
        raise InputError("learned_variance", "must be False for a schedule of a single step; or increase num_steps")
    checks.positive(bound_weight=bound_weight)
    checks.at_least(2, levels=levels)
    return Denoising(
        **parts, learned_variance=learned_variance, bound_weight=bound_weight, levels=levels,
        learned_weight=learned_weight, offset_noise=offset_noise, pyramid_noise=pyramid_noise,
        input_perturbation=input_perturbation, self_conditioning=self_conditioning,
    )  # fmt: skip
