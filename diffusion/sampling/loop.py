"""The sampling loop: one `jax.lax.scan` from noise to data or back, and a driver that draws samples in batches.

    network, schedule  ->  objective.denoiser  ->  denoise(x, t, cond)
                                                       |
    guidance (nested)  ->  cfg, rescale, ...   ->  denoise(x, t, cond)     evaluates the network on 2B rows, for example
                                                       |
    conditions [B]     ->  bind                ->  denoise(x, t)
                                                       |
                     times[0]                          v                          times[-1]
    keys [B] -> prior ----> sampler.init -> carry -> sampler.step -> carry -> ... ----> sampler.finish -> x [B, ...]
                                                |____________________________|
                                      scan over the pairs (t, s) = (times[i], times[i + 1])

A sampler sees neither conditions nor guidance: it calls `denoise(x, t)` for an estimate of x0. For image-to-image,
`noised` replaces `prior`. `invert` runs an ODE solver on the same times in the opposite direction.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand, fold, normal, sample_keys
from diffusion.core.types import Array, Cond, Denoised, Denoiser, InputError, Sampler, Schedule


def bind(denoise: Denoiser, cond: Cond) -> Denoiser:
    """Returns `denoise(x, t, **more)` with the conditions fixed; a sampler may add further ones as `more`."""
    return lambda x, t, **more: denoise(x, t, {**cond, **more})


def prior(schedule: Schedule, t: Array, keys: Array, shape: tuple[int, ...]) -> Array:
    """Draws the initial x_t, sigma(t) times standard normal noise, `[B, *shape]`, each sample from its own key."""
    noise = normal(fold(keys, 0), shape)
    return expand(schedule.sigma(t), noise) * noise


def noised(schedule: Schedule, x0: Array, t: Array, keys: Array) -> Array:
    """Draws the initial x_t from an example `x0 [B, ...]`, with the noise of `prior`.

    With times that begin at t < 1, this is the start of image-to-image sampling.
    """
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
    """Integrates x from `times[0]` to `times[-1]` in one scan. The function is pure; the caller jits it.

    Args:
      denoise: `denoise(x, t) -> Denoised`, with the conditions bound.
      schedule: the schedule that the denoiser was trained with.
      sampler: the solver.
      x: `[B, ...]`, the state at `times[0]`.
      times: `[N + 1]`, decreasing, from any t to any other; see `diffusion.sampling.grids`.
      key: one key, or one key per sample `[B]`, typed or raw. One key stands for `sample_keys(key, arange(B))`.
      unroll: steps per iteration of the compiled loop. Higher values may be faster for small networks on a GPU, but
        take longer to compile.
      trajectory: whether to return x at all times.

    Returns:
      x at `times[-1]`, `[B, ...]`, which is x0 if that time is 0; with `trajectory`, x at each time, `[N + 1, B, ...]`.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # a raw key has a trailing axis, which could be taken for the batch
    keys = key if key.shape == x.shape[:1] else sample_keys(key, jnp.arange(x.shape[0]))
    if not sampler.uses_separate_eps:
        denoise = _without_separate_eps(denoise)

    def body(carry, inputs):
        i, t, s = inputs
        carry = sampler.step(carry, denoise, schedule, t, s, fold(keys, i))
        return carry, sampler.finish(carry) if trajectory else None

    # Step i folds its keys with i + 1, because `prior` uses 0.
    inputs = (jnp.arange(1, times.shape[0]), times[:-1], times[1:])
    carry, states = jax.lax.scan(body, sampler.init(x, times), inputs, unroll=unroll)
    return jnp.concatenate([x[None], states]) if trajectory else sampler.finish(carry)


def invert(
    denoise: Denoiser, schedule: Schedule, sampler: Sampler, x0: Array, times: Array, *, unroll: int = 1
) -> Array:
    """Returns the noise from which an ODE solver generates `x0 [B, ...]`.

    It runs `sample` on the same times in the opposite direction (DDIM inversion; Song, Meng & Ermon 2021, arXiv
    2010.02502, section 4.3). Sampling from the result returns x0 up to the error of the solver.

    Args:
      times: `[N + 1]`, decreasing to 0, as for `sample`. At t = 0 there is no noise whose direction could be estimated,
        so that x at the time before it is set to its mean given x0.

    Returns:
      x at `times[0]`.

    Raises:
      InputError: the sampler is stochastic.
    """
    if sampler.stochastic:
        raise InputError("sampler.name", "must be an ODE solver such as ddim for inversion, got a stochastic sampler")
    increasing = times[:-1][::-1]
    x = expand(schedule.alpha(increasing[0]), x0) * x0
    return sample(denoise, schedule, sampler, x, increasing, jax.random.key(0), unroll=unroll)


def _without_separate_eps(denoise: Denoiser) -> Denoiser:
    """Wraps a denoiser for a sampler that derives eps from x0: raises InputError if guidance separates the two."""

    def checked(x: Array, t: Array, **more: Array) -> Denoised:
        denoised = denoise(x, t, **more)
        if denoised.x0_for_eps is not None:
            raise InputError(
                "guidance.name",
                "cfg_pp requires a sampler that supports its noise: ddim, euler or euler_ancestral",
            )
        return denoised

    return checked


def in_batches(
    draw: Callable[[Array, Cond], Array],
    cond: Cond,
    num: int,
    batch_size: int,
    key: Array,
) -> Iterator[np.ndarray]:
    """Draws `num` samples in batches of exactly `batch_size`; the last batch is padded and cut.

    Args:
      draw: `draw(keys [B], cond [B]) -> x [B, ...]`, jitted; it is compiled for this batch size only.
      cond: conditions, each `[num, ...]`.
      key: sample i uses the key `sample_keys(key, i)`, so that it does not depend on the batch size.

    Yields:
      Arrays of at most `batch_size` samples. The device computes the next batch while the caller processes this one.
    """
    pending = None
    for start in range(0, num, batch_size):
        indices = np.minimum(np.arange(start, start + batch_size), num - 1)
        x = draw(
            sample_keys(key, jnp.asarray(indices)), jax.tree.map(lambda value, rows=indices: value[rows], dict(cond))
        )
        if pending is not None:
            yield np.asarray(pending)
        pending = x[: num - start]
    yield np.asarray(pending)
