"""One step of the reverse chain, q(x_s | x_t, x0) (Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7), for any schedule."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion.solver import eps_of
from diffusion.types import Array, Denoiser, Schedule


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Its mean is `from_x x_t + from_x0 x0`; each attribute has the shape of t and s.

    Attributes:
      beta: variance of q(x_t | x_s), the larger choice for the reverse step's variance.
      beta_tilde: variance of q(x_s | x_t, x0), the smaller; 0 where sigma_s is.
    """

    from_x: Array
    from_x0: Array
    beta: Array
    beta_tilde: Array

    def log_variance(self, fraction: Array) -> Array:
        """A variance between the two, in the log: beta_tilde at fraction 0, beta at 1 (Nichol & Dhariwal 2021, arXiv
        2102.09672, eq. 15)."""
        return fraction * jnp.log(self.beta) + (1 - fraction) * jnp.log(self.beta_tilde)

    def optimal(self, schedule: Schedule, t: Array, eps_moment: Array) -> Array:
        """The variance of the best isotropic reverse step to the mean of x0 (Bao et al. 2022, arXiv 2201.06503, theorem
        1): beta_tilde and what the variance of x0 given x_t adds, (sigma / alpha)^2 (1 - eps_moment).

        Args:
          eps_moment: mean square of E[eps | x_t] at t, over data and dimensions: at most 1.
        """
        share = self.from_x0 * schedule.sigma(t) / schedule.alpha(t)
        return self.beta_tilde + share**2 * jnp.clip(1 - eps_moment, 0, 1)


def eps_moments(
    denoise: Denoiser, schedule: Schedule, x0: Array, times: Array, key: Array
) -> tuple[tuple[float, float], ...]:
    """Pairs of t, rising, and the mean square of the noise that a model predicts there, over examples.

    Args:
      denoise: `denoise(x, t) -> Denoised`, the condition bound.
      x0: `[B, ...]` data.
      times: all above 0.
    """

    @jax.jit
    def moment(t: Array) -> Array:
        eps = jax.random.normal(key, x0.shape, x0.dtype)
        x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
        return jnp.mean(eps_of(schedule, x_t, denoise(x_t, t).x0, t) ** 2)

    return tuple((float(t), float(moment(t))) for t in sorted(times))


def posterior(schedule: Schedule, t: Array, s: Array) -> Posterior:
    """The step from t to s < t."""
    alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    alpha_ts, share = alpha_t / alpha_s, (sigma_s / sigma_t) ** 2
    beta = sigma_t**2 - (alpha_ts * sigma_s) ** 2
    return Posterior(alpha_ts * share, alpha_s * beta / sigma_t**2, beta, beta * share)
