"""iPNDM: PNDM that starts with lower orders instead of Runge-Kutta steps (Zhang & Chen 2023, arXiv 2204.13902, app. H).

With e_0 the newest value of eps and e_k the one k steps before it, e' is by the number of known values

    1  e_0                      3  (23 e_0 - 16 e_1 + 5 e_2) / 12
    2  (3 e_0 - e_1) / 2        4  (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24
    x_s = (alpha_s / alpha_t) x_t + (sigma_s - sigma_t alpha_s / alpha_t) e'

These are the weights of Adams-Bashforth for even steps, used on every grid. For uneven steps see `deis` and `lms`.
"""

from diffusion.core.types import InputError
from diffusion.sampling.ode.noise_multistep import NoiseMultistep

_WEIGHTS = (1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)


def make(order: int = 4) -> NoiseMultistep:
    """Makes the iPNDM sampler, with one evaluation per step.

    Args:
      order: from 1 (DDIM) to 4: the largest number of values that are combined.
    """
    if not 1 <= order <= 4:
        raise InputError("order", f"must be 1, 2, 3 or 4, got {order}")
    return NoiseMultistep(_WEIGHTS[:order])
