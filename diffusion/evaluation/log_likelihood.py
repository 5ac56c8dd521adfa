"""Estimates of the log-likelihood of data under a model, by the probability-flow ODE and by the variational bound."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.process.decoders import level_log_likelihood


def ode_log_likelihood(
    denoise: Denoiser,
    schedule: Schedule,
    x0: Array,
    key: Array,
    *,
    steps: int = 200,
    log_snr: tuple[float, float] = (12.0, -10.0),
    trace: Literal["exact", "hutchinson"] = "exact",
    data_std: float = 1.0,
) -> Array:
    """Returns log p(x0) in nats, `[B]`, by the change of variables along the probability-flow ODE.

    See Song et al. 2021, arXiv 2011.13456, eq. 39. The ODE is solved for y = x_t / alpha as a function of
    u = log(sigma / alpha), where it is dy/du = y - E[x0 | x_t] for every schedule, by the classical fourth-order
    Runge-Kutta method with equal steps in u.

    Args:
      denoise: `denoise(x, t) -> Denoised`, with the condition bound.
      schedule: The schedule that the model was trained with.
      x0: Data `[B, ...]`.
      key: For Hutchinson's probes.
      steps: Number of steps of the solver, with four evaluations of the denoiser each.
      log_snr: Log-SNRs at which the ODE starts and ends. At the first, x is treated as clean; at the second, as normal.
        The ODE ends at t = 1 at the latest, beyond which the model is not trained.
      trace: How to compute the trace of the Jacobian: `exact`, with one Jacobian-vector product per dimension, or
        `hutchinson`, an unbiased estimate from one random probe (Grathwohl et al. 2019, arXiv 1810.01367).
      data_std: Standard deviation of the data, which contributes to that of the normal distribution at the end.
    """
    batch, dims = x0.shape[0], math.prod(x0.shape[1:])
    probes = jax.random.rademacher(key, x0.shape, x0.dtype)

    def drift(y: Array, u: Array) -> Array:
        t = schedule.time(-2 * u)
        return y - denoise(schedule.alpha(t) * y, t).x0

    def divergence(y: Array, u: Array) -> tuple[Array, Array]:
        """Returns the drift `[B, ...]` and its divergence `[B]`.

        Examples are independent, so one Jacobian-vector product serves the whole batch.
        """
        value, jvp = jax.linearize(lambda y: drift(y, u), y)
        if trace == "hutchinson":
            return value, jnp.sum((probes * jvp(probes)).reshape(batch, -1), axis=1)
        basis = jnp.eye(dims, dtype=y.dtype).reshape(dims, 1, *y.shape[1:])

        def diagonal(total: Array, direction: Array) -> tuple[Array, None]:
            tangent = jnp.broadcast_to(direction, y.shape)
            return total + jnp.sum((tangent * jvp(tangent)).reshape(batch, -1), axis=1), None

        return value, jax.lax.scan(diagonal, jnp.zeros(batch, y.dtype), basis)[0]

    first, last = (jnp.asarray(-end / 2, x0.dtype) for end in log_snr)
    last = jnp.minimum(last, -schedule.log_snr(jnp.ones((), x0.dtype)) / 2)
    h = (last - first) / steps

    def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
        y, total = carry
        u = first + h * i
        k1, d1 = divergence(y, u)
        k2, d2 = divergence(y + h / 2 * k1, u + h / 2)
        k3, d3 = divergence(y + h / 2 * k2, u + h / 2)
        k4, d4 = divergence(y + h * k3, u + h)
        return (y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)), None

    start = x0, jnp.zeros(batch, x0.dtype)
    (y, total), _ = jax.lax.scan(step, start, jnp.arange(steps, dtype=x0.dtype))
    variance = jnp.exp(2 * last) + data_std**2
    flat = y.reshape(batch, -1)
    normal = -(jnp.sum(flat**2, axis=1) / variance + dims * jnp.log(2 * jnp.pi * variance)) / 2
    return normal + total


def variational_bound(
    denoise: Denoiser,
    schedule: Schedule,
    x0: Array,
    key: Array,
    times: Array,
    *,
    levels: int | None = None,
) -> dict[str, Array]:
    """Estimates the variational upper bound on -log p(x0) in nats, `[B]`.

    The chain over `times` uses the variance of the posterior (Ho et al. 2020, eq. 5; Kingma et al. 2021, arXiv
    2107.00630, eq. 11 to 13). The estimate is unbiased and uses one noise sample per step.

    Args:
      denoise: `denoise(x, t) -> Denoised`, with the condition bound.
      schedule: The schedule that the model was trained with.
      x0: Data `[B, ...]`.
      key: For the noise.
      times: `[N + 1]`, increasing from just above 0, where x is decoded, to 1.
      levels: Number of values of a channel of discrete data, evenly spaced from -1 to 1; None for a density.

    Returns:
      `prior`, `diffusion`, `reconstruction` and their sum `total`, each `[B]`.
    """
    batch, dims = x0.shape[0], math.prod(x0.shape[1:])
    key_decode, key_steps = jax.random.split(key)

    def squares(x: Array) -> Array:
        return jnp.sum(x.reshape(batch, -1) ** 2, axis=1)

    def term(total: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        i, s, t = inputs
        eps = jax.random.normal(jax.random.fold_in(key_steps, i), x0.shape, x0.dtype)
        x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
        gain = jnp.exp(schedule.log_snr(s)) - jnp.exp(schedule.log_snr(t))
        return total + gain / 2 * squares(x0 - denoise(x_t, t).x0), None

    inputs = jnp.arange(times.shape[0] - 1), times[:-1], times[1:]
    diffusion, _ = jax.lax.scan(term, jnp.zeros(batch, x0.dtype), inputs)

    alpha, sigma = schedule.alpha(times[-1]), schedule.sigma(times[-1])
    # The prior is N(0, sigma^2) for variance exploding paths and N(0, 1) for variance preserving ones.
    scale = jnp.maximum(sigma, 1)
    prior = (squares(alpha * x0 / scale) + dims * ((sigma / scale) ** 2 - 1 - 2 * jnp.log(sigma / scale))) / 2

    std = jnp.exp(-schedule.log_snr(times[0]) / 2)  # standard deviation of x_t / alpha around x0
    if levels is None:
        reconstruction = jnp.full(batch, dims / 2) * (jnp.log(2 * jnp.pi * std**2) + 1)
    else:
        seen = x0 + std * jax.random.normal(key_decode, x0.shape, x0.dtype)
        decoded = level_log_likelihood(x0, seen, std, levels)
        reconstruction = -jnp.sum(decoded.reshape(batch, -1), axis=1)
    total = prior + diffusion + reconstruction
    return {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction, "total": total}


def dequantize(x: Array, key: Array, levels: int) -> tuple[Array, float]:
    """Adds uniform noise to discrete data (Theis et al. 2016, arXiv 1511.01844, section 3.1).

    Args:
      x: Data, each entry one of `levels` evenly spaced values from -1 to 1.
      key: For the noise.
      levels: Number of values.

    Returns:
      x, uniform over the bin of each entry, and the log of the bin's width. Adding the latter to the log-density per
      dimension gives a lower bound on the log-probability of the discrete data, in nats.
    """
    width = 2 / (levels - 1)
    return x + width * (jax.random.uniform(key, x.shape, x.dtype) - 0.5), math.log(width)
