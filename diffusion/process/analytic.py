"""Data whose noised density, score and denoiser are closed forms: the oracle that methods and samplers are held to.

`x_t = alpha x0 + sigma eps` of a mixture of isotropic Gaussians N(m_k, s_k^2 I) is again such a mixture, with means
alpha m_k and variances v_k = alpha^2 s_k^2 + sigma^2.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand
from diffusion.core.types import Array, Cond, Denoised, Denoiser, InputError, Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of K isotropic Gaussians over vectors of D numbers; with K = 1, a Gaussian.

    Every `alpha` and `sigma` is a scalar or `[B]`, and not both are 0. The parameters are kept in float64; results are
    in JAX's precision, float64 if x64 is on.

    Attributes:
      means: m_k, `[K, D]`.
      stds: s_k, `[K]`, positive.
      weights: `[K]`, positive; kept scaled to sum to 1.
    """

    means: np.ndarray
    stds: np.ndarray
    weights: np.ndarray

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, np.asarray(getattr(self, field.name), np.float64))
        if self.means.ndim != 2 or not self.means.size:
            raise InputError("means", f"must be [K, D], got {list(self.means.shape)}")
        for name in ("stds", "weights"):
            value = getattr(self, name)
            if value.shape != self.means.shape[:1] or not (value > 0).all():
                raise InputError(name, f"must be {len(self.means)} positive numbers, one a mean, got {value.tolist()}")
        object.__setattr__(self, "weights", self.weights / self.weights.sum())

    def _parameters(self) -> tuple[Array, Array, Array]:
        """m_k, s_k and the weights in JAX's precision. JAX gives a float64 array of NumPy's, while a trace that it was
        used in lives, the precision of that trace again, whether x64 is on by now or not; what is made anew has its
        own."""
        return tuple(jnp.asarray(a, jnp.result_type(float)) for a in (self.means, self.stds, self.weights))

    def log_density(self, x: Array, alpha: Array | float = 1.0, sigma: Array | float = 0.0) -> Array:
        """The log-density of x_t at `x [B, D]` in nats, `[B]`."""
        logits, _ = self._joint(x, alpha, sigma)
        return jax.nn.logsumexp(logits, axis=1)

    def score(self, x: Array, alpha: Array | float, sigma: Array | float) -> Array:
        """The gradient of `log_density` in `x [B, D]`, `[B, D]`."""
        means, _, _ = self._parameters()
        logits, variance_BxK = self._joint(x, alpha, sigma)
        pull_BxK = jax.nn.softmax(logits, axis=1) / variance_BxK
        return expand(alpha, x) * (pull_BxK @ means) - pull_BxK.sum(axis=1, keepdims=True) * x

    def denoise(self, x: Array, alpha: Array | float, sigma: Array | float) -> Array:
        """E[x0 | x_t = x] for `x [B, D]`, `[B, D]`.

        A component's answer is (sigma^2 m_k + alpha s_k^2 x) / v_k: written so, neither end divides by 0.
        """
        means, stds, _ = self._parameters()
        logits, variance_BxK = self._joint(x, alpha, sigma)
        weight_BxK = jax.nn.softmax(logits, axis=1) / variance_BxK
        alpha, sigma = expand(alpha, x), expand(sigma, x)
        return sigma**2 * (weight_BxK @ means) + alpha * (weight_BxK @ stds**2)[:, None] * x

    def denoiser(self, schedule: Schedule) -> Denoiser:
        """`denoise` at the times of a schedule, for x of any trailing shape of size D and t scalar or `[B]`; x0 has the
        dtype of x. The condition is not looked at."""

        def denoise(x: Array, t: Array, cond: Cond | None = None) -> Denoised:
            x0 = self.denoise(x.reshape(len(x), -1), schedule.alpha(t), schedule.sigma(t))
            return Denoised(x0.reshape(x.shape).astype(x.dtype))

        return denoise

    def sample(self, key: Array, n: int) -> Array:
        """n independent draws of x0, `[n, D]`."""
        key_component, key_noise = jax.random.split(key)
        means, stds, weights = self._parameters()
        component = jax.random.categorical(key_component, jnp.log(weights), shape=(n,))
        noise = jax.random.normal(key_noise, (n, means.shape[1]), means.dtype)
        return means[component] + stds[component, None] * noise

    def entropy(self, key: Array, n: int) -> tuple[Array, Array]:
        """The entropy of x0 in nats, a mean over n > 1 draws of -log p, and the standard error of that mean."""
        surprise = -self.log_density(self.sample(key, n))
        return surprise.mean(), surprise.std(ddof=1) / n**0.5

    def _joint(self, x: Array, alpha: Array | float, sigma: Array | float) -> tuple[Array, Array]:
        """log p(k, x_t = x) and v_k, both `[B, K]`, or v_k `[1, K]`."""
        means, stds, weights = self._parameters()
        alpha, sigma = expand(alpha, x), expand(sigma, x)
        variance = alpha**2 * stds**2 + sigma**2
        distance = jnp.sum((x[:, None] - alpha[..., None] * means) ** 2, axis=-1)
        log_normal = -0.5 * (distance / variance + x.shape[1] * jnp.log(2 * np.pi * variance))
        return jnp.log(weights) + log_normal, variance


def gaussian_ode_map(
    x: Array,
    mean: Array | float,
    std: Array | float,
    alpha_t: Array | float,
    sigma_t: Array | float,
    alpha_s: Array | float,
    sigma_s: Array | float,
) -> Array:
    """Where the probability-flow ODE (Song et al. 2021, arXiv 2011.13456, eq. 13) takes x from time t to time s if the
    data are N(mean, std^2 I): it keeps each point's distance from the mean, counted in standard deviations.

    Args:
      x: `[B, ...]`.
      mean: of the data, one example's shape or a scalar.
      std: of the data, in every direction; a scalar.
      alpha_t, sigma_t, alpha_s, sigma_s: the schedule at both times, scalars or `[B]`.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = (expand(a, x) for a in (alpha_t, sigma_t, alpha_s, sigma_s))
    std_t = jnp.sqrt(alpha_t**2 * std**2 + sigma_t**2)
    std_s = jnp.sqrt(alpha_s**2 * std**2 + sigma_s**2)
    return alpha_s * mean + (x - alpha_t * mean) * (std_s / std_t)
