"""RES: the exponential multistep solver on x0 with exact weights (Zhang et al. 2023, arXiv 2308.02157, algorithm 1).

With v_k = x0 at the last `order` points, c_k = (lambda_k - lambda_t) / h (c_0 = 0) and l_k the Lagrange basis through
the c_k:

    x_s = (sigma_s / sigma_t) x_t + alpha_s sum_k b_k v_k,    b_k = integral over [0, 1] of h e^(-h (1 - tau)) l_k(tau)

For order 2 (`res_2m`), with phi_1(z) = (e^z - 1) / z and phi_2(z) = (phi_1(z) - 1) / z, b_1 = h phi_2(-h) / c_1 and
b_0 = h phi_1(-h) - b_1. It is `dpm_solver_pp` with `solver_type = "heun"`; order 3 (`res_3m`) is that of 3M.
"""

from diffusion.core.types import InputError
from diffusion.sampling.ode.exponential import Multistep


def make(order: int = 2, lower_order_final: bool | None = False) -> Multistep:
    """Makes the RES multistep sampler, with one evaluation per step.

    Args:
      order: 1 (DDIM), 2 or 3: the number of interpolated values.
      lower_order_final: as in `dpm_solver`.
    """
    if not 1 <= order <= 3:
        raise InputError("order", f"must be 1, 2 or 3, got {order}")
    return Multistep("x0", order, midpoint=False, lower_order_final=lower_order_final)
