"""Exponential moving averages of the parameters, several at once."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from diffusion.core.types import Array, InputError, Params


@dataclasses.dataclass(frozen=True)
class EMA:
    """One float32 copy of the parameters for each decay, named by it: `{"0.999": params}`.

    With `warmup` the decay of step n is at most (1 + n) / (10 + n), so a short run's average forgets its start.
    """

    decays: tuple[float, ...]
    warmup: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{decay:g}" for decay in self.decays)

    def init(self, params: Params) -> dict[str, Params]:
        # A copy each: the state is donated, and one buffer cannot be given away twice.
        return {name: jax.tree.map(lambda p: jnp.array(p, jnp.float32), params) for name in self.names}

    def update(self, ema: Mapping[str, Params], params: Params, step: Array) -> dict[str, Params]:
        """The averages after optimizer step `step`, counted from 0."""
        limit = (1 + step) / (10 + step) if self.warmup else 1.0
        pairs = zip(self.names, self.decays, strict=True)
        return {
            name: optax.incremental_update(params, ema[name], 1 - jnp.minimum(decay, limit)) for name, decay in pairs
        }


def make_ema(decays: tuple[float, ...] = (0.999,), warmup: bool = True) -> EMA:
    """Args: `decays`, each in [0, 1), the one that sampling takes by default last."""
    for decay in decays:
        if not 0 <= decay < 1:
            raise InputError("decays", f"must each be in [0, 1), got {decay}")
    if len({f"{decay:g}" for decay in decays}) < max(len(decays), 1):
        raise InputError("decays", f"needs one or more different decays, got {decays}")
    return EMA(decays, warmup)
