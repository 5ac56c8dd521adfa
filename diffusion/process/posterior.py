"""The posterior q(x_s | x_t, x0) of one reverse step, on any schedule (Ho et al. 2020, arXiv 2006.11239, eq. 6, 7)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion.core.types import Array, Denoiser, Schedule


@dataclasses.dataclass(frozen=True)
class Posterior:
    """The coefficients of q(x_s | x_t, x0), each with the shape of t and s.

    Attributes:
      from_x, from_x0: The mean is `from_x x_t + from_x0 x0`.
      beta: Variance of q(x_t | x_s), the larger choice for the variance of the reverse step.
      beta_tilde: Variance of q(x_s | x_t, x0), the smaller choice; 0 where sigma_s is 0.
    """

    from_x: Array
    from_x0: Array
    beta: Array
    beta_tilde: Array

    def log_variance(self, fraction: Array) -> Array:
        """Interpolates the log-variance from beta_tilde at fraction 0 to beta at fraction 1.

        See Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15.
        """
        return fraction * jnp.log(self.beta) + (1 - fraction) * jnp.log(self.beta_tilde)

    def optimal(self, x0_error: Array) -> Array:
        """Returns the variance of the optimal isotropic reverse step around a model's mean.

        It is beta_tilde plus the contribution of the model's uncertainty about x0 (Bao et al. 2022, arXiv 2201.06503,
        theorem 1, where the error is the variance of x0 given x_t; arXiv 2206.07309, theorem 2, for models whose mean
        is not exact).

        Args:
          x0_error: Mean squared error of the model's x0, over data and dimensions.
        """
        return self.beta_tilde + self.from_x0**2 * x0_error


def posterior(schedule: Schedule, t: Array, s: Array) -> Posterior:
    """Returns the posterior of the step from t to s < t."""
    alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    alpha_ts, share = alpha_t / alpha_s, (sigma_s / sigma_t) ** 2
    beta = jnp.maximum(sigma_t**2 - (alpha_ts * sigma_s) ** 2, 0)  # for s = t the difference is a rounding error
    return Posterior(alpha_ts * share, alpha_s * beta / sigma_t**2, beta, beta * share)


def x0_errors(
    denoise: Denoiser, schedule: Schedule, x0: Array, times: Array, key: Array
) -> tuple[tuple[float, float], ...]:
    """Measures the mean squared error of the model's x0 at several times.

    Args:
      denoise: `denoise(x, t) -> Denoised`, with the condition bound.
      schedule: The schedule that the model was trained with.
      x0: Data `[B, ...]`.
      times: Times, all positive.
      key: For the noise, which is the same at all times.

    Returns:
      Pairs of t, increasing, and the error, averaged over examples and dimensions.
    """

    @jax.jit
    def error(t: Array) -> Array:
        x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * jax.random.normal(key, x0.shape, x0.dtype)
        return jnp.mean((x0 - denoise(x_t, t).x0) ** 2)

    return tuple((float(t), float(error(t))) for t in sorted(times))
