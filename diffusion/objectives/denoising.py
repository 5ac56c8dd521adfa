"""Denoising diffusion: regress F at a random time (Ho et al. 2020, arXiv 2006.11239), with the learned variance of
improved DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672)."""

import dataclasses
import math

import jax.numpy as jnp

from diffusion.core.arrays import expand, flat_mean
from diffusion.core.types import Array, InputError
from diffusion.objectives.base.gaussian import Gaussian, PartSpec, build_parts
from diffusion.process.decoders import discretized_log_likelihood
from diffusion.process.posterior import posterior


@dataclasses.dataclass(frozen=True)
class DDPM(Gaussian):
    """See `make`."""

    learned_variance: bool = False
    bound_weight: float = 0.001
    levels: int = 256

    @property
    def outputs(self) -> int:
        return 2 if self.learned_variance else 1

    def second_loss(self, second: Array, x0_hat: Array, x0: Array, x_t: Array, t: Array) -> Array:
        """The term of the variational bound at t, which trains the variance alone: `bound_weight` times T times it, in
        bits a dimension (Nichol & Dhariwal 2021, eq. 16)."""
        num_steps = self.schedule.num_steps
        # The last step's beta-tilde is 0: take the one before for it, as everybody does.
        first = t < 1.5 / num_steps
        s = jnp.where(first, 0.0, t - 1 / num_steps)
        reverse = posterior(self.schedule, t, s)
        floor = posterior(self.schedule, jnp.float32(min(2 / num_steps, 1)), jnp.float32(1 / num_steps))
        clipped = dataclasses.replace(reverse, beta_tilde=jnp.where(first, floor.beta_tilde, reverse.beta_tilde))
        clipped = dataclasses.replace(clipped, beta=expand(clipped.beta, x0), beta_tilde=expand(clipped.beta_tilde, x0))
        log_variance = clipped.log_variance((second + 1) / 2)
        shift = expand(reverse.from_x0, x0) * (x0 - x0_hat)
        log_ratio = jnp.log(clipped.beta_tilde) - log_variance
        divergence = (jnp.exp(log_ratio) - 1 - log_ratio + shift**2 * jnp.exp(-log_variance)) / 2
        decoder = -discretized_log_likelihood(x0, x0_hat, jnp.exp(log_variance / 2), self.levels)
        bits = flat_mean(jnp.where(expand(first, x0), decoder, divergence)) / math.log(2)
        return self.bound_weight * num_steps * bits


def make(
    schedule: PartSpec = "vp",
    parameterization: PartSpec = "eps",
    time_sampler: PartSpec = "uniform",
    weighting: PartSpec = "simple",
    learned_variance: bool = False,
    bound_weight: float = 0.001,
    levels: int = 256,
) -> DDPM:
    """DDPM from the specs of its parts, each a name or `{"name": ..., **keywords}`.

    Args:
      schedule, parameterization, time_sampler, weighting: any; `time_sampler="discrete"` is the paper's chain, others are continuous.
      learned_variance: the network's second output is the reverse step's variance, for `ancestral(variance="learned")`,
        trained on the variational bound. Needs a schedule with a table and a network with `outputs = 2`.
      bound_weight: of that bound, for each of the T steps.
      levels: values that a channel of the data can take, for the bound's last step.
    """
    parts = build_parts(schedule, parameterization, time_sampler, weighting)
    if learned_variance and not hasattr(parts["schedule"], "num_steps"):
        raise InputError("learned_variance", "needs a schedule with a table of steps (vp)")
    if learned_variance and parts["schedule"].num_steps < 2:
        raise InputError("learned_variance", "needs a schedule of 2 steps or more")
    if bound_weight <= 0:
        raise InputError("bound_weight", f"must be positive, got {bound_weight}")
    if levels < 2:
        raise InputError("levels", f"must be at least 2, got {levels}")
    return DDPM(**parts, learned_variance=learned_variance, bound_weight=bound_weight, levels=levels)
