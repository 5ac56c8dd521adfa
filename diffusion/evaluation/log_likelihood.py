"""How probable a model finds data: by the probability-flow ODE, and by the variational bound."""

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
    """log p(x0) in nats, `[B]`, by the change of variables along the probability-flow ODE (Song et al. 2021, arXiv
    2011.13456, eq. 39).

    The ODE is solved for y = x_t / alpha in u = log(sigma / alpha), where it is dy/du = (y - E[x0 | x_t]) for every
    schedule, by the classical fourth-order Runge-Kutta method on even steps of u.

    Args:
      denoise: `denoise(x, t) -> Denoised`.
      x0: `[B, ...]`.
      key: for Hutchinson's probes.
      steps: of the solver, four evaluations each.
      log_snr: where the ODE starts and ends; at the first the data is taken to be clean, at the second to be normal.
      trace: of the Jacobian: `exact`, by as many products as there are dimensions, or `hutchinson`, unbiased from one
        random probe (Grathwohl et al. 2019, arXiv 1810.01367).
      data_std: of the data, which the normal distribution at the far end takes into account.
    """
    batch, dims = x0.shape[0], math.prod(x0.shape[1:])
    probes = jax.random.rademacher(key, x0.shape, x0.dtype)

    def drift(y: Array, u: Array) -> Array:
        t = schedule.time(-2 * u)
        return y - denoise(schedule.alpha(t) * y, t).x0

    def divergence(y: Array, u: Array) -> tuple[Array, Array]:
        """The drift and its trace, `[B, ...]` and `[B]`: examples are independent, so one product serves all."""
        product = jax.linearize(lambda y: drift(y, u), y)
        value, jvp = product
        if trace == "hutchinson":
            return value, jnp.sum((probes * jvp(probes)).reshape(batch, -1), axis=1)
        basis = jnp.eye(dims, dtype=y.dtype).reshape(dims, 1, *y.shape[1:])

        def diagonal(total: Array, direction: Array) -> tuple[Array, None]:
            tangent = jnp.broadcast_to(direction, y.shape)
            return total + jnp.sum((tangent * jvp(tangent)).reshape(batch, -1), axis=1), None

        return value, jax.lax.scan(diagonal, jnp.zeros(batch, y.dtype), basis)[0]

    first, last = (-ends / 2 for ends in log_snr)
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
    variance = jnp.exp(2 * jnp.asarray(last, x0.dtype)) + data_std**2
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
    """An upper bound of -log p(x0) in nats, `[B]`, of the chain over `times` with the posterior's own variance (Ho et
    al. 2020, eq. 5; Kingma et al. 2021, arXiv 2107.00630, eq. 11 to 13). One noise a step: an unbiased estimate.

    Args:
      denoise: `denoise(x, t) -> Denoised`.
      times: `[N + 1]`, rising from just above 0, where x is decoded, to 1.
      levels: values that a channel can take if the data is discrete, evenly spaced from -1 to 1; None for a density.

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
    # Against N(0, sigma^2) where the path explodes, against N(0, 1) where it preserves the variance.
    scale = jnp.maximum(sigma, 1)
    prior = (squares(alpha * x0 / scale) + dims * ((sigma / scale) ** 2 - 1 - 2 * jnp.log(sigma / scale))) / 2

    std = jnp.exp(-schedule.log_snr(times[0]) / 2)  # of x_t / alpha around x0
    if levels is None:
        reconstruction = jnp.full(batch, dims / 2) * (jnp.log(2 * jnp.pi * std**2) + 1)
    else:
        seen = x0 + std * jax.random.normal(key_decode, x0.shape, x0.dtype)
        decoded = level_log_likelihood(x0, seen, std, levels)
        reconstruction = -jnp.sum(decoded.reshape(batch, -1), axis=1)
    total = prior + diffusion + reconstruction
    return {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction, "total": total}


def dequantize(x: Array, key: Array, levels: int) -> tuple[Array, float]:
    """Discrete data, `levels` even values from -1 to 1, spread evenly over their bins.

    Returns:
      x with uniform noise, and what is to be added to the log-likelihood of a dimension, in nats: log of a bin's width,
      for the discrete probability is at least the density's mean over the bin times it (Theis et al. 2016, arXiv
      1511.01844, section 3.1).
    """
    width = 2 / (levels - 1)
    return x + width * (jax.random.uniform(key, x.shape, x.dtype) - 0.5), math.log(width)


def bits_per_dim(nats: Array, dims: int) -> Array:
    """Nats of one example as bits a dimension."""
    return nats / (dims * math.log(2))
