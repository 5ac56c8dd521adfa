"""The sampling loop: one `jax.lax.scan` from noise to data or back, and a driver that draws samples in batches.

    network, schedule  ->  objective.denoiser  ->  denoise(x, t, cond)
                                                       |
    guidance (nested)  ->  cfg, rescale, ...   ->  denoise(x, t, cond)     evaluates the network on 2B rows, for example
                                                       |
    conditions [B]     ->  bind                ->  denoise(x, t)
                                                       |
                     times[0]                          v                                      times[-1]
    keys [B] -> prior ----> x, sampler.init(x) -> sampler.step -> after_step -> x, state ... ----> x [B, ...]
                                                |______________________________|
                                      scan over the pairs (t, s) = (times[i], times[i + 1])

A sampler sees neither conditions nor guidance: it calls `denoise(x, t)` for an estimate of x0. For image-to-image,
`noised` replaces `prior`. `invert` runs an ODE solver on the same times in the opposite direction. With `renoise`, a
pair that rises, s > t, adds noise in place of a step.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand, fold, normal, sample_keys
from diffusion.core.types import Array, Cond, Denoised, Denoiser, InputError, Sampler, Schedule
from diffusion.sampling.ode.first_order import eps_of, x0_of_eps

# after_step(x, x0, t, s, keys) -> x, called after each step of a sampler. x `[B, ...]` is the state at time s, x0 the
# denoiser's estimate at the start of the step, at time t, and `keys [B]` are for random numbers of the function.
AfterStep = Callable[[Array, Array, Array, Array, Array], Array]
# Folded into a step's keys for `AfterStep`. Samplers fold in small numbers, or none.
_AFTER_STEP = np.uint32(2**32 - 1)


def bind(denoise: Denoiser, cond: Cond) -> Denoiser:
    """Returns `denoise(x, t, **more)` with the conditions fixed; a sampler may add further ones as `more`."""
    return lambda x, t, **more: denoise(x, t, {**cond, **more})


def prior(
    schedule: Schedule, t: Array, keys: Array, shape: tuple[int, ...], moments: tuple[Array, Array] | None = None
) -> Array:
    """Draws the initial x_t, sigma(t) times standard normal noise, `[B, *shape]`, each sample from its own key.

    Args:
      moments: The mean and the variance of the data, `[*shape]` each, for a schedule that does not end in pure noise:
        x_t is then drawn from N(alpha mean, alpha^2 variance + sigma^2), which has the moments of noised data.
    """
    noise = normal(fold(keys, 0), shape)
    alpha, sigma = expand(schedule.alpha(t), noise), expand(schedule.sigma(t), noise)
    if moments is None:
        return sigma * noise
    mean, variance = moments
    return alpha * mean + jnp.sqrt(alpha**2 * variance + sigma**2) * noise


def noised(schedule: Schedule, x0: Array, t: Array, keys: Array) -> Array:
    """Draws the initial x_t from an example `x0 [B, ...]`, with the noise of `prior`.

    With times that begin at t < 1, this is the start of image-to-image sampling.
    """
    return expand(schedule.alpha(t), x0) * x0 + prior(schedule, t, keys, x0.shape[1:])


def renoised(schedule: Schedule, x: Array, t: Array, s: Array, keys: Array) -> Array:
    """Draws x_s given x_t `[B, ...]` by the forward process:

        q(x_s | x_t) = N((alpha_s / alpha_t) x_t, sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2),    s >= t

    Each sample has its own key. It holds on every schedule, whether the variance is preserved or not.
    """
    ratio = expand(schedule.alpha(s) / schedule.alpha(t), x)
    variance = expand(schedule.sigma(s), x) ** 2 - (ratio * expand(schedule.sigma(t), x)) ** 2
    variance = jnp.where(expand(s > t, x), jnp.maximum(variance, 0), 0)  # for s = t it is a rounding error
    return (ratio * x + jnp.sqrt(variance) * normal(keys, x.shape[1:], x.dtype)).astype(x.dtype)


def sample(
    denoise: Denoiser,
    schedule: Schedule,
    sampler: Sampler,
    x: Array,
    times: Array,
    key: Array,
    *,
    first: Array | None = None,
    after_step: AfterStep | None = None,
    renoise: bool = False,
    self_conditioning: bool = False,
    memory: bool = False,
    unroll: int = 1,
    trajectory: bool = False,
) -> Array:
    """Integrates x from `times[0]` to `times[-1]` in one scan. The function is pure; the caller jits it.

    Args:
      denoise: `denoise(x, t) -> Denoised`, with the conditions bound.
      schedule: the schedule that the denoiser was trained with.
      sampler: the solver.
      x: `[B, ...]`, the state at `times[0]`. In half precision, the model receives x in this type, and the sampler
        computes in float32.
      times: `[N + 1]`, decreasing, from any t to any other; see `diffusion.sampling.grids`. For a sampler that is
        `elementwise`, also `[N + 1, B]`, or `[N + 1, B, T]` for a time per frame of x `[B, T, ...]`; what has the same
        time at both ends of a step is left as it is.
      key: one key, or one key per sample `[B]`, typed or raw. One key stands for `sample_keys(key, arange(B))`.
      first: the index of the pair of times to begin with, in [0, N); x is then the state at `times[first]`, and the
        steps before it cost nothing. As it may be traced, another number of steps does not recompile the function.
      after_step: changes x after each step of the sampler (see `AfterStep`), which continues from the result: for
        inpainting or guidance by a measurement, for example.
      renoise: whether times may rise. At a pair (t, s) with s > t the loop adds the noise of the forward process from t
        to s (`renoised`) instead of calling the sampler and `after_step`, and the sampler restarts without its history
        (RePaint: Lugmayr et al. 2022, arXiv 2201.09865; Restart: Xu et al. 2023, arXiv 2306.14878). If it is False,
        rising times mean steps of the solver towards noise, as in `invert`.
      self_conditioning: whether the denoiser also receives the x0 of the last step, `previous_x0 [B, ...]`, which is 0
        in the first (Chen et al. 2022, arXiv 2208.04202, algorithm 2). All evaluations of a step receive the same.
      memory: whether the denoiser has a memory (`Denoised.memory`), as `apg` with momentum. The memory of the first
        evaluation of a step is passed to all those of the next; it is forgotten where noise is added.
      unroll: steps per iteration of the compiled loop. Higher values may be faster for small networks on a GPU, but
        take longer to compile.
      trajectory: whether to return x at all times.

    Returns:
      x at `times[-1]`, `[B, ...]`, which is x0 if that time is 0; with `trajectory`, x at each time, `[N + 1, B, ...]`.

    Raises:
      InputError: the sampler does not support the guidance or the times.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # a raw key has a trailing axis, which could be taken for the batch
    keys = key if key.shape == x.shape[:1] else sample_keys(key, jnp.arange(x.shape[0]))
    if memory and sampler.evaluations(1) is None:
        raise InputError("sampler.name", "must not be adaptive for guidance with momentum; use unipc, for example")
    denoise = _checked(denoise, sampler, memory)
    dtype = x.dtype
    if jnp.finfo(dtype).bits < 32:
        denoise, x = _in_half_precision(denoise, dtype), x.astype(jnp.float32)

    per_example = times.ndim > 1
    if per_example:
        if not sampler.elementwise or renoise:
            raise InputError("sampler.name", "takes one time for the whole batch; for a time per example or frame use "
                             "ddim, euler, ancestral or euler_maruyama, without renoise")  # fmt: skip
        denoise = _with_broadcast_times(denoise, times.ndim - 1)
        times = times.reshape(*times.shape, *(1,) * (x.ndim + 1 - times.ndim))

    nothing = None
    if memory:
        shape = jax.eval_shape(denoise, x, times[0]).memory
        nothing = jnp.zeros(shape.shape, shape.dtype)

    def start(x: Array, index: Array | int, previous: Array | None) -> tuple[Array, Any, Array | None, Array | None]:
        state = sampler.init(x, times, index)
        return x, state if after_step is None else sampler.replace(state, x, x), previous, nothing

    def body(carry, inputs):
        i, t, s = inputs
        step_keys = fold(keys, i)

        def step() -> tuple[Array, Any, Array | None, Array | None]:
            x, state, previous, remembered = carry
            conditioned = functools.partial(denoise, previous_x0=previous) if self_conditioning else denoise
            evaluate, left = _remembering(conditioned, remembered) if memory else (conditioned, [None])
            noise_keys = keys if sampler.brownian else step_keys
            moved, x0, new_state = sampler.step(x, state, evaluate, schedule, t, s, noise_keys)
            kept = x0 if self_conditioning else None, left[0]
            if per_example:
                moved = jnp.where(t == s, x, moved)
            if after_step is None:
                return moved, new_state, *kept
            ends = sampler.time(state, t), sampler.time(new_state, s)
            changed = after_step(moved, x0, *ends, fold(step_keys, _AFTER_STEP)).astype(moved.dtype)
            return changed, sampler.replace(new_state, moved, changed), *kept

        def add_noise() -> tuple[Array, Any, Array | None, Array | None]:
            return start(renoised(schedule, carry[0], t, s, step_keys), i, carry[2])

        def move() -> tuple[Array, Any, Array | None, Array | None]:
            return jax.lax.cond(s > t, add_noise, step) if renoise else step()

        carry = move() if first is None else jax.lax.cond(i > first, move, lambda: carry)
        return carry, carry[0] if trajectory else None

    # Step i folds its keys with i + 1, because `prior` uses 0.
    inputs = (jnp.arange(1, times.shape[0]), times[:-1], times[1:])
    initial = start(x, 0 if first is None else first, jnp.zeros_like(x) if self_conditioning else None)
    (last, *_), path = jax.lax.scan(body, initial, inputs, unroll=unroll)
    return (jnp.concatenate([x[None], path]) if trajectory else last).astype(dtype)


