"""DPM-Solver++: exponential integrators on x0, which stay stable at high guidance (Lu et al. 2022, arXiv
2211.01095)."""

from typing import Literal

from diffusion.core.types import InputError
from diffusion.sampling.ode.exponential import Multistep, Singlestep


def make(
    order: int = 2,
    sde: bool = False,
    singlestep: bool = False,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
) -> Multistep | Singlestep:
    """2M by default; one evaluation a step of the grid.

    Args:
      order: 1 (DDIM; with `sde` the ancestral sampler), 2 or 3.
      sde: solve the reverse SDE (SDE-DPM-Solver++) and not the ODE.
      singlestep: a step of the method goes over `order` of the grid, with inner points of its own (2S, 3S); if False,
        over one, from the values before it (2M, 3M).
      solver_type: as in `dpm_solver`.
    """
    if not 1 <= order <= 3:
        raise InputError("order", f"must be 1, 2 or 3, got {order}")
    if sde and singlestep:
        raise InputError("sde", "exists for the multistep solver; set singlestep to false")
    if singlestep:
        return Singlestep("x0", order, midpoint=solver_type == "midpoint")
    return Multistep("x0", order, sde, midpoint=solver_type == "midpoint")
