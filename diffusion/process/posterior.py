"""One step of the reverse chain, q(x_s | x_t, x0) (Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7), for any schedule."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion.core.types import Array, Denoiser, Schedule


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

    def optimal(self, x0_error: Array) -> Array:
        """The variance of the best isotropic reverse step around a model's mean: beta_tilde and what the model does not
        know of x0 (Bao et al. 2022, arXiv 2201.06503, theorem 1, which has the variance of x0 given x_t for the
        error; for models that are not the mean itself, arXiv 2206.07309, theorem 2).

        Args:
          x0_error: mean square of x0 minus the model's, over data and dimensions.
        """
        return self.beta_tilde + self.from_x0**2 * x0_error


def posterior(schedule: Schedule, t: Array, s: Array) -> Posterior:
    """The step from t to s < t."""
    alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    alpha_ts, share = alpha_t / alpha_s, (sigma_s / sigma_t) ** 2
    beta = sigma_t**2 - (alpha_ts * sigma_s) ** 2
    return Posterior(alpha_ts * share, alpha_s * beta / sigma_t**2, beta, beta * share)


def x0_errors(
    denoise: Denoiser, schedule: Schedule, x0: Array, times: Array, key: Array
) -> tuple[tuple[float, float], ...]:
    """Pairs of t, rising, and the mean square error of the model's x0 there, over examples.

    Args:
      denoise: `denoise(x, t) -> Denoised`, the condition bound.
      x0: `[B, ...]` data.
      times: all above 0.
    """

    @jax.jit
    def error(t: Array) -> Array:
        x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * jax.random.normal(key, x0.shape, x0.dtype)
        return jnp.mean((x0 - denoise(x_t, t).x0) ** 2)

    return tuple((float(t), float(error(t))) for t in sorted(times))
