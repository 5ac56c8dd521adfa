"""DEIS: Adams-Bashforth on the noise, exact for polynomials in log(sigma / alpha) (Zhang & Chen 2023, arXiv 2204.13902,
the log-rho variant)."""

from diffusion.core.types import InputError
from diffusion.sampling.ode.exponential import Multistep


def make(order: int = 3) -> Multistep:
    """Args: `order`, 1 (DDIM) to 4: one more than the degree of the polynomial."""
    if not 1 <= order <= 4:
        raise InputError("order", f"must be 1, 2, 3 or 4, got {order}")
    return Multistep("eps", order, midpoint=False)
