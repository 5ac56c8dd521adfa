"""A data distribution whose noised density, score and optimal denoiser have closed forms, to test methods and samplers.

If x0 follows a mixture of isotropic Gaussians N(m_k, s_k^2 I), then `x_t = alpha x0 + sigma eps` follows such a mixture
too, with means alpha m_k and variances v_k = alpha^2 s_k^2 + sigma^2.
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

    All methods accept `alpha` and `sigma` as scalars or `[B]`; they must not both be 0. The parameters are stored in
    float64; results are in JAX's default precision, which is float64 if x64 is enabled.

    Attributes:
      means: m_k, `[K, D]`.
      stds: s_k, `[K]`, positive.
      weights: `[K]`, positive; normalized to sum to 1.
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
                raise InputError(
                    name, f"must be {len(self.means)} positive numbers, one per mean, got {value.tolist()}"
                )
        object.__setattr__(self, "weights", self.weights / self.weights.sum())

    def _parameters(self) -> tuple[Array, Array, Array]:
        """Returns m_k, s_k and the weights in JAX's default precision.

        The conversion is explicit because JAX caches how it converted a NumPy array: while a trace in float32 is alive,
        the same float64 array would stay float32 even after x64 has been enabled.
        """
        return tuple(jnp.asarray(a, jnp.result_type(float)) for a in (self.means, self.stds, self.weights))

    def log_density(self, x: Array, alpha: Array | float = 1.0, sigma: Array | float = 0.0) -> Array:
        """Returns the log-density of x_t at `x [B, D]` in nats, `[B]`."""
        logits, _ = self._joint(x, alpha, sigma)
        return jax.nn.logsumexp(logits, axis=1)

    def score(self, x: Array, alpha: Array | float, sigma: Array | float) -> Array:
        """Returns the gradient of `log_density` with respect to `x [B, D]`, `[B, D]`."""
        means, _, _ = self._parameters()
        logits, variance_BxK = self._joint(x, alpha, sigma)
        pull_BxK = jax.nn.softmax(logits, axis=1) / variance_BxK
        return expand(alpha, x) * (pull_BxK @ means) - pull_BxK.sum(axis=1, keepdims=True) * x

    def denoise(self, x: Array, alpha: Array | float, sigma: Array | float) -> Array:
        """Returns E[x0 | x_t = x] for `x [B, D]`, `[B, D]`.

        The posterior mean of a component is (sigma^2 m_k + alpha s_k^2 x) / v_k. In this form there is no division by 0
        at either end.
        """
        means, stds, _ = self._parameters()
        logits, variance_BxK = self._joint(x, alpha, sigma)
        weight_BxK = jax.nn.softmax(logits, axis=1) / variance_BxK
        alpha, sigma = expand(alpha, x), expand(sigma, x)
        return sigma**2 * (weight_BxK @ means) + alpha * (weight_BxK @ stds**2)[:, None] * x

    def denoiser(self, schedule: Schedule) -> Denoiser:
        """Returns the optimal denoiser on a schedule.

        Its x may have any trailing shape of size D, and t may be a scalar or `[B]`. With t `[B, T]`, the frames of
        x `[B, T, ...]` are independent samples of size D each. x0 has the dtype of x. The condition is ignored.
        """

        def denoise(x: Array, t: Array, cond: Cond | None = None) -> Denoised:
            rows, t = (jnp.size(t), jnp.reshape(t, -1)) if jnp.ndim(t) == 2 else (len(x), t)
            x0 = self.denoise(x.reshape(rows, -1), schedule.alpha(t), schedule.sigma(t))
            return Denoised(x0.reshape(x.shape).astype(x.dtype))

        return denoise

    def sample(self, key: Array, n: int) -> Array:
        """Draws n independent samples of x0, `[n, D]`."""
        key_component, key_noise = jax.random.split(key)
        means, stds, weights = self._parameters()
        component = jax.random.categorical(key_component, jnp.log(weights), shape=(n,))
        noise = jax.random.normal(key_noise, (n, means.shape[1]), means.dtype)
        return means[component] + stds[component, None] * noise

    def entropy(self, key: Array, n: int) -> tuple[Array, Array]:
        """Returns an estimate of the entropy of x0 in nats and its standard error, from -log p of n > 1 samples."""
        nll = -self.log_density(self.sample(key, n))
        return nll.mean(), nll.std(ddof=1) / n**0.5

    def _joint(self, x: Array, alpha: Array | float, sigma: Array | float) -> tuple[Array, Array]:
        """Returns log p(k, x_t = x), `[B, K]`, and v_k, `[B, K]` or `[1, K]`."""
        means, stds, weights = self._parameters()
        alpha, sigma = expand(alpha, x), expand(sigma, x)
        variance = alpha**2 * stds**2 + sigma**2
        distance = jnp.sum((x[:, None] - alpha[..., None] * means) ** 2, axis=-1)
        log_normal = -0.5 * (distance / variance + x.shape[1] * jnp.log(2 * np.pi * variance))
        return jnp.log(weights) + log_normal, variance
