"""A learned variance preserving schedule (Kingma et al. 2021, arXiv 2107.00630, section 4.1 and appendix H)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.types import Array, InputError


@dataclasses.dataclass(frozen=True)
class Learned:
    """log SNR = -gamma(t), where gamma is increasing; its end points and its shape, a monotone network, are learned.

    sigma^2 = sigmoid(gamma), alpha^2 = sigmoid(-gamma). At t = 0 the noise level is that of gamma_min, because the
    model has a decoder there. Without parameters gamma is the straight line that training starts from.
    """

    gamma_min: float
    gamma_max: float
    hidden: int
    params: Any = dataclasses.field(default=None, repr=False)

    def init(self, key: Array) -> dict[str, Array]:
        key_scale, key_shift = jax.random.split(key)
        return {
            "ends": jnp.array([self.gamma_min, jnp.log(self.gamma_max - self.gamma_min)]),
            "scale": 2 + jax.random.normal(key_scale, (self.hidden,)),
            "shift": 2 * jax.random.normal(key_shift, (self.hidden,)),
            "height": jnp.full((self.hidden,), -8.0),
        }

    def at(self, params: Any) -> "Learned":
        """Returns the schedule with the given parameters."""
        return dataclasses.replace(self, params=params)

    def gamma(self, t: Array) -> Array:
        t = jnp.asarray(t)
        if self.params is None:
            return self.gamma_min + (self.gamma_max - self.gamma_min) * t
        low, span = self.params["ends"][0], jnp.exp(self.params["ends"][1])

        def rise(t: Array) -> Array:
            steps = jax.nn.sigmoid(jax.nn.softplus(self.params["scale"]) * 4 * t[..., None] + self.params["shift"])
            return t + steps @ jax.nn.softplus(self.params["height"])

        ends = rise(jnp.array([0.0, 1.0], t.dtype))
        return low + span * (rise(t) - ends[0]) / (ends[1] - ends[0])

    def alpha(self, t: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(-self.gamma(t)))

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(self.gamma(t)))

    def log_snr(self, t: Array) -> Array:
        return -self.gamma(t)

    def time(self, log_snr: Array) -> Array:
        log_snr = jnp.asarray(log_snr)
        low, high = jnp.zeros_like(log_snr), jnp.ones_like(log_snr)

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (ends[0] + ends[1]) / 2
            below = self.gamma(middle) < -log_snr
            return jnp.where(below, middle, ends[0]), jnp.where(below, ends[1], middle)

        low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
        return (low + high) / 2


def make(gamma_min: float = -13.3, gamma_max: float = 5.0, hidden: int = 64) -> Learned:
    """Builds the schedule.

    Args:
      gamma_min, gamma_max: -log SNR at t = 0 and t = 1 before training.
      hidden: Number of hidden units of the monotone network.
    """
    if gamma_max <= gamma_min:
        raise InputError("gamma_max", f"must be above gamma_min = {gamma_min}, got {gamma_max}")
    checks.at_least(1, hidden=hidden)
    return Learned(gamma_min, gamma_max, hidden)
