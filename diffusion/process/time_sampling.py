"""Laws of t in training, by name: `uniform()` gives a `TimeSampler`, which draws t `[n]` in (0, 1]."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core.types import Array, InputError, Schedule

Draw = Callable[[Schedule, Array, int], Array]


@dataclasses.dataclass(frozen=True)
class TimeSampler:
    """A law of t. This one has no memory; `Importance` has one, a dict of arrays that lives in the train state.

    Attributes:
      times: `(schedule, key, n) -> t [n]`.
    """

    times: Draw

    def initial_state(self) -> dict[str, Array]:
        """Before the first step."""
        return {}

    def draw(self, schedule: Schedule, key: Array, n: int, objective_state: Mapping[str, Array]) -> tuple[Array, Array]:
        """t `[n]`, and the factor `[n]` on each loss that makes up for t's law."""
        t = self.times(schedule, key, n)
        return jnp.clip(t, jnp.finfo(t.dtype).tiny, 1), jnp.ones(n)

    def update_state(self, objective_state: Mapping[str, Array], t: Array, loss: Array) -> Mapping[str, Array]:
        """The memory after a batch's losses `[n]` at `t [n]`."""
        return objective_state


def uniform() -> TimeSampler:
    """Independent and uniform on (0, 1]."""
    return TimeSampler(lambda schedule, key, n: 1 - jax.random.uniform(key, (n,)))


def stratified() -> TimeSampler:
    """One shared uniform offset on an even lattice: uniform for each example, low-discrepancy over the batch, so the
    loss has less variance (Kingma et al. 2021, arXiv 2107.00630, appendix I.1)."""
    return TimeSampler(lambda schedule, key, n: 1 - (jax.random.uniform(key) + jnp.arange(n) / n) % 1)


def discrete(num_steps: int | None = None) -> TimeSampler:
    """Uniform on 1/T, 2/T, ..., 1, the points of a table (Ho et al. 2020).

    Args:
      num_steps: T; the schedule's own if left out.
    """
    if num_steps is not None and num_steps < 1:
        raise InputError("num_steps", f"must be at least 1, got {num_steps}")

    def times(schedule: Schedule, key: Array, n: int) -> Array:
        points = num_steps or getattr(schedule, "num_steps", None)
        if points is None:
            raise InputError("time_sampler.num_steps", "is missing, and the schedule has no table to take it from")
        return (jax.random.randint(key, (n,), 0, points) + 1) / points

    return TimeSampler(times)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """logit(t) is normal; above 0, `mean` favours noise (Esser et al. 2024, arXiv 2403.03206, eq. 19)."""
    _positive("std", std)
    return TimeSampler(lambda schedule, key, n: jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,))))


def log_normal(
    mean: float = -1.2, std: float = 1.2, sigma_min: float = 0.0, sigma_max: float = float("inf")
) -> TimeSampler:
    """log(sigma / alpha) is normal, cut at the schedule's ends (Karras et al. 2022, arXiv 2206.00364, table 1).

    Args:
      sigma_min, sigma_max: levels sigma / alpha that it does not leave: the normal is truncated there.
    """
    _positive("std", std)
    if not 0 <= sigma_min < sigma_max:
        raise InputError("sigma_min", f"must be at least 0 and below sigma_max = {sigma_max}, got {sigma_min}")
    low, high = ((math.log(s) - mean) / std if s > 0 else -math.inf for s in (sigma_min, sigma_max))

    def times(schedule: Schedule, key: Array, n: int) -> Array:
        cut = math.isfinite(low) or math.isfinite(high)
        z = jax.random.truncated_normal(key, low, high, (n,)) if cut else jax.random.normal(key, (n,))
        return schedule.time(-2 * (mean + std * z))

    return TimeSampler(times)


