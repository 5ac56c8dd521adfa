"""The gradient-estimation sampler (Permenter & Yuan 2024, arXiv 2306.04848, algorithm 2).

With y = x / alpha, u = sigma / alpha, e_0 = eps at x_t and e_1 = eps at the previous point:

    y_s = y_t + (u_s - u_t) (gamma e_0 + (1 - gamma) e_1)

The first step and the last one, to sigma = 0, are DDIM's. The error of eps has a component that persists from step to
step, which gamma > 1 reduces. gamma = 1 is DDIM, and gamma = 3/2 is of second order for even steps of u.
"""

from diffusion.core import checks
from diffusion.sampling.ode.noise_multistep import NoiseMultistep


def make(gamma: float = 2.0) -> NoiseMultistep:
    """Makes the gradient-estimation sampler, with one evaluation per step.

    Args:
      gamma: the weight of the newest noise, positive; the paper's 2.
    """
    checks.positive(gamma=gamma)
    return NoiseMultistep(((1,), (gamma, 1 - gamma)), first_order_final=True)
