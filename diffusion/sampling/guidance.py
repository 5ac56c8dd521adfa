"""Guidance by name: each function maps a denoiser to a denoiser, so that they nest: `rescale(cfg(denoise, 3.0), 0.7)`.

    predictions with and without the conditions   cfg, apg, cfg_zero, cfg_pp
    the same with one condition after another     cfg_per_condition
    predictions of two models                     autoguidance
    a network with the scale as an input          guidance_embedding
    any denoiser's output, modified               rescale, interval, threshold

Traced and static keywords. Keywords annotated `Traced` (`float | Array`), or a mapping to it, enter the compiled
sampler as arguments: a new value does not recompile it. All other keywords are static: they are compiled in.
`diffusion.pipelines.generator` reads the annotations to decide which is which, so a new guidance function must annotate
its numbers with `Traced` unless they affect shapes or Python control flow. The keywords `denoise`, `guided`, `plain`,
`worse` and `schedule` are not options: the caller supplies them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffusion.core.arrays import expand, kept, per_example
from diffusion.core.types import SCALAR_CONDITIONS, Array, Cond, Denoised, Denoiser, InputError, Schedule
from diffusion.process.parameterization import velocity

Traced = float | Array  # a number that may change without recompilation


def cfg(denoise: Denoiser, scale: Traced = 1.0, *, negative: Any = None) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, whose w is scale - 1):

        x0 = x0_uncond + scale (x0_cond - x0_uncond)

    Args:
      scale: 0 is unconditional, 1 conditional; above 1 guides.
      negative: conditions to guide away from, which replace the unconditional ones: entries of `cond`, arrays or a
        `Text`, each `[B, ...]` or one value for all examples.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        conditional, uncond = _conditional_and_unconditional(denoise, x, t, cond, negative)
        return dataclasses.replace(conditional, x0=uncond + scale * (conditional.x0 - uncond))

    return guided


def apg(
    denoise: Denoiser,
    scale: Traced = 1.0,
    eta: Traced = 0.0,
    norm: Traced = float("inf"),
    *,
    negative: Any = None,
) -> Denoiser:
    """Adaptive projected guidance without momentum (Sadat et al. 2024, arXiv 2410.02416):

        d  = (x0_cond - x0_uncond) min(1, norm / |x0_cond - x0_uncond|)
        x0 = x0_cond + (scale - 1) (d_orthogonal + eta d_parallel)

    where d_parallel is the projection of d onto x0_cond, which causes oversaturation.

    Args:
      scale: as in `cfg`, which is the special case of eta = 1 and an infinite norm.
      eta: the weight of the parallel part.
      norm: the largest length of the difference, as a vector over the whole example.
      negative: as in `cfg`.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        conditional, uncond = _conditional_and_unconditional(denoise, x, t, cond, negative)
        x0 = conditional.x0
        difference = x0 - uncond
        length = jnp.sqrt(_dot(difference, difference))
        difference *= expand(jnp.minimum(1, norm / jnp.maximum(length, 1e-12)), x)
        parallel = expand(_dot(difference, x0) / jnp.maximum(_dot(x0, x0), 1e-12), x) * x0
        return dataclasses.replace(conditional, x0=x0 + (scale - 1) * (difference - parallel + eta * parallel))

    return guided


def cfg_zero(
    denoise: Denoiser,
    scale: Traced = 1.0,
    zero_above: Traced = 1.0,
    *,
    schedule: Schedule,
    negative: Any = None,
) -> Denoiser:
    """CFG-Zero* for flows (Fan et al. 2025, arXiv 2503.18886), on the velocities:

        v = s v_uncond + scale (v_cond - s v_uncond),    s = <v_cond, v_uncond> / |v_uncond|^2

    Args:
      scale: as in `cfg`.
      zero_above: at times above it the velocity is 0, so that x does not change, as in the paper's first steps. The x0
        of such a step is x itself, so do not rescale or clip it.
      negative: as in `cfg`.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        conditional, uncond = _conditional_and_unconditional(denoise, x, t, cond, negative)
        t = per_example(t, x)
        coeffs, alpha, sigma = velocity()(schedule, t), schedule.alpha(t), schedule.sigma(t)
        v_cond, v_uncond = (coeffs.from_x0(x0, x, alpha, sigma) for x0 in (conditional.x0, uncond))
        projection = _dot(v_cond, v_uncond) / jnp.maximum(_dot(v_uncond, v_uncond), 1e-12)
        base = expand(projection, x) * v_uncond
        v = jnp.where(expand(t > zero_above, x), 0, base + scale * (v_cond - base))
        return dataclasses.replace(conditional, x0=coeffs.to_x0(v, x))

    return guided


def cfg_pp(denoise: Denoiser, scale: Traced = 0.6, *, negative: Any = None) -> Denoiser:
    """CFG++ (Chung et al. 2024, arXiv 2406.08070): x0 is guided, and the noise is the unconditional one.

        x0 = x0_uncond + scale (x0_cond - x0_uncond),    eps = (x_t - alpha_t x0_uncond) / sigma_t

    It requires a sampler that accepts a separate eps, such as `ddim`.

    Args:
      scale: the paper's lambda in [0, 1], which interpolates between the unconditional x0 and the conditional one.
      negative: as in `cfg`.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        conditional, uncond = _conditional_and_unconditional(denoise, x, t, cond, negative)
        x0 = uncond + scale * (conditional.x0 - uncond)
        return dataclasses.replace(conditional, x0=x0, x0_for_eps=uncond)

    return guided


