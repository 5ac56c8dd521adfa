"""One step of the reverse chain, q(x_s | x_t, x0) (Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7), for any schedule."""

import dataclasses

import jax.numpy as jnp

from diffusion.types import Array, Schedule


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


def posterior(schedule: Schedule, t: Array, s: Array) -> Posterior:
    """The step from t to s < t."""
    alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    alpha_ts, share = alpha_t / alpha_s, (sigma_s / sigma_t) ** 2
    beta = sigma_t**2 - (alpha_ts * sigma_s) ** 2
    return Posterior(alpha_ts * share, alpha_s * beta / sigma_t**2, beta, beta * share)
