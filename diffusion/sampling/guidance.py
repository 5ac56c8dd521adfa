"""Guidance, by name: each takes a denoiser and gives back a denoiser, so they nest: `rescale(cfg(denoise, 3.0), 0.7)`.
Numbers may be traced arrays: changing them does not recompile.

The first half makes one answer of two (`cfg`, `apg`, `cfg_zero`, `cfg_pp`, `autoguidance`), or asks a model that has
learned to be guided (`guidance_embedding`); the second changes the answer of any denoiser (`rescale`, `interval`, `threshold`).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffusion.core.arrays import expand
from diffusion.core.types import Array, Cond, Denoised, Denoiser, InputError, Schedule
from diffusion.process.parameterization import velocity


def cfg(denoise: Denoiser, scale: float | Array = 1.0, *, negative: Any = None) -> Denoiser:
    """Classifier-free guidance, `uncond + scale (cond - uncond)`: 1 is conditional, 0 unconditional (Ho & Salimans
    2022, arXiv 2207.12598, whose w is scale - 1).

    Args:
      negative: a condition to guide away from, in place of none: entries of `cond`, each `[B, ...]` or one for all.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        kept, dropped = _both(denoise, x, t, cond, negative)
        return dataclasses.replace(kept, x0=dropped + scale * (kept.x0 - dropped))

    return guided


def apg(
    denoise: Denoiser,
    scale: float | Array = 1.0,
    eta: float | Array = 0.0,
    norm: float | Array = float("inf"),
    *,
    negative: Any = None,
) -> Denoiser:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), without its momentum: of the difference
    between conditional and unconditional x0, the part along the conditional one, which oversaturates, counts `eta`
    times.

    Args:
      scale: as in `cfg`, which this is with eta = 1.
      norm: the difference, as a vector over the whole example, is made no longer than this.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        kept, dropped = _both(denoise, x, t, cond, negative)
        difference = kept.x0 - dropped
        length = jnp.sqrt(_dot(difference, difference))
        difference *= expand(jnp.minimum(1, norm / jnp.maximum(length, 1e-12)), x)
        along = expand(_dot(difference, kept.x0) / jnp.maximum(_dot(kept.x0, kept.x0), 1e-12), x) * kept.x0
        return dataclasses.replace(kept, x0=kept.x0 + (scale - 1) * (difference - along + eta * along))

    return guided


def cfg_zero(
    denoise: Denoiser,
    scale: float | Array = 1.0,
    zero_above: float | Array = 1.0,
    *,
    schedule: Schedule,
    negative: Any = None,
) -> Denoiser:
    """CFG-Zero* for flows (Fan et al. 2025, arXiv 2503.18886): `cfg` on the velocities, the unconditional one first
    scaled to lie as near to the conditional one as it can.

    Args:
      zero_above: at times above it the velocity is 0: x stands still, as in the paper's first steps. Its x0 is then x
        itself, so do not rescale or clip around it.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        kept, dropped = _both(denoise, x, t, cond, negative)
        t = jnp.broadcast_to(t, x.shape[:1])
        row, alpha, sigma = velocity()(schedule, t), schedule.alpha(t), schedule.sigma(t)
        conditional, unconditional = (row.from_x0(x0, x, alpha, sigma) for x0 in (kept.x0, dropped))
        best = _dot(conditional, unconditional) / jnp.maximum(_dot(unconditional, unconditional), 1e-12)
        base = expand(best, x) * unconditional
        guided = jnp.where(expand(t > zero_above, x), 0, base + scale * (conditional - base))
        return dataclasses.replace(kept, x0=row.to_x0(guided, x))

    return guided


def cfg_pp(denoise: Denoiser, scale: float | Array = 0.6, *, negative: Any = None) -> Denoiser:
    """CFG++ (Chung et al. 2024, arXiv 2406.08070): x0 is guided, the noise is the unconditional one. For `ddim`,
    `euler` and `euler_ancestral`.

    Args:
      scale: in [0, 1], the paper's lambda: between the unconditional x0 and the conditional.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        kept, dropped = _both(denoise, x, t, cond, negative)
        return dataclasses.replace(kept, x0=dropped + scale * (kept.x0 - dropped), x0_for_eps=dropped)

    return guided


def autoguidance(denoise: Denoiser, scale: float | Array = 1.0, *, worse: Denoiser) -> Denoiser:
    """Guidance by a bad version of the model (Karras et al. 2024, arXiv 2406.02507): `worse + scale (denoise - worse)`.
    It needs no training without condition.

    Args:
      worse: the same objective with other parameters: of a smaller network, or of an earlier step.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        good, bad = denoise(x, t, cond), worse(x, t, cond)
        conditional = good.x0 if good.conditional is None else good.conditional
        return dataclasses.replace(good, x0=bad.x0 + scale * (good.x0 - bad.x0), conditional=conditional)

    return guided


def guidance_embedding(denoise: Denoiser, scale: float | Array = 1.0) -> Denoiser:
    """Tells the network the scale and leaves the rest to it, at the cost of one evaluation: for a model that was
    distilled from a guided one (Meng et al. 2023, arXiv 2210.03142), whose network has the condition `guidance`.

    Args:
      scale: as in `cfg`, within the range that the model was trained for.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        return denoise(x, t, {**cond, "guidance_scale": jnp.full(x.shape[:1], scale, jnp.float32)})

    return guided


