"""Guidance by random changes of the conditions; see `diffusion.sampling.guidance`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion.core.arrays import expand, fold, normal
from diffusion.core.types import LABEL_NOISE, Array, Cond, ConditionSpec, Denoised, Denoiser, InputError, Text
from diffusion.sampling.guidance.common import Traced, conditional_and_unconditional, keys_at, statistics, time_of


def icg(denoise: Denoiser, scale: Traced = 1.0, *, keys: Array, conditions: Mapping[str, ConditionSpec]) -> Denoiser:
    """Independent condition guidance (Sadat et al. 2024, arXiv 2407.02687): `cfg` for a model that was trained without
    dropped conditions. A random condition, independent of x, replaces the missing one.

        x0 = x0_random + scale (x0_cond - x0_random)

    Labels, and tokens that the network embeds itself, are drawn uniformly. Arrays are drawn from a normal distribution
    with the mean and the standard deviation of the values of the example's own.

    Args:
      scale: as in `cfg`.
      keys: the keys of the samples, `[B]`.
      conditions: the conditions of the model; none may be a `scalar`.
    """
    if not conditions:
        raise InputError("name", "requires a model with conditions; use pag, for example")
    for name, spec in conditions.items():
        if spec.kind == "scalar":
            raise InputError("name", f"cannot draw the scalar {name!r}, whose range is not known; use cfg")

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        time = time_of(t, x)
        random = {
            name: _random(conditions[name], cond[name], keys_at(keys, time, index))
            for index, name in enumerate(sorted(conditions))
        }
        conditional, independent = conditional_and_unconditional(denoise, x, t, cond, random)
        return dataclasses.replace(conditional, x0=independent + scale * (conditional.x0 - independent))

    return guided


def cads(
    guided: Denoiser,
    tau1: Traced = 0.6,
    tau2: Traced = 0.9,
    noise_scale: Traced = 0.25,
    psi: Traced = 1.0,
    *,
    keys: Array,
    conditions: Mapping[str, ConditionSpec],
) -> Denoiser:
    """Condition-annealed sampling (CADS; Sadat et al. 2023, arXiv 2310.17347, eq. 1 to 4): adds noise z to the
    conditions y at high noise levels, so that samples of the same condition differ more.

        gamma = clip((tau2 - t) / (tau2 - tau1), 0, 1)
        y_noisy = sqrt(gamma) y + noise_scale sqrt(1 - gamma) z
        y <- psi (y_noisy normalised to the mean and standard deviation of y) + (1 - psi) y_noisy

    It changes vectors, images, texts whose tokens are vectors, and the embeddings of labels inside the network; the
    other conditions stay as they are.

    Args:
      guided: any denoiser, whose conditions are changed.
      tau1: from this time on the condition is the original one.
      tau2: above this time the condition is noise alone.
      noise_scale: the paper's s, in the units of the condition.
      psi: in [0, 1]: how far mean and standard deviation are restored.
      keys, conditions: as in `icg`.
    """
    changed = [name for name, spec in sorted(conditions.items()) if spec.kind in ("vector", "image", "text")
               and not spec.vocabulary]  # fmt: skip
    if not changed and "label" not in conditions:
        raise InputError("conditions", "requires a condition that is a label, a vector, an image or a text of vectors")

    def annealed(x: Array, t: Array, cond: Cond) -> Denoised:
        time = time_of(t, x)
        gamma = jnp.clip((tau2 - time) / (tau2 - tau1), 0, 1)
        scale, restored = (jnp.broadcast_to(number, time.shape) for number in (noise_scale, psi))

        def noise(index: int) -> Noise:
            return Noise(keys_at(keys, time, index), gamma, scale, restored)

        values = dict(cond)
        if "label" in conditions:
            values[LABEL_NOISE] = noise(2 * len(changed))
        for index, name in enumerate(changed):
            value = cond[name]
            if isinstance(value, Text):
                pooled = None if value.pooled is None else noise(2 * index + 1)(value.pooled)
                values[name] = Text(noise(2 * index)(value.tokens, value.mask[..., None]), value.mask, pooled)
            else:
                values[name] = noise(2 * index)(value)
        return guided(x, t, values)

    return annealed


class Noise(NamedTuple):
    """The noise of `cads`, a function of a condition `[B, ...]`.

    Attributes:
      keys: a random key per example, `[B]`.
      gamma, scale, psi: its numbers, `[B]` each; at gamma = 1 there is none.
    """

    keys: Array
    gamma: Array
    scale: Array
    psi: Array

    def __call__(self, value: Array, where: Array | None = None) -> Array:
        """Returns the noisy condition, whose statistics are those of the entries `where` is True."""
        gamma, scale, psi = (expand(number, value) for number in self[1:])
        noise = normal(self.keys, value.shape[1:])
        noisy = jnp.sqrt(gamma) * value + scale * jnp.sqrt(1 - gamma) * noise
        (mean, std), (noisy_mean, noisy_std) = statistics(value, where), statistics(noisy, where)
        normalised = (noisy - noisy_mean) / jnp.maximum(noisy_std, 1e-12) * std + mean
        return jnp.where(gamma < 1, psi * normalised + (1 - psi) * noisy, value).astype(value.dtype)


def _random(spec: ConditionSpec, value: Any, keys: Array) -> Any:
    """Returns random conditions `[B, ...]` in place of given ones."""

    def integers(array: Array, most: int) -> Array:
        return jax.vmap(lambda key: jax.random.randint(key, array.shape[1:], 0, most))(keys)

    def like(array: Array, keys: Array, where: Array | None = None) -> Array:
        mean, std = statistics(array, where)
        return mean + std * normal(keys, array.shape[1:])

    if spec.kind == "label":
        return integers(value, spec.num_classes)
    if not isinstance(value, Text):
        return like(value, keys)
    where = value.mask[..., None]
    tokens = integers(value.tokens, spec.vocabulary) if spec.vocabulary else like(value.tokens, keys, where)
    return Text(tokens, value.mask, None if value.pooled is None else like(value.pooled, fold(keys, 1)))
