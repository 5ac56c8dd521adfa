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
alpha_s / alpha_t in place of x0, alpha_s (1 - e^-h) and sigma_s / sigma_t. With `sde`, SDE-DPM-Solver solves the
reverse SDE (Lu et al. 2022, arXiv 2211.01095, eq. 18), of second order with D as in 2M of `dpm_solver_pp`:

    x_s  = (alpha_s / alpha_t) x_t - 2 sigma_s (e^h - 1) D + sigma_s sqrt(e^(2h) - 1) z

In a step to t = 0 the noise would be infinite, and in one from pure noise the drift, so that these are steps of x0.
"""

from typing import Literal

from diffusion.sampling.ode.exponential import Multistep, Singlestep, exponential_solver


def make(
    order: int = 3,
    sde: bool = False,
    singlestep: bool = True,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    inner_points: Literal["even", "grid"] = "even",
    lower_order_final: bool | None = None,
) -> Multistep | Singlestep:
    """Makes DPM-Solver, with one evaluation per step of the grid.

    Args:
      order: 1 (DDIM), 2 or 3.
      sde: whether to solve the reverse SDE (SDE-DPM-Solver) instead of the ODE.
      singlestep: whether a step of the method covers `order` steps of the grid, evaluating at inner points between them
        (the paper's DPM-Solver-2 and -3). If False, it covers one, and interpolates the values of previous steps.
      solver_type: `midpoint` selects the papers' weights: total / 2 for order 2, and for order 3 of the singlestep
        solver the line through the first and the last value. `heun` integrates the polynomial through all values, which
        order 3 of the multistep solver always does. See `diffusion.sampling.ode.exponential`.
      inner_points: where the singlestep solver evaluates: at `even` parts of a step in lambda, as in the paper, or at
        the times of the `grid`, as in diffusers. The latter reduces the order of accuracy of order 3 with `midpoint`.
      lower_order_final: whether the order falls to 1 at the end of runs of fewer than 15 steps (multistep), or the last
        interval is a step by itself (singlestep), for stability. None stands for runs that end in data.
    """
    return exponential_solver("eps", order, sde, singlestep, solver_type, inner_points, lower_order_final)
