"""Exponential moving averages of the parameters, several at once."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from diffusion.core import checks
from diffusion.core.types import Array, InputError, Params


@dataclasses.dataclass(frozen=True)
class EMA:
    """One float32 copy of the parameters per decay, named by the decay: `{"0.999": params}`.

    Attributes:
      decays: The decays, each in [0, 1).
      warmup: Whether to limit the decay of step n to (1 + n) / (10 + n), so that the average of a short run forgets
        the initial parameters.
      sample_with: The decay whose average sampling, previews and objectives use; None for the last one.
    """

    decays: tuple[float, ...]
    warmup: bool = True
    sample_with: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages."""
        return tuple(f"{decay:g}" for decay in self.decays)

    @property
    def main(self) -> str:
        """The name of the average that sampling, previews and objectives use."""
        return self.names[-1] if self.sample_with is None else f"{self.sample_with:g}"

    def init(self, params: Params) -> dict[str, Params]:
        """Returns the averages before the first step."""
        # Each is a separate copy, because the state is donated and a buffer cannot be donated twice.
        return {name: jax.tree.map(lambda p: jnp.array(p, jnp.float32), params) for name in self.names}

    def update(self, ema: Mapping[str, Params], params: Params, step: Array) -> dict[str, Params]:
        """Returns the averages after optimizer step `step`, counted from 0."""
        limit = (1 + step) / (10 + step) if self.warmup else 1.0
        pairs = zip(self.names, self.decays, strict=True)
        return {
            name: optax.incremental_update(params, ema[name], 1 - jnp.minimum(decay, limit)) for name, decay in pairs
        }


def make_ema(decays: tuple[float, ...] = (0.999,), warmup: bool = True, sample_with: float | None = None) -> EMA:
    """Returns the averages of a run; the arguments are the attributes of `EMA`.

    Raises:
      InputError: A decay is not in [0, 1), there is none or the same one twice, or `sample_with` is not one of them.
    """
    for decay in decays:
        checks.rate(decays=decay)
    averages = EMA(decays, warmup, sample_with)
    if len(set(averages.names)) < max(len(decays), 1):
        raise InputError("decays", f"must be one or more different decays, got {decays}")
    if averages.main not in averages.names:
        raise InputError("sample_with", f"must be one of the decays {decays}, got {sample_with}")
    return averages