def cfg_per_condition(denoise: Denoiser, scales: Mapping[str, Traced]) -> Denoiser:
    """Classifier-free guidance with one scale per condition (InstructPix2Pix: Brooks et al. 2022, arXiv 2211.09800,
    eq. 3): with x0_i the prediction with the first i conditions of `scales` alone, for i from 0 to n,

        x0 = x0_0 + sum_i scale_i (x0_i - x0_(i-1))

    All n + 1 are evaluated as one batch. The model must have been trained with each condition dropped alone and with
    all dropped together: `train.cond_drop_rate` is a mapping with `joint`.

    Args:
      scales: a scale for each condition of the model, in the order in which they are added. A config file sorts its
        mappings by name; the order of a flag or of a Python dict is kept.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        given = _names(cond)
        if sorted(scales) != given:
            raise InputError("guidance.scales", f"must name every condition of the model, {given}, got {list(scales)}")
        rows = len(scales) + 1
        copies = jax.tree.map(lambda value: jnp.repeat(value, rows, axis=0), dict(cond))
        added = jnp.arange(rows) > jnp.arange(len(scales))[:, None]  # [n, rows]: row i keeps the first i conditions
        copies["keep"] = {
            name: jnp.tile(row, x.shape[0]) & kept(copies, name) for name, row in zip(scales, added, strict=True)
        }
        t = jnp.repeat(per_example(t, x), rows, axis=0)
        every = denoise(jnp.repeat(x, rows, axis=0), t, copies)
        conditional = jax.tree.map(lambda leaf: leaf[rows - 1 :: rows], every)
        x0 = every.x0[0::rows]
        for index, scale in enumerate(scales.values(), 1):
            x0 += scale * (every.x0[index::rows] - every.x0[index - 1 :: rows])
        return dataclasses.replace(conditional, x0=x0, conditional=conditional.x0)

    return guided


def autoguidance(denoise: Denoiser, scale: Traced = 1.0, *, worse: Denoiser) -> Denoiser:
    """Guidance by a worse version of the model (Karras et al. 2024, arXiv 2406.02507):

        x0 = x0_worse + scale (x0 - x0_worse)

    The model need not be trained with dropped conditions.

    Args:
      scale: 1 is the model itself; above 1 guides.
      worse: the same objective with other parameters: of a smaller network, or of an earlier step.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        good, bad = denoise(x, t, cond), worse(x, t, cond)
        conditional = good.x0 if good.conditional is None else good.conditional
        return dataclasses.replace(good, x0=bad.x0 + scale * (good.x0 - bad.x0), conditional=conditional)

    return guided


def guidance_embedding(denoise: Denoiser, scale: Traced = 1.0) -> Denoiser:
    """Passes the scale to the network as its condition `guidance_scale`, at the cost of one evaluation.

    It is for models distilled from a guided one (guidance distillation; Meng et al. 2023, arXiv 2210.03142), whose
    network has the guidance scale as an input.

    Args:
      scale: as in `cfg`, within the range that the model was trained for.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        return denoise(x, t, {**cond, "guidance_scale": jnp.full(x.shape[:1], scale, jnp.float32)})

    return guided


def rescale(guided: Denoiser, factor: Traced = 0.7) -> Denoiser:
    """Rescales the guided x0 towards the standard deviation of the conditional one.

        x0 <- factor x0 std(x0_cond) / std(x0) + (1 - factor) x0

    (Lin et al. 2024, arXiv 2305.08891, eq. 15 and 16.)

    Args:
      guided: a guided denoiser; others have no conditional x0 to compare with.
      factor: in [0, 1]: 0 leaves x0 unchanged, 1 restores the standard deviation fully.
    """

    def rescaled(x: Array, t: Array, cond: Cond) -> Denoised:
        denoised = guided(x, t, cond)
        if denoised.conditional is None:
            raise InputError("guidance.rescale", "requires guidance; apply it to the result of cfg, for example")
        axes = tuple(range(1, x.ndim))
        std_cond, std = (jnp.std(y, axis=axes, keepdims=True) for y in (denoised.conditional, denoised.x0))
        ratio = factor * std_cond / jnp.maximum(std, 1e-12) + 1 - factor
        return dataclasses.replace(denoised, x0=denoised.x0 * ratio)

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


def _conditional_and_unconditional(
    denoise: Denoiser, x: Array, t: Array, cond: Cond, negative: Cond | None
) -> tuple[Denoised, Array]:
    """Returns the prediction with the condition, and x0 without it (or with the negative one).

    Both are evaluated as one batch of 2B, in which the two rows of an example are adjacent, so that a batch that is
    sharded over devices stays in place.
    """
    doubled = jax.tree.map(lambda value: jnp.repeat(value, 2, axis=0), dict(cond))
    if not negative:
        first = jnp.tile(jnp.array([True, False]), x.shape[0])
        # What the caller drops stays dropped: there, the prediction is the unconditional one at every scale.
        if isinstance(cond.get("keep"), Mapping):
            doubled["keep"] = {name: first & kept(doubled, name) for name in _names(cond)}
        else:
            doubled["keep"] = first & kept(doubled)
    else:
        for name, value in negative.items():
            if name not in cond:
                raise InputError("guidance.negative", f"must name conditions of the model, got {name!r}")
            doubled[name] = jax.tree.map(lambda rows, value: rows.at[1::2].set(value), doubled[name], value)
    both = denoise(jnp.repeat(x, 2, axis=0), jnp.repeat(per_example(t, x), 2, axis=0), doubled)
    conditional = jax.tree.map(lambda rows: rows[0::2], both)
    return dataclasses.replace(conditional, conditional=conditional.x0), both.x0[1::2]


def _names(cond: Cond) -> list[str]:
    """Returns the names of the conditions of the data."""
    return sorted(cond.keys() - {"keep", "target_time", *SCALAR_CONDITIONS})


def _dot(a: Array, b: Array) -> Array:
    """Returns the inner product per example, `[B]`."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))
