"""Euler's method with noise put back at each step (k-diffusion's `euler_ancestral`).

It steps to sigma_down and adds noise of sigma_up, sigma_down^2 + sigma_up^2 = sigma_s^2, both relative to alpha. With
sigma_up = eta sigma_s sqrt(1 - sigma_s^2 / sigma_t^2) that is DDIM with the same eta, letter for letter.
"""

from diffusion.core.build import build
from diffusion.core.types import Sampler


def make(eta: float = 1.0) -> Sampler:
    """Args: `eta` in [0, 1], the share of the noise: 0 is Euler, 1 the ancestral sampler."""
    return build("samplers", {"name": "ddim", "eta": eta})
