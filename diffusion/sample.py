"""Sampling: the one scan, and the driver that draws many samples in batches of one size."""

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.arrays import expand, fold, normal, sample_keys
from diffusion.types import Array, Cond, Denoiser, Sampler, Schedule


def bind(denoise: Denoiser, cond: Cond) -> Denoiser:
    """The condition fixed: what a sampler sees is `denoise(x, t)`."""
    return lambda x, t: denoise(x, t, cond)


def prior(schedule: Schedule, t: Array, keys: Array, shape: tuple[int, ...]) -> Array:
    """Where sampling starts: sigma(t) times standard normal noise, `[B, *shape]`, each sample from its own key."""
    noise = normal(fold(keys, 0), shape)
    return expand(schedule.sigma(t), noise) * noise


def sample(
    denoise: Denoiser, schedule: Schedule, sampler: Sampler, x: Array, times: Array, key: Array, *, unroll: int = 1
) -> Array:
    """Takes x from `times[0]` to `times[-1]` in one scan. Pure, to be jitted by the caller.

    Args:
      denoise: `denoise(x, t) -> Denoised`, the condition bound already.
      schedule: the one that the denoiser was trained with.
      sampler: the solver.
      x: `[B, ...]` at `times[0]`.
      times: `[N + 1]`, falling; one of `diffusion.grids` makes them.
      key: one key, or a key a sample `[B]`; one key stands for `sample_keys(key, arange(B))`.
      unroll: steps to a loop iteration.

    Returns:
      x at `times[-1]`, `[B, ...]`; x0 if that is 0.
    """
    keys = key if key.shape == x.shape[:1] else sample_keys(key, jnp.arange(x.shape[0]))

    def body(carry, inputs):
        i, t, s = inputs
        return sampler.step(carry, denoise, schedule, t, s, fold(keys, i)), None

    # Step i's noise comes from number i + 1: `prior` has used 0.
    inputs = (jnp.arange(1, times.shape[0]), times[:-1], times[1:])
    carry, _ = jax.lax.scan(body, sampler.init(x, times), inputs, unroll=unroll)
    return sampler.finish(carry)


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
