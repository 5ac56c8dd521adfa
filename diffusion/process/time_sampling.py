"""Distributions of the training times: `uniform()`, for example, returns a `TimeSampler` of times t `[n]` in (0, 1]."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.types import Array, InputError, Schedule


@dataclasses.dataclass(frozen=True)
class TimeSampler:
    """A distribution of training times.

    A subclass such as `Importance` may have a state, a dict of arrays that is stored in the train state.

    Attributes:
      sample_times: `(schedule, key, n) -> t [n]`.
    """

    sample_times: Callable[[Schedule, Array, int], Array]

    def initial_state(self) -> dict[str, Array]:
        """Returns the state before the first step."""
        return {}

    def draw(self, schedule: Schedule, key: Array, n: int, state: Mapping[str, Array]) -> tuple[Array, Array]:
        """Draws times t `[n]`, and returns them with the importance weight `[n]` of each loss."""
        t = self.sample_times(schedule, key, n)
        return jnp.clip(t, jnp.finfo(t.dtype).tiny, 1), jnp.ones(n)

    def update_state(self, state: Mapping[str, Array], t: Array, loss: Array) -> Mapping[str, Array]:
        """Returns the state after a batch with losses `[n]` at times `t [n]`."""
        return state


def uniform() -> TimeSampler:
    """Independent times, uniform on (0, 1]."""
    return TimeSampler(lambda schedule, key, n: 1 - jax.random.uniform(key, (n,)))


def stratified() -> TimeSampler:
    """Evenly spaced times with one shared uniform offset (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).

    Each time is uniform on (0, 1]. The low discrepancy over the batch reduces the variance of the loss.
    """
    return TimeSampler(lambda schedule, key, n: 1 - (jax.random.uniform(key) + jnp.arange(n) / n) % 1)


def discrete(num_steps: int | None = None) -> TimeSampler:
    """Times uniform on 1/T, 2/T, ..., 1, the points of a table (Ho et al. 2020).

    Args:
      num_steps: T; by default that of the schedule.
    """
    checks.at_least(1, num_steps=num_steps)

    def sample_times(schedule: Schedule, key: Array, n: int) -> Array:
        points = num_steps or getattr(schedule, "num_steps", None)
        if points is None:
            raise InputError("time_sampler.num_steps", "is missing, and the schedule has no table; set it")
        return (jax.random.randint(key, (n,), 0, points) + 1) / points

    return TimeSampler(sample_times)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """Times whose logit is normal; a positive `mean` favors noise (Esser et al. 2024, arXiv 2403.03206, eq. 19)."""
    checks.positive(std=std)
    return TimeSampler(lambda schedule, key, n: jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,))))


def log_normal(
    mean: float = -1.2, std: float = 1.2, sigma_min: float = 0.0, sigma_max: float = float("inf")
) -> TimeSampler:
    """Times whose log(sigma / alpha) is normal (Karras et al. 2022, arXiv 2206.00364, table 1).

    Times beyond the ends of the schedule are clipped.

    Args:
      mean, std: Parameters of the normal distribution.
      sigma_min, sigma_max: Noise levels sigma / alpha at which the normal distribution is truncated.
    """
    checks.positive(std=std)
    if not 0 <= sigma_min < sigma_max:
        raise InputError("sigma_min", f"must be at least 0 and below sigma_max = {sigma_max}, got {sigma_min}")
    low, high = ((math.log(s) - mean) / std if s > 0 else -math.inf for s in (sigma_min, sigma_max))

    def sample_times(schedule: Schedule, key: Array, n: int) -> Array:
        truncated = math.isfinite(low) or math.isfinite(high)
        z = jax.random.truncated_normal(key, low, high, (n,)) if truncated else jax.random.normal(key, (n,))
        return schedule.time(-2 * (mean + std * z))

    return TimeSampler(sample_times)


def karras(rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0) -> TimeSampler:
    """Times whose (sigma / alpha)^(1 / rho) is uniform (Song et al. 2023, arXiv 2303.01469, algorithm 3).

    With the grid `grids.karras`, all steps of the grid are equally likely.

    Args:
      rho: Exponent of the grid.
      sigma_min, sigma_max: Range of sigma / alpha.
    """
    checks.positive(rho=rho)
    if not 0 <= sigma_min < sigma_max:
        raise InputError("sigma_min", f"must be at least 0 and below sigma_max = {sigma_max}, got {sigma_min}")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def sample_times(schedule: Schedule, key: Array, n: int) -> Array:
        share = 1 - jax.random.uniform(key, (n,))
        return schedule.time(-2 * rho * jnp.log(low + share * (high - low)))

    return TimeSampler(sample_times)


def mode(scale: float = 1.29) -> TimeSampler:
    """Times that favor the middle (positive `scale`) or the ends (negative `scale`) of [0, 1].

    The density is positive everywhere (Esser et al. 2024, eq. 20).
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise InputError("scale", f"must be in [-1, {2 / (math.pi - 2):.3f}], got {scale}")

    def sample_times(schedule: Schedule, key: Array, n: int) -> Array:
        u = jax.random.uniform(key, (n,))
        return 1 - u - scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)

    return TimeSampler(sample_times)


