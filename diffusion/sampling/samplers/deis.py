"""DEIS: Adams-Bashforth on eps, exact for polynomials in log(sigma / alpha) (Zhang & Chen 2023, arXiv 2204.13902).

With tau in [0, 1] the position in the step, lambda(tau) = lambda_t + tau h, and l_k the Lagrange basis through the
points of the last `order` evaluations eps_k (the log-rho variant, rho = sigma / alpha):

    x_s = (alpha_s / alpha_t) x_t - sigma_s sum_k C_k eps_k,    C_k = integral over [0, 1] of h e^(h (1 - tau)) l_k(tau)
"""

from diffusion.core.types import InputError
from diffusion.sampling.ode.exponential import Multistep


def make(order: int = 3, lower_order_final: bool | None = None) -> Multistep:
    """Makes the DEIS sampler, with one evaluation per step.

    Args:
      order: from 1 (DDIM) to 4: the number of interpolated values, one more than the degree of the polynomial.
      lower_order_final: as in `dpm_solver`.
    """
    if not 1 <= order <= 4:
        raise InputError("order", f"must be 1, 2, 3 or 4, got {order}")
    return Multistep("eps", order, midpoint=False, lower_order_final=lower_order_final)
