"""Guidance by predictions with and without the conditions; see `diffusion.sampling.guidance`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand, kept, per_example
from diffusion.core.types import Array, Cond, Denoised, Denoiser, InputError, Schedule
from diffusion.process.parameterization import velocity
from diffusion.sampling.guidance.common import Traced, conditional_and_unconditional, dot, names


def cfg(denoise: Denoiser, scale: Traced = 1.0, *, negative: Any = None) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, whose w is scale - 1):

        x0 = x0_uncond + scale (x0_cond - x0_uncond)

    Args:
      scale: 0 is unconditional, 1 conditional; above 1 guides.
      negative: conditions to guide away from, which replace the unconditional ones: entries of `cond`, arrays or a
        `Text`, each `[B, ...]` or one value for all examples.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        conditional, uncond = conditional_and_unconditional(denoise, x, t, cond, negative)
        return dataclasses.replace(conditional, x0=uncond + scale * (conditional.x0 - uncond))

    return guided


def apg(
    denoise: Denoiser,
    scale: Traced = 1.0,
    eta: Traced = 0.0,
    norm: Traced = float("inf"),
    momentum: float = 0.0,
    *,
    negative: Any = None,
) -> Denoiser:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416):

        m  = x0_cond - x0_uncond + momentum m_previous
        d  = m min(1, norm / |m|)
        x0 = x0_cond + (scale - 1) (d_orthogonal + eta d_parallel)

    where d_parallel is the projection of d onto x0_cond, which causes oversaturation.

    Args:
      scale: as in `cfg`, which is the special case of eta = 1 and an infinite norm.
      eta: the weight of the parallel part.
      norm: the largest length of the difference, as a vector over the whole example.
      momentum: the share of the last step's m, in (-1, 1); the paper's is negative, -0.5 or -0.75. Other than at 0, the
        denoiser has a memory (`Denoised.memory`), so that it requires `sampling.loop.sample(..., memory=True)`.
      negative: as in `cfg`.
    """

    if not -1 < momentum < 1:
        raise InputError("momentum", f"must be above -1 and below 1, got {momentum}")

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        previous, cond = cond.get("memory"), {key: value for key, value in cond.items() if key != "memory"}
        conditional, uncond = conditional_and_unconditional(denoise, x, t, cond, negative)
        x0 = conditional.x0
        difference = x0 - uncond
        if momentum:
            difference += momentum * (0 if previous is None else previous)
            conditional = dataclasses.replace(conditional, memory=difference)
        length = jnp.sqrt(dot(difference, difference))
        difference *= expand(jnp.minimum(1, norm / jnp.maximum(length, 1e-12)), x)
        parallel = expand(dot(difference, x0) / jnp.maximum(dot(x0, x0), 1e-12), x) * x0
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
        conditional, uncond = conditional_and_unconditional(denoise, x, t, cond, negative)
        t = per_example(t, x)
        coeffs, alpha, sigma = velocity()(schedule, t), schedule.alpha(t), schedule.sigma(t)
        v_cond, v_uncond = (coeffs.from_x0(x0, x, alpha, sigma) for x0 in (conditional.x0, uncond))
        projection = dot(v_cond, v_uncond) / jnp.maximum(dot(v_uncond, v_uncond), 1e-12)
        base = expand(projection, x) * v_uncond
        v = jnp.where(expand(t > zero_above, x), 0, base + scale * (v_cond - base))
        return dataclasses.replace(conditional, x0=coeffs.to_x0(v, x))

    return guided


def fdg(denoise: Denoiser, scale: Traced = 1.0, low_scale: Traced = 1.0, *, negative: Any = None) -> Denoiser:
    """Frequency-decoupled guidance (Sadat et al. 2025, arXiv 2506.19713): `cfg` with two scales, for images.

        x0 = x0_uncond + low_scale low(d) + scale (d - low(d)),    d = x0_cond - x0_uncond

    where low(d) is what a Laplacian pyramid of two levels has at its lower resolution.

    Args:
      scale: of the high frequencies, which give detail; as in `cfg`.
      low_scale: of the low frequencies, which high scales oversaturate.
      negative: as in `cfg`.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        if x.ndim < 4 or x.shape[-3] % 2 or x.shape[-2] % 2:
            raise InputError("guidance.name", "must be cfg: fdg requires images with an even height and width")
        conditional, uncond = conditional_and_unconditional(denoise, x, t, cond, negative)
        difference = conditional.x0 - uncond
        by_row, by_column = _low_pass(x.shape[-3]), _low_pass(x.shape[-2])
        low = jnp.einsum("ri,cj,...ijf->...rcf", by_row, by_column, difference)
        return dataclasses.replace(conditional, x0=uncond + low_scale * low + scale * (difference - low))

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
        conditional, uncond = conditional_and_unconditional(denoise, x, t, cond, negative)
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
        given = names(cond)
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


def _low_pass(length: int) -> np.ndarray:
    """Returns the matrix `[length, length]` that halves a vector and doubles it again, as Laplacian pyramids do.

    Halving is a blur by (1, 4, 6, 4, 1) / 16, with reflection at the ends, and the mean of pairs. Doubling is linear
    interpolation and the same blur.
    """
    continued = np.pad(np.eye(length), ((2, 2), (0, 0)), mode="reflect" if length > 2 else "symmetric")
    blur = sum(weight * continued[start : start + length] for start, weight in enumerate((1, 4, 6, 4, 1))) / 16
    halve = np.repeat(np.eye(length // 2), 2, axis=1) / 2
    near = np.pad(np.eye(length // 2), ((1, 1), (0, 0)), mode="edge")
    double = np.stack([(near[:-2] + 3 * near[1:-1]) / 4, (3 * near[1:-1] + near[2:]) / 4], axis=1)
    return np.float32(blur @ double.reshape(length, -1) @ halve @ blur)
