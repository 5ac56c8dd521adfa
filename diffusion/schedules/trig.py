"""The trigonometric path: variance preserving, with constant speed on the quarter circle (Albergo & Vanden-Eijnden
2023, arXiv 2209.15571; the GVP path of SiT, arXiv 2401.08740)."""

import dataclasses

import jax.numpy as jnp

from diffusion.types import Array

_QUARTER = jnp.pi / 2


@dataclasses.dataclass(frozen=True)
class Trig:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def alpha(self, t: Array) -> Array:
        return jnp.sin(_QUARTER * (1 - jnp.asarray(t)))  # a cosine in floating point does not end at 0

    def sigma(self, t: Array) -> Array:
        return jnp.sin(_QUARTER * jnp.asarray(t))

    def log_snr(self, t: Array) -> Array:
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def time(self, log_snr: Array) -> Array:
        return jnp.arctan(jnp.exp(-jnp.asarray(log_snr) / 2)) / _QUARTER


def make() -> Trig:
    """The path has no options."""
    return Trig()
