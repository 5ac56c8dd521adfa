"""Variance preserving schedules from a table of betas: alpha^2 + sigma^2 = 1 (Ho et al. 2020, arXiv 2006.11239)."""

from typing import Literal

import numpy as np

from diffusion.core import checks
from diffusion.core.types import InputError
from diffusion.process.schedules.table import VP


def make(
    betas: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "linear",
    beta_start: float | None = None,
    beta_end: float | None = None,
    num_steps: int = 1000,
    zero_terminal_snr: bool = False,
    trained_betas: tuple[float, ...] | None = None,
) -> VP:
    """Builds a VP schedule from one of the usual tables of betas, or from a given one.

    Args:
      betas: `linear` (Ho et al. 2020: 1e-4 to 0.02), `scaled_linear` (linear in sqrt(beta); latent diffusion's 0.00085
        to 0.012), `sigmoid` (a logistic function from -6 to 6 between the end points 1e-4 and 0.02; GeoDiff, arXiv
        2203.02923), or `cosine` (Nichol & Dhariwal 2021, eq. 17, each beta clipped at 0.999; it has no end points).
      beta_start, beta_end: First and last beta, in (0, 1); by default the paper's values.
      num_steps: T, the length of the table.
      zero_terminal_snr: Whether to shift and scale the table of alphas so that the last is 0 (Lin et al. 2024, arXiv
        2305.08891, algorithm 1).
      trained_betas: The table itself, `num_steps` numbers in (0, 1), in place of `betas` and its end points. The last
        may be 1, which gives zero terminal SNR.
    """
    checks.at_least(2 if zero_terminal_snr else 1, num_steps=num_steps)
    checks.at_most(10**6, num_steps, "num_steps")
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if (betas == "cosine" or trained_betas is not None) and value is not None:
            raise InputError(name, f"must not be set, because {'a given' if trained_betas else 'the cosine'} table has "
                             "no end points; remove it")  # fmt: skip
        if value is not None and not 0 < value < 1:
            raise InputError(name, f"must be in (0, 1), got {value}")
    if trained_betas is not None:
        table = _given(trained_betas, num_steps)
    elif betas == "cosine":
        table = _cosine(num_steps)
    else:
        start, end = (0.00085, 0.012) if betas == "scaled_linear" else (1e-4, 0.02)
        start = start if beta_start is None else beta_start
        end = end if beta_end is None else beta_end
        table = {
            "linear": lambda: np.linspace(start, end, num_steps),
            "scaled_linear": lambda: np.linspace(start**0.5, end**0.5, num_steps) ** 2,
            "sigmoid": lambda: _sigmoid(np.linspace(-6, 6, num_steps)) * (end - start) + start,
        }[betas]()
    with np.errstate(divide="ignore"):
        log_alpha_bar = np.cumsum(np.log1p(-table))
    if zero_terminal_snr:
        alpha = np.exp(log_alpha_bar / 2)
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        with np.errstate(divide="ignore"):
            log_alpha_bar = 2 * np.log(alpha)
    return VP(log_alpha_bar - np.log(-np.expm1(log_alpha_bar)))


def _given(betas: tuple[float, ...], num_steps: int) -> np.ndarray:
    if len(betas) != num_steps:
        raise InputError("num_steps", f"must be the length of trained_betas, {len(betas)}, got {num_steps}")
    for index, beta in enumerate(betas):
        if not (0 < beta < 1 or (beta == 1 and 0 < index == num_steps - 1)):
            raise InputError("trained_betas", f"must be in (0, 1), and the last at most 1; got {beta} at {index}")
    return np.asarray(betas, np.float64)


def _cosine(num_steps: int) -> np.ndarray:
    alpha_bar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
