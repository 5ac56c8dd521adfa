"""Sampling: the one scan, from noise to data or back, and the driver that draws many samples in batches of one size."""

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand, fold, normal, sample_keys
from diffusion.core.types import Array, Cond, Denoised, Denoiser, InputError, Sampler, Schedule


def bind(denoise: Denoiser, cond: Cond) -> Denoiser:
    """The condition fixed: what a sampler sees is `denoise(x, t)`, to which it may add conditions of its own."""
    return lambda x, t, **more: denoise(x, t, {**cond, **more})


def prior(schedule: Schedule, t: Array, keys: Array, shape: tuple[int, ...]) -> Array:
    """Where sampling starts: sigma(t) times standard normal noise, `[B, *shape]`, each sample from its own key."""
    noise = normal(fold(keys, 0), shape)
    return expand(schedule.sigma(t), noise) * noise


def noised(schedule: Schedule, x0: Array, t: Array, keys: Array) -> Array:
    """Where sampling starts from an example `x0 [B, ...]` and not from nothing: x_t with the noise of `prior`. With
    times that begin at t < 1, it is the start of image-to-image."""
    return expand(schedule.alpha(t), x0) * x0 + prior(schedule, t, keys, x0.shape[1:])


def sample(
    denoise: Denoiser,
    schedule: Schedule,
    sampler: Sampler,
    x: Array,
    times: Array,
    key: Array,
    *,
    unroll: int = 1,
    trajectory: bool = False,
) -> Array:
    """Takes x from `times[0]` to `times[-1]` in one scan. Pure, to be jitted by the caller.

    Args:
      denoise: `denoise(x, t) -> Denoised`, the condition bound already.
      schedule: the one that the denoiser was trained with.
      sampler: the solver.
      x: `[B, ...]` at `times[0]`.
      times: `[N + 1]`, falling; one of `diffusion.grids` makes them. They may begin at any t and end at any.
      key: one key, or a key a sample `[B]`; one key stands for `sample_keys(key, arange(B))`.
      unroll: steps to a loop iteration: more may be faster on a GPU with a small network, and takes longer to compile.
      trajectory: give back x at all times.

    Returns:
      x at `times[-1]`, `[B, ...]`, which is x0 if that is 0; with `trajectory` x at each of `times`, `[N + 1, B, ...]`.
    """
    keys = key if key.shape == x.shape[:1] else sample_keys(key, jnp.arange(x.shape[0]))
    asked = denoise if sampler.uses_separate_eps else _with_one_x0(denoise)

    def body(carry, inputs):
        i, t, s = inputs
        carry = sampler.step(carry, asked, schedule, t, s, fold(keys, i))
        return carry, sampler.finish(carry) if trajectory else None

    # Step i's noise comes from number i + 1: `prior` has used 0.
    inputs = (jnp.arange(1, times.shape[0]), times[:-1], times[1:])
    carry, states = jax.lax.scan(body, sampler.init(x, times), inputs, unroll=unroll)
    return jnp.concatenate([x[None], states]) if trajectory else sampler.finish(carry)


def invert(
    denoise: Denoiser, schedule: Schedule, sampler: Sampler, x0: Array, times: Array, *, unroll: int = 1
) -> Array:
    """The noise that a solver of the ODE takes to `x0 [B, ...]`: `sample` on the same times, backwards (DDIM inversion;
    Song, Meng & Ermon 2021, arXiv 2010.02502, section 4.3). Sampling from it gives x0 back, up to the solver's error.

    Args:
      times: `[N + 1]`, falling to 0, as for `sample`. At 0 there is no noise yet that could have a direction, so x0 is
        taken for the mean of x at the time before.

    Returns:
      x at `times[0]`.

    Raises:
      InputError: the sampler is stochastic.
    """
    if sampler.stochastic:
        raise InputError("sampler.name", "draws noise, so nothing leads back; use one that solves the ODE, as ddim")
    rising = times[:-1][::-1]
    x = expand(schedule.alpha(rising[0]), x0) * x0
    return sample(denoise, schedule, sampler, x, rising, jax.random.key(0), unroll=unroll)


def _with_one_x0(denoise: Denoiser) -> Denoiser:
    def asked(x: Array, t: Array, **more: Array) -> Denoised:
        denoised = denoise(x, t, **more)
        if denoised.x0_for_eps is not None:
            raise InputError(
                "guidance.name", "cfg_pp takes the noise from elsewhere than x0: use ddim, euler or euler_ancestral"
            )
        return denoised

    return asked


def in_batches(
    draw: Callable[[Array, Mapping[str, np.ndarray]], Array],
    cond: Mapping[str, np.ndarray],
    num: int,
    batch_size: int,
    key: Array,
) -> Iterator[np.ndarray]:
    """Draws `num` samples in batches of exactly `batch_size`; the last is padded and cut.

    Args:
      draw: `draw(keys [B], cond [B]) -> x [B, ...]`, jitted; it is compiled for the one size.
      cond: conditions, each `[num, ...]`.
      key: sample i has the key `sample_keys(key, i)`, so the batch size does not change it.

    Yields:
      Samples, at most `batch_size` at a time. The device works on the next batch while the caller has this one.
    """
    waiting = None
    for start in range(0, num, batch_size):
        indices = np.minimum(np.arange(start, start + batch_size), num - 1)
        x = draw(sample_keys(key, jnp.asarray(indices)), {name: value[indices] for name, value in cond.items()})
        if waiting is not None:
            yield np.asarray(waiting)
        waiting = x[: num - start]
    yield np.asarray(waiting)
