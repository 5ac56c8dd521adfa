"""Changes of any denoiser's output, which are applied around guidance; see `diffusion.sampling.guidance`."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core.arrays import expand, per_example
from diffusion.core.types import Array, Cond, Denoised, Denoiser, InputError, Schedule
from diffusion.process.parameterization import eps, v, velocity
from diffusion.sampling.guidance.common import Traced
from diffusion.sampling.ode.first_order import ends_in_noise


def scale_schedule(guided: Denoiser, shape: Literal["linear", "cosine"] = "cosine") -> Denoiser:
    """Multiplies the change by guidance with a function of the time (Wang et al. 2024, arXiv 2404.13040).

        x0 <- x0_cond + f(t) (x0 - x0_cond)

    The scale w of `cfg`, for example, becomes 1 + f(t) (w - 1). The mean of f is 1. `interval` is the schedule that is
    0 outside of an interval.

    Args:
      guided: a guided denoiser; others have no conditional x0 to compare with.
      shape: `linear` for f = 2 (1 - t), `cosine` for f = 1 + cos(pi t). Both rise towards the data.
    """

    def scheduled(x: Array, t: Array, cond: Cond) -> Denoised:
        denoised = guided(x, t, cond)
        if denoised.conditional is None:
            raise InputError("guidance.scale_schedule", "requires guidance; apply it to the result of cfg, for example")
        weight = expand(2 * (1 - t) if shape == "linear" else 1 + jnp.cos(jnp.pi * t), x)
        return dataclasses.replace(denoised, x0=denoised.conditional + weight * (denoised.x0 - denoised.conditional))

    return scheduled


def rescale(
    guided: Denoiser,
    factor: Traced = 0.7,
    output: Literal["x0", "eps", "v", "velocity"] = "x0",
    *,
    schedule: Schedule | None = None,
) -> Denoiser:
    """Rescales the guided x0 towards the standard deviation of the conditional one.

        x0 <- factor x0 std(x0_cond) / std(x0) + (1 - factor) x0

    (Lin et al. 2024, arXiv 2305.08891, eq. 15 and 16.)

    Args:
      guided: a guided denoiser; others have no conditional x0 to compare with.
      factor: in [0, 1]: 0 leaves x0 unchanged, 1 restores the standard deviation fully.
      output: what is rescaled. The authors, and diffusers, rescale the output of the network: `v` for their model,
        `eps` for Stable Diffusion. The result differs, and that of `x0` is the same for every parameterization.
      schedule: the schedule of the denoiser; not needed for x0.
    """
    if output == "eps" and ends_in_noise(schedule):
        raise InputError("output", "must not be eps for this schedule, which ends in pure noise; use v or velocity")

    def rescaled(x: Array, t: Array, cond: Cond) -> Denoised:
        denoised = guided(x, t, cond)
        if denoised.conditional is None:
            raise InputError("guidance.rescale", "requires guidance; apply it to the result of cfg, for example")
        conditional, ours = denoised.conditional, denoised.x0
        if output != "x0":
            times = per_example(t, x)
            coefficients = {"eps": eps, "v": v, "velocity": velocity}[output]()(schedule, times)
            alpha, sigma = schedule.alpha(times), schedule.sigma(times)
            conditional, ours = (coefficients.from_x0(y, x, alpha, sigma) for y in (conditional, ours))
        axes = tuple(range(1, x.ndim))
        std_cond, std = (jnp.std(y, axis=axes, keepdims=True) for y in (conditional, ours))
        ours *= factor * std_cond / jnp.maximum(std, 1e-12) + 1 - factor
        return dataclasses.replace(denoised, x0=ours if output == "x0" else coefficients.to_x0(ours, x))

    return rescaled


def interval(
    guided: Denoiser,
    low: Traced = 0.0,
    high: Traced = float("inf"),
    unit: Literal["t", "sigma"] = "t",
    *,
    plain: Denoiser,
    schedule: Schedule,
) -> Denoiser:
    """Restricts guidance to noise levels from `low` to `high`, both included (Kynkaanniemi et al. 2024, arXiv
    2404.07724). Outside of them the plain denoiser is evaluated, at half the cost.

    Args:
      low, high: the limits.
      unit: the unit of the limits: the time `t`, or `sigma` for sigma / alpha.
    """

    def restricted(x: Array, t: Array, cond: Cond) -> Denoised:
        level = t if unit == "t" else jnp.exp(-schedule.log_snr(t) / 2)
        inside = (level >= low) & (level <= high)

        def outside() -> Denoised:
            # Both branches must return the same fields.
            denoised, like = plain(x, t, cond), jax.eval_shape(guided, x, t, cond)
            return dataclasses.replace(
                denoised,
                conditional=None if like.conditional is None else denoised.x0,
                x0_for_eps=None if like.x0_for_eps is None else denoised.x0,
                memory=None if like.memory is None else cond.get("memory", jnp.zeros_like(denoised.x0)),
            )

        if jnp.ndim(inside) == 0:
            return jax.lax.cond(inside, lambda: guided(x, t, cond), outside)
        return jax.tree.map(lambda a, b: jnp.where(expand(inside, a), a, b), guided(x, t, cond), outside())

    return restricted


def threshold(
    denoise: Denoiser,
    percentile: float = 1.0,
    limit: Traced = 1.0,
    sample_max_value: Traced = float("inf"),
    keep_noise: bool = False,
) -> Denoiser:
    """Keeps x0 in the range of the data, [-limit, limit], which high guidance exceeds.

    Args:
      percentile: 1 clips x0 (static thresholding). Below 1, x0 is clipped to [-s, s] and divided by s / limit, where s
        is this quantile of the example's |x0|, at least `limit` (dynamic thresholding; Saharia et al. 2022, arXiv
        2205.11487, section 2.3).
      limit: the largest absolute value of the data.
      sample_max_value: the highest s of dynamic thresholding, at least `limit`.
      keep_noise: whether eps remains that of x0 before it is clipped, as in diffusers, instead of that of the clipped
        x0. It requires a sampler that accepts a separate eps, such as `ddim`.
    """
    if not 0 < percentile <= 1:
        raise InputError("percentile", f"must be above 0 and at most 1, got {percentile}")

    def clipped(x: Array, t: Array, cond: Cond) -> Denoised:
        denoised = denoise(x, t, cond)
        if keep_noise and denoised.x0_for_eps is None:
            denoised = dataclasses.replace(denoised, x0_for_eps=denoised.x0)
        if percentile == 1:
            return dataclasses.replace(denoised, x0=jnp.clip(denoised.x0, -limit, limit))
        magnitudes = jnp.abs(denoised.x0).reshape(x.shape[0], -1)
        s = jnp.clip(jnp.quantile(magnitudes, percentile, axis=1), limit, sample_max_value)
        s = expand(s, x)
        return dataclasses.replace(denoised, x0=jnp.clip(denoised.x0, -s, s) * (limit / s))

    return clipped
