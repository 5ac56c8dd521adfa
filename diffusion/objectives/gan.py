"""Generative adversarial training (Goodfellow et al. 2014, arXiv 1406.2661) of a one-step generator.

    critic      minimises  softplus(-D(x)) + softplus(D(G(z))) + r1 / 2 |grad_x D(x)|^2,   x data, z noise
    generator   minimises  softplus(-D(G(z)))

At its optimum without the penalty the critic is the log-ratio of the two distributions, D = log p_data - log p_G.

The generator is the model's prediction of x0 from pure noise, at t = 1, so it can start from a diffusion model
(`init_from`). The critic has the architecture of the network; D is the mean of its output.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import flat_mean
from diffusion.core.types import Apply, Array, Batch, Cond, Denoiser, Network, Params, Player
from diffusion.objectives.base.gaussian import ParameterizationSpec, Predictor, ScheduleSpec, apply_network, build_path

SAMPLER = {"name": "consistency", "sigma_min": 0.0, "steps": 1}  # of a config without a sampler


@dataclasses.dataclass(frozen=True)
class GAN(Predictor):
    """A generative adversarial network; see `make`. The dict of networks has `net`, the generator, and `critic`."""

    players: Mapping[str, Player]
    r1: float

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        key_net, key_critic = jax.random.split(key)
        return {**super().init(network, key_net), "critic": network.init(key_critic)}

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """Draws `eps [B, ...]`."""
        return {"eps": jax.random.normal(key, batch["x"].shape, batch["x"].dtype)}

    def update_state(
        self, objective_state: Mapping[str, Array], draws: Mapping[str, Array], loss: Array
    ) -> tuple[Mapping[str, Array], dict[str, Array]]:
        return objective_state, {}

    def generate(self, net: Apply, params: Params, z: Array, cond: Cond, key: Array | None = None) -> Array:
        """Returns samples `[B, ...]` from x_1 = z `[B, ...]`."""
        coefficients = self.parameterization(self.schedule, jnp.ones(z.shape[:1]))
        return coefficients.to_x0(apply_network(net, params, z, coefficients, cond, key), z)

    def critic(self, net: Apply, params: Params, x: Array, cond: Cond, key: Array | None = None) -> Array:
        """Returns D(x), `[B]`, positive where x looks like data."""
        return flat_mean(net(params, x, jnp.zeros(x.shape[:1]), cond, key=key))

    def losses(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        x, cond = batch["x"], batch["cond"]
        noise = self.schedule.sigma(jnp.float32(1)) * batch["draws"]["eps"]
        fake = self.generate(net, params["net"], noise, cond, key)
        real_logit, fake_logit = (self.critic(net, params["critic"], images, cond, key) for images in (x, fake))
        critic = jax.nn.softplus(-real_logit) + jax.nn.softplus(fake_logit)
        metrics = {"real_logit": jnp.mean(real_logit), "fake_logit": jnp.mean(fake_logit)}
        if self.r1:
            slope = jax.grad(lambda x: jnp.sum(self.critic(net, params["critic"], x, cond, key)))(x)
            penalty = jnp.sum(jnp.square(slope).reshape(len(x), -1), axis=1)
            critic += self.r1 / 2 * penalty
            metrics["r1"] = jnp.mean(penalty)
        return {"critic": critic, "generator": jax.nn.softplus(-fake_logit)}, metrics

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        """Returns a denoiser whose x0 is a sample; it is meant for t = 1, the only time that is trained."""
        predict = super().denoiser(net, params)
        return lambda x, t, cond: dataclasses.replace(predict(x, t, cond), kind="consistency")


def make(
    schedule: ScheduleSpec = "flow",
    parameterization: ParameterizationSpec = "velocity",
    generator_every: int = 1,
    r1: float = 0.0,
) -> GAN:
    """Builds adversarial training. Sample with `--sampler=consistency --steps=1`.

    Args:
      schedule: A schedule that is pure noise at t = 1.
      parameterization: What the generator's network predicts at t = 1. With `velocity` an untrained generator returns
        its noise.
      generator_every: The generator is updated at one of this many steps, the critic at all of them.
      r1: The weight of the gradient penalty on data (Mescheder et al. 2018, arXiv 1801.04406, eq. 9); 0 for none.
    """
    checks.at_least(1, generator_every=generator_every)
    checks.at_least(0, r1=r1)
    players = {
        "critic": Player(("critic",), averaged=False),
        "generator": Player(("net",), every=generator_every),
    }
    return GAN(**build_path(schedule, parameterization), players=players, r1=r1)