def evaluations(sampler: Sampler, times: np.ndarray) -> int | None:
    """Returns how often `sample` with `renoise` calls the denoiser on these times; None if it varies."""
    ends = [0, *(np.flatnonzero(np.diff(times) > 0) + 1), len(times)]  # of the parts that fall
    parts = [times[first:last] for first, last in itertools.pairwise(ends) if last - first > 1]
    counts = [sampler.evaluations(len(part) - 1, bool(part[-1] == 0)) for part in parts]
    return None if None in counts else sum(counts)


def invert(
    denoise: Denoiser,
    schedule: Schedule,
    sampler: Sampler,
    x0: Array,
    times: Array,
    *,
    from_data: bool = False,
    unroll: int = 1,
) -> Array:
    """Returns the noise from which an ODE solver generates `x0 [B, ...]`.

    It runs `sample` on the same times in the opposite direction (DDIM inversion; Song, Meng & Ermon 2021, arXiv
    2010.02502, section 4.3). Sampling from the result returns x0 up to the error of the solver.

    Args:
      times: `[N + 1]`, decreasing to 0, as for `sample`. At t = 0 there is no noise whose direction could be estimated,
        so that x at the time before it, s, is set to its mean given x0, alpha_s x0.
      from_data: whether to add sigma_s eps to it instead, where eps is that of the model at x0 and time s, as in
        diffusers' `DDIMInverseScheduler`. For a small sigma_s, sampling from the result restores x0 more
        precisely.

    Returns:
      x at `times[0]`.

    Raises:
      InputError: the sampler is stochastic.
    """
    if sampler.stochastic:
        raise InputError("sampler.name", "must be an ODE solver such as ddim for inversion, got a stochastic sampler")
    increasing = times[:-1][::-1]
    t = increasing[0]
    x = expand(schedule.alpha(t), x0) * x0
    if from_data:
        eps = eps_of(schedule, x0, x0_of_eps(_checked(denoise, sampler)(x0, t)), t)
        x = (x + expand(schedule.sigma(t), x0) * eps).astype(x0.dtype)
    return sample(denoise, schedule, sampler, x, increasing, jax.random.key(0), unroll=unroll)


