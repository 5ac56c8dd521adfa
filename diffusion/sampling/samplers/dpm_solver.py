"""DPM-Solver: exponential integrators on the noise (Lu et al. 2022, arXiv 2206.00927)."""

from typing import Literal

from diffusion.core.types import InputError
from diffusion.sampling.ode.exponential import Multistep, Singlestep


def make(
    order: int = 3, singlestep: bool = True, solver_type: Literal["midpoint", "heun"] = "midpoint"
) -> Multistep | Singlestep:
    """One evaluation a step of the grid.

    Args:
      order: 1 (DDIM), 2 or 3.
      singlestep: a step of the method goes over `order` of the grid, with inner points of its own (the paper's
        DPM-Solver-2 and -3); if False, over one, from the values before it.
      solver_type: `midpoint` as in the papers, where order 2 has the weight of its middle and order 3 of the singlestep
        solver the line through the first and the last value; `heun` for the polynomial through all values. Order 3 of
        the multistep solver always is that.
    """
    if not 1 <= order <= 3:
        raise InputError("order", f"must be 1, 2 or 3, got {order}")
    if singlestep:
        return Singlestep("eps", order, midpoint=solver_type == "midpoint")
    return Multistep("eps", order, midpoint=solver_type == "midpoint")
