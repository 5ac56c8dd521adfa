"""Pseudoinverse guidance: samples given a measurement y = A x0 + noise (Song et al. 2023, "Pseudoinverse-guided
diffusion models for inverse problems", ICLR).

    x0 <- x0 + (sigma^2 / alpha) (d x0 / d x_t)^T A^T (r^2 A A^T + noise^2)^-1 (y - A x0)

where r^2 is the variance of x0 given x_t alone, of data of a standard deviation s: r^2 = s^2 sigma^2 / (alpha^2 s^2 +
sigma^2). It is exact for Gaussian data of this standard deviation, for which sigma^2 / alpha times the derivative is
r^2; close to pure noise, where a network determines its derivative poorly, r^2 replaces the two. The derivative doubles
the cost of an evaluation.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import expand
from diffusion.core.types import Array, Denoised, InputError
from diffusion.sampling.editing import operators
from diffusion.sampling.editing.common import Editing, Hooks, Sampling

LEAST = 0.02  # of alpha; below, the derivative is not used
TINY = 1e-12  # variance at t = 0


def make(
    operator: operators.Name = "inpainting",
    factor: int = 4,
    blur: float = 2.0,
    noise: float = 0.0,
    data_std: float = 1.0,
) -> Editing:
    """Builds the method.

    Args:
      operator: What is known of an image; see `operators.make`.
      factor: The reduction of `super_resolution`.
      blur: The standard deviation of `deblurring` in pixels.
      noise: The standard deviation of the noise in what is known. Deblurring needs some.
      data_std: The standard deviation s of the data; the authors take 1.
    """
    checks.at_least(1, factor=factor)
    checks.positive(data_std=data_std, blur=blur)
    checks.at_least(0, noise=noise)
    if operator == "deblurring" and not noise:
        raise InputError("noise", "must be positive for deblurring, which removes fine detail entirely, got 0")

    def hooks(sampling: Sampling) -> Hooks:
        denoise, schedule, known = sampling.denoise, sampling.schedule, sampling.known
        linear, y = operators.make(operator, known, factor, blur), known.image
        y = linear.apply(y) if operator == "inpainting" else y

        def guided(x: Array, t: Array, **more: Array) -> Denoised:
            def estimate(x: Array) -> tuple[Array, Denoised]:
                denoised = denoise(x, t, **more)
                return denoised.x0, denoised

            x0, pull, denoised = jax.vjp(estimate, x, has_aux=True)
            alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
            variance = (data_std * sigma) ** 2 / ((alpha * data_std) ** 2 + sigma**2)
            error = linear.solve(y - linear.apply(x0), jnp.maximum(variance, TINY), noise**2)
            residual = linear.transpose(error).astype(x0.dtype)
            (gradient,) = pull(residual)
            change = jnp.where(alpha > LEAST, sigma**2 / jnp.maximum(alpha, LEAST) * gradient, variance * residual)
            return dataclasses.replace(denoised, x0=x0 + change)

        return Hooks(guided)

    return Editing(
        hooks,
        needs_mask=operator == "inpainting",
        measured=lambda shape: shape if operator == "inpainting" else operators.measured(operator, shape, factor),
    )
