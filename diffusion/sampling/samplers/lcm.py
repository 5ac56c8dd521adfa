"""Latent consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3): `consistency` with sigma_min = 0.

    x_s = alpha_s f(x_t, t) + sigma_s z

The scalings c_skip and c_out of the boundary condition are part of the model f, not of the sampler.
"""

from diffusion.core.build import build
from diffusion.core.types import Sampler


def make() -> Sampler:
    """Makes the latent consistency sampler, with one evaluation per step."""
    return build("samplers", {"name": "consistency", "sigma_min": 0.0})