def rescale(guided: Denoiser, factor: float | Array = 0.7) -> Denoiser:
    """Brings the guided x0 back to the standard deviation of the conditional one (Lin et al. 2024, arXiv 2305.08891,
    eq. 15 and 16).

    Args:
      guided: what guidance has made; another's answer has nothing to be brought back to.
      factor: how far, in [0, 1]: 0 leaves it as it is.
    """

    def rescaled(x: Array, t: Array, cond: Cond) -> Denoised:
        denoised = guided(x, t, cond)
        if denoised.conditional is None:
            raise InputError("guidance.rescale", "there is no guidance to rescale; put it around cfg")
        axes = tuple(range(1, x.ndim))
        wanted, found = (jnp.std(y, axis=axes, keepdims=True) for y in (denoised.conditional, denoised.x0))
        share = factor * wanted / jnp.maximum(found, 1e-12) + 1 - factor
        return dataclasses.replace(denoised, x0=denoised.x0 * share)

    return rescaled


def interval(
    guided: Denoiser,
    low: float | Array = 0.0,
    high: float | Array = float("inf"),
    unit: Literal["t", "sigma"] = "t",
    *,
    plain: Denoiser,
    schedule: Schedule,
) -> Denoiser:
    """Guidance only where the noise is between two levels, both included (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    Elsewhere the plain denoiser answers, at half the cost.

    Args:
      low, high: the levels.
      unit: what they are given in: time `t`, or `sigma` / alpha.
    """

    def chosen(x: Array, t: Array, cond: Cond) -> Denoised:
        level = t if unit == "t" else jnp.exp(-schedule.log_snr(t) / 2)
        inside = (level >= low) & (level <= high)

        def outside() -> Denoised:
            answer, like = plain(x, t, cond), jax.eval_shape(guided, x, t, cond)
            return dataclasses.replace(
                answer,
                conditional=None if like.conditional is None else answer.x0,
                x0_for_eps=None if like.x0_for_eps is None else answer.x0,
            )

        if jnp.ndim(inside) == 0:
            return jax.lax.cond(inside, lambda: guided(x, t, cond), outside)
        return jax.tree.map(lambda a, b: jnp.where(expand(inside, a), a, b), guided(x, t, cond), outside())

    return chosen


def threshold(denoise: Denoiser, percentile: float = 1.0, limit: float | Array = 1.0) -> Denoiser:
    """Keeps x0 in the range of the data, which high guidance leaves.

    Args:
      percentile: 1 clips (static thresholding). Below 1, the range is first widened to this share of the example's own
        values, and then scaled back (dynamic thresholding; Saharia et al. 2022, arXiv 2205.11487, section 2.3).
      limit: of the data, in absolute value.
    """
    if not 0 < percentile <= 1:
        raise InputError("percentile", f"must be above 0 and at most 1, got {percentile}")

    def kept(x: Array, t: Array, cond: Cond) -> Denoised:
        denoised = denoise(x, t, cond)
        if percentile == 1:
            return dataclasses.replace(denoised, x0=jnp.clip(denoised.x0, -limit, limit))
        size = jnp.abs(denoised.x0).reshape(x.shape[0], -1)
        wide = expand(jnp.maximum(jnp.quantile(size, percentile, axis=1), limit), x)
        return dataclasses.replace(denoised, x0=jnp.clip(denoised.x0, -wide, wide) * (limit / wide))

    return kept


def _both(denoise: Denoiser, x: Array, t: Array, cond: Cond, negative: Cond | None) -> tuple[Denoised, Array]:
    """The answer with the condition, and x0 without.

    Both go through the network as one batch of 2B. An example's two rows stand side by side, so a batch that is sharded
    over devices stays where it is.
    """
    twice = {name: jnp.repeat(value, 2, axis=0) for name, value in cond.items()}
    if not negative:
        twice["keep"] = jnp.tile(jnp.array([True, False]), x.shape[0])
    else:
        for name, value in negative.items():
            if name not in cond:
                raise InputError("guidance.negative", f"the model has no condition {name!r}")
            twice[name] = twice[name].at[1::2].set(value)
    both = denoise(jnp.repeat(x, 2, axis=0), jnp.repeat(jnp.broadcast_to(t, x.shape[:1]), 2), twice)
    kept = jax.tree.map(lambda rows: rows[0::2], both)
    return dataclasses.replace(kept, conditional=kept.x0), both.x0[1::2]


def _dot(a: Array, b: Array) -> Array:
    """The product over all axes but the first, `[B]`."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))
