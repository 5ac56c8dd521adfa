"""DPM-Solver: exponential integrators on eps (Lu et al. 2022, arXiv 2206.00927).

Singlestep, with r1 = 1/2 for order 2; r1 = 1/3 and r2 = 2/3 for order 3; and x_r at the time with lambda_t + r h:

    order 1  x_s  = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) eps(x_t)                                  (eq. 3.7)
    order 2  x_r1 = the order-1 step over r1 h
             x_s  = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) eps(x_r1)                              (algorithm 1)
    order 3  x_r1 = the order-1 step over r1 h
             x_r2 = the order-2 step over r2 h, whose midpoint is x_r1
             x_s  = the order-1 step over h - (sigma_s / r2) ((e^h - 1) / h - 1) (eps(x_r2) - eps(x_t))
                                                                                                       (algorithm 2)

Algorithm 2 gives eps(x_r1) - eps(x_t) in x_r2 the weight (r2 / r1) ((e^(r2 h) - 1) / (r2 h) - 1), which is that of
`solver_type = "heun"` here. The order-2 step has e^(r2 h) - 1 in its place, as DPM-Solver++'s published code does; the
order of accuracy is the same. For the multistep form see `dpm_solver_pp`, with eps, -sigma_s (e^h - 1) and
alpha_s / alpha_t in place of x0, alpha_s (1 - e^-h) and sigma_s / sigma_t.
"""

from typing import Literal

from diffusion.core.types import InputError
from diffusion.sampling.ode.exponential import Multistep, Singlestep


def make(
    order: int = 3, singlestep: bool = True, solver_type: Literal["midpoint", "heun"] = "midpoint"
) -> Multistep | Singlestep:
    """Makes DPM-Solver, with one evaluation per step of the grid.

    Args:
      order: 1 (DDIM), 2 or 3.
      singlestep: whether a step of the method covers `order` steps of the grid, evaluating at inner points between them
        (the paper's DPM-Solver-2 and -3). If False, it covers one, and interpolates the values of previous steps.
      solver_type: `midpoint` selects the papers' weights: total / 2 for order 2, and for order 3 of the singlestep
        solver the line through the first and the last value. `heun` integrates the polynomial through all values, which
        order 3 of the multistep solver always does. See `diffusion.sampling.ode.exponential`.
    """
    if not 1 <= order <= 3:
        raise InputError("order", f"must be 1, 2 or 3, got {order}")
    if singlestep:
        return Singlestep("eps", order, midpoint=solver_type == "midpoint")
    return Multistep("eps", order, midpoint=solver_type == "midpoint")