def _with_broadcast_times(denoise: Denoiser, ndim: int) -> Denoiser:
    """Wraps a denoiser for a sampler whose times have trailing axes of size 1 after the first `ndim` axes."""
    return lambda x, t, **more: denoise(x, t.reshape(t.shape[:ndim]), **more)


def _in_half_precision(denoise: Denoiser, dtype: jnp.dtype) -> Denoiser:
    """Wraps a denoiser of half precision for samplers, which compute in float32."""

    def widened(x: Array, t: Array, **more: Array) -> Denoised:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), denoise(x.astype(dtype), t, **more))

    return widened


def _remembering(denoise: Denoiser, memory: Array) -> tuple[Denoiser, list[Array]]:
    """Wraps a denoiser so that it receives a memory. The memories that it leaves are appended to the list."""
    left = []

    def evaluate(x: Array, t: Array, **more: Array) -> Denoised:
        denoised = denoise(x, t, **more, memory=memory)
        left.append(denoised.memory)
        return denoised

    return evaluate, left


def _checked(denoise: Denoiser, sampler: Sampler, memory: bool = False) -> Denoiser:
    """Wraps a denoiser: raises InputError if the sampler does not support its kind of x0, or a separate eps, or if it
    has a memory that the loop does not pass on."""

    def checked(x: Array, t: Array, **more: Array) -> Denoised:
        denoised = denoise(x, t, **more)
        if denoised.kind == "consistency" and not sampler.few_step:
            raise InputError("sampler.name", "must be consistency, lcm or tcd for this model, which maps to the end of "
                             "the ODE's trajectory and has no direction that a solver could follow")  # fmt: skip
        if denoised.memory is not None and not memory:
            raise InputError("guidance.momentum", "requires sampling.loop.sample(..., memory=True); inversion has none")
        if denoised.x0_for_eps is not None and not sampler.uses_separate_eps:
            raise InputError(
                "guidance.name",
                "cfg_pp, and threshold with keep_noise = true, require a sampler whose noise may differ from that of "
                "x0: ddim, euler, euler_ancestral, dpm_solver or dpm_solver_pp with singlestep = false, deis, res, "
                "ipndm or gradient_estimation",
            )
        return denoised

    return checked


def in_batches(
    draw: Callable[[Array, Cond], Array],
    cond: Cond,
    num: int,
    batch_size: int,
    key: Array,
    first: int = 0,
) -> Iterator[np.ndarray]:
    """Draws `num` samples in batches of exactly `batch_size`; the last batch is padded and cut.

    Args:
      draw: `draw(keys [B], cond [B]) -> x [B, ...]`, jitted; it is compiled for this batch size only.
      cond: conditions, each `[num, ...]`.
      key: sample i uses the key `sample_keys(key, i)`, so that it does not depend on the batch size.
      first: index of the first sample, a multiple of `batch_size`; those before it are left out.

    Yields:
      Arrays of at most `batch_size` samples. The device computes the next batch while the caller processes this one.
    """
    pending = None
    for start in range(first, num, batch_size):
        indices = np.minimum(np.arange(start, start + batch_size), num - 1)
        x = draw(
            sample_keys(key, jnp.asarray(indices)), jax.tree.map(lambda value, rows=indices: value[rows], dict(cond))
        )
        if pending is not None:
            yield np.asarray(pending)
        pending = x[: num - start]
    yield np.asarray(pending)
