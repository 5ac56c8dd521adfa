"""Euler's method with fresh noise after each step: k-diffusion's `euler_ancestral`.

With y = x / alpha and u = sigma / alpha:

    u_up^2 = eta^2 u_s^2 (1 - u_s^2 / u_t^2),    u_down^2 = u_s^2 - u_up^2
    y_s = y_t + (u_down - u_t) eps + u_up z

This is DDIM with the same eta, term by term: alpha_s u_up is the standard deviation of its fresh noise (Song, Meng &
Ermon 2021, arXiv 2010.02502, eq. 16), and y_t - u_t eps is x0.
"""

from diffusion.core.build import build
from diffusion.core.types import Sampler


def make(eta: float = 1.0) -> Sampler:
    """Makes the ancestral Euler sampler, with one evaluation per step.

    Args:
      eta: the fraction of the noise, in [0, 1]: 0 is Euler, 1 the ancestral sampler.
    """
    return build("samplers", {"name": "ddim", "eta": eta})
