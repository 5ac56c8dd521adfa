"""The train state: all that a step changes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion.core.types import Array, Network, Objective, Params
from diffusion.training.ema import EMA
from diffusion.training.resilience import guards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """There is no random key in it: the key of a step follows from the seed and the step's number.

    Attributes:
      step: optimizer steps done, int32.
      params: the dict of networks, float32.
      ema: name of the average -> its copy of the trainable networks.
      opt_state: optax's, for the trainable networks.
      objective_state: what the objective keeps beside its parameters (`Objective.memory`).
      guard: the counters of bad steps.
    """

    step: Array
    params: dict[str, Params]
    ema: dict[str, dict[str, Params]]
    opt_state: Any
    objective_state: Any
    guard: dict[str, Array]


def init_state(
    objective: Objective,
    network: Network,
    transform: optax.GradientTransformation,
    ema: EMA,
    key: Array,
    teacher: Mapping | None = None,
) -> TrainState:
    """The state before the first step. Pure: `jax.jit` it with `out_shardings`, so that it is born in its place.

    Args:
      teacher: see `Objective.init`.
    """
    params = objective.init(network, key, teacher)
    learned = trainable(params, objective)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, ema=ema.init(learned), opt_state=transform.init(learned),
        objective_state=objective.initial_state(), guard=guards.counters(),
    )  # fmt: skip


def trainable(params: dict[str, Params], objective: Objective) -> dict[str, Params]:
    """The networks that the objective does not name frozen."""
    return {name: value for name, value in params.items() if name not in objective.frozen}


def averaged(state: TrainState, name: str) -> dict[str, Params]:
    """The dict of networks with one EMA's copies in place of the trainable ones."""
    return {**state.params, **state.ema[name]}
