"""Time grids by name: `trailing(schedule, steps)` returns the times at which a sampler evaluates the denoiser.

    even steps in t                     trailing, leading, linspace, lattice, simple, sgm_uniform
    functions of even steps in t        quadratic, sigmoid, beta, shifted, linear_quadratic
    steps in the noise level            karras, exponential, polyexponential, kl_optimal, beta_sigmas, log_snr,
                                        align_your_steps
    given times, and changed grids      given, to_sigma_min, repaint, restart

Every grid returns float64 times that decrease from t = 1, or near it, to 0, `[steps + 1]`; only `given` and
`to_sigma_min` end elsewhere. `repaint` and `restart` repeat parts of another grid: their times, more than `steps + 1`,
also rise, where noise is added. A grid whose times may rise has the attribute `may_rise`.

The first three names are those of Lin et al. 2024 (arXiv 2305.08891, table 2).
"""

from diffusion.sampling.grids.changed import given, repaint, restart, to_sigma_min
from diffusion.sampling.grids.common import GridSpec
from diffusion.sampling.grids.curves import beta, linear_quadratic, quadratic, shifted, sigmoid
from diffusion.sampling.grids.even import lattice, leading, linspace, sgm_uniform, simple, trailing
from diffusion.sampling.grids.noise_levels import (
    align_your_steps,
    beta_sigmas,
    exponential,
    karras,
    kl_optimal,
    log_snr,
    polyexponential,
)

__all__ = [
    "GridSpec",
    "align_your_steps",
    "beta",
    "beta_sigmas",
    "exponential",
    "given",
    "karras",
    "kl_optimal",
    "lattice",
    "leading",
    "linear_quadratic",
    "linspace",
    "log_snr",
    "polyexponential",
    "quadratic",
    "repaint",
    "restart",
    "sgm_uniform",
    "shifted",
    "sigmoid",
    "simple",
    "to_sigma_min",
    "trailing",
]
