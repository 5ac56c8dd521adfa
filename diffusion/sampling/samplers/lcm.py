"""Latent consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3): `consistency` with its boundary at 0.
The scalings c_skip and c_out at that boundary are the model's, not the sampler's."""

from diffusion.core.build import build
from diffusion.core.types import Sampler


def make() -> Sampler:
    return build("samplers", {"name": "consistency", "sigma_min": 0.0})