def cosmap() -> TimeSampler:
    """Times with which a straight path has the log-SNRs of the cosine schedule (Esser et al. 2024, eq. 21)."""
    return TimeSampler(lambda schedule, key, n: 1 - 1 / (jnp.tan(jnp.pi / 2 * jax.random.uniform(key, (n,))) + 1))


def importance(bins: int = 100, history: int = 10, uniform_share: float = 0.001) -> TimeSampler:
    """Times with a density proportional to the root mean square of recent losses near them.

    Importance weights keep the mean of the loss equal to that of uniform times, with less variance (Nichol & Dhariwal
    2021, arXiv 2102.09672, section 3.3).

    Args:
      bins: Number of equal bins of (0, 1].
      history: Number of losses stored per bin. Until every bin has this many, times are uniform.
      uniform_share: Probability of a uniform draw, in (0, 1], so that every bin is visited.
    """
    checks.at_least(1, bins=bins, history=history)
    if not 0 < uniform_share <= 1:
        raise InputError("uniform_share", f"must be in (0, 1], got {uniform_share}")
    return Importance(uniform().sample_times, bins, history, uniform_share)


@dataclasses.dataclass(frozen=True)
class Importance(TimeSampler):
    """See `importance`. The state holds the last `losses [bins, history]` and the `counts [bins]` of losses seen."""

    bins: int
    history: int
    uniform_share: float

    def initial_state(self) -> dict[str, Array]:
        return {"losses": jnp.zeros((self.bins, self.history)), "counts": jnp.zeros(self.bins, jnp.int32)}

    def probabilities(self, state: Mapping[str, Array]) -> Array:
        """Returns the probability of each bin, `[bins]`."""
        p = jnp.sqrt(jnp.mean(state["losses"] ** 2, axis=1))
        p = (1 - self.uniform_share) * p / jnp.maximum(jnp.sum(p), 1e-30) + self.uniform_share / self.bins
        return jnp.where(jnp.all(state["counts"] >= self.history), p, 1 / self.bins)

    def draw(self, schedule: Schedule, key: Array, n: int, state: Mapping[str, Array]) -> tuple[Array, Array]:
        p = self.probabilities(state)
        key_bin, key_inside = jax.random.split(key)
        chosen = jax.random.categorical(key_bin, jnp.log(p), shape=(n,))
        t = (chosen + 1 - jax.random.uniform(key_inside, (n,))) / self.bins
        return t, 1 / (self.bins * p[chosen])

    def update_state(self, state: Mapping[str, Array], t: Array, loss: Array) -> Mapping[str, Array]:
        def record(state: dict[str, Array], example: tuple[Array, Array]) -> tuple[dict[str, Array], None]:
            t, loss = example
            index = jnp.clip(jnp.ceil(t * self.bins).astype(jnp.int32) - 1, 0, self.bins - 1)
            slot = state["counts"][index] % self.history
            losses = state["losses"].at[index, slot].set(loss)
            return {"losses": losses, "counts": state["counts"].at[index].add(1)}, None

        return jax.lax.scan(record, dict(state), (t, loss))[0]
