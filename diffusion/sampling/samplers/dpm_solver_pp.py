"""DPM-Solver++: exponential integrators on x0, which stay stable at high guidance (Lu et al. 2022, arXiv 2211.01095).

With t_- and t_-- the last and the second to last time before t, r = (lambda_t - lambda_t-) / h and
q = (lambda_t- - lambda_t--) / h:

    2M  D   = (1 + 1 / (2 r)) x0(x_t) - (1 / (2 r)) x0(x_t-)                                           (algorithm 2)
        x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) D
    2S  u   = (sigma_m / sigma_t) x_t + alpha_m (1 - e^(-h/2)) x0(x_t), at the time m with lambda_t + h / 2
        x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) x0(u)                               (algorithm 1, r = 1/2)
    3M  D1  = D' + r (D' - D'') / (r + q),    D2 = (D' - D'') / (r + q)
        x_s = (sigma_s / sigma_t) x_t + alpha_s ((1 - e^-h) x0(x_t) + b1 D1 + b2 D2)
        with D' = (x0(x_t) - x0(x_t-)) / r,    D'' = (x0(x_t-) - x0(x_t--)) / q,
        b1 = 1 - (1 - e^-h) / h,    b2 = 1 - 2 b1 / h
    3S  as order 3 of `dpm_solver`, with x0 in place of eps
    SDE x_s = (sigma_s / sigma_t) e^-h x_t + alpha_s (1 - e^(-2h)) D + sigma_s sqrt(1 - e^(-2h)) z      (2M; D as above)

The code obtains 2M and 3M from one quadrature (`ode/exponential.py`): alpha_s sum_k w_k (v_k - v_0) is added to the
DDIM step. For 2M the node of v_1 = x0(x_t-) is -r and its weight w_1 = (1 - e^-h) / (2 (-r)), so that
(1 - e^-h) v_0 + w_1 (v_1 - v_0) = (1 - e^-h) ((1 + 1 / (2 r)) v_0 - (1 / (2 r)) v_1), which is algorithm 2. The exact
integral of the line through v_0 and v_1 (`solver_type = "heun"`) has w_1 = -b1 / r, the same up to O(h^2).
"""

from typing import Literal

from diffusion.core.types import InputError
from diffusion.sampling.ode.exponential import Multistep, Singlestep, exponential_solver


def make(
    order: int = 2,
    sde: bool = False,
    singlestep: bool = False,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    inner_points: Literal["even", "grid"] = "even",
    lower_order_final: bool | None = None,
    brownian: bool = False,
) -> Multistep | Singlestep:
    """Makes DPM-Solver++, by default 2M, with one evaluation per step of the grid.

    Args:
      order: 1 (DDIM; with `sde` the ancestral sampler), 2 or 3.
      sde: whether to solve the reverse SDE (SDE-DPM-Solver++) instead of the ODE.
      singlestep: whether a step of the method covers `order` steps of the grid, evaluating at inner points between them
        (2S, 3S). If False, it covers one, and interpolates the values of previous steps (2M, 3M).
      solver_type, inner_points, lower_order_final: as in `dpm_solver`.
      brownian: whether the noise of `sde` is that of a Brownian path (`diffusion.sampling.ode.brownian`), so that a
        sample changes little with the number of steps; only for the multistep solver.
    """
    if brownian and (singlestep or not sde):
        raise InputError("brownian", "requires sde = true and singlestep = false; set it to false")
    return exponential_solver("x0", order, sde, singlestep, solver_type, inner_points, lower_order_final, brownian)