def karras(rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0) -> TimeSampler:
    """The power 1 / rho of sigma / alpha is uniform between two levels: with `grids.karras`, every step of the grid is
    as probable as any other (Song et al. 2023, arXiv 2303.01469, algorithm 3)."""
    _positive("rho", rho)
    if not 0 <= sigma_min < sigma_max:
        raise InputError("sigma_min", f"must be at least 0 and below sigma_max = {sigma_max}, got {sigma_min}")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def times(schedule: Schedule, key: Array, n: int) -> Array:
        share = 1 - jax.random.uniform(key, (n,))
        return schedule.time(-2 * rho * jnp.log(low + share * (high - low)))

    return TimeSampler(times)


def mode(scale: float = 1.29) -> TimeSampler:
    """Favours the middle (`scale` above 0) or the ends (below), each t with positive density (Esser et al. 2024,
    eq. 20)."""
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise InputError("scale", f"must be from -1 to {2 / (math.pi - 2):.3f}, got {scale}")

    def times(schedule: Schedule, key: Array, n: int) -> Array:
        u = jax.random.uniform(key, (n,))
        return 1 - u - scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)

    return TimeSampler(times)


def cosmap() -> TimeSampler:
    """The law under which a straight path has the log-SNR of the cosine schedule (Esser et al. 2024, eq. 21)."""
    return TimeSampler(lambda schedule, key, n: 1 - 1 / (jnp.tan(jnp.pi / 2 * jax.random.uniform(key, (n,))) + 1))


def importance(bins: int = 100, history: int = 10, uniform_share: float = 0.001) -> TimeSampler:
    """t in proportion to the root mean square of the losses last seen near it, each loss weighted back to the uniform
    law: less variance, the same mean (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.3).

    Args:
      bins: equal parts of (0, 1] that are told apart.
      history: losses kept of each; until all have so many, t is uniform.
      uniform_share: of the draws that stay uniform, so that no bin is forgotten; in (0, 1].
    """
    for name, value in (("bins", bins), ("history", history)):
        if value < 1:
            raise InputError(name, f"must be at least 1, got {value}")
    if not 0 < uniform_share <= 1:
        raise InputError("uniform_share", f"must be in (0, 1], got {uniform_share}")
    return Importance(uniform().times, bins, history, uniform_share)


@dataclasses.dataclass(frozen=True)
class Importance(TimeSampler):
    """See `importance`. The memory is the last losses, `[bins, history]`, and how many each bin has had."""

    bins: int
    history: int
    uniform_share: float

    def initial_state(self) -> dict[str, Array]:
        return {"losses": jnp.zeros((self.bins, self.history)), "counts": jnp.zeros(self.bins, jnp.int32)}

    def probabilities(self, objective_state: Mapping[str, Array]) -> Array:
        """Of each bin, `[bins]`."""
        p = jnp.sqrt(jnp.mean(objective_state["losses"] ** 2, axis=1))
        p = (1 - self.uniform_share) * p / jnp.maximum(jnp.sum(p), 1e-30) + self.uniform_share / self.bins
        return jnp.where(jnp.all(objective_state["counts"] >= self.history), p, 1 / self.bins)

    def draw(self, schedule: Schedule, key: Array, n: int, objective_state: Mapping[str, Array]) -> tuple[Array, Array]:
        p = self.probabilities(objective_state)
        key_bin, key_inside = jax.random.split(key)
        chosen = jax.random.categorical(key_bin, jnp.log(p), shape=(n,))
        t = (chosen + 1 - jax.random.uniform(key_inside, (n,))) / self.bins
        return t, 1 / (self.bins * p[chosen])

    def update_state(self, objective_state: Mapping[str, Array], t: Array, loss: Array) -> Mapping[str, Array]:
        def one(objective_state: Any, seen: tuple[Array, Array]) -> tuple[Any, None]:
            t, loss = seen
            index = jnp.clip(jnp.ceil(t * self.bins).astype(jnp.int32) - 1, 0, self.bins - 1)
            slot = objective_state["counts"][index] % self.history
            losses = objective_state["losses"].at[index, slot].set(loss)
            return {"losses": losses, "counts": objective_state["counts"].at[index].add(1)}, None

        return jax.lax.scan(one, dict(objective_state), (t, loss))[0]


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise InputError(name, f"must be positive, got {value}")
