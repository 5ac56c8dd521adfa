"""The train state: everything that a step changes."""

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
    """The state between two steps. It has no random key: the key of a step follows from the seed and the step.

    Attributes:
      step: Number of completed optimizer steps, int32.
      params: The dict of networks, float32.
      ema: The averaged copy of the trainable networks, by the name of the average.
      opt_state: optax's state for the trainable networks.
      objective_state: The arrays that the objective keeps in addition to its parameters (`Objective.initial_state`).
      guard: The counters of bad steps.
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
    """Returns the state before the first step.

    It is pure: apply `jax.jit` with `out_shardings` to create each array with its sharding.

    Args:
      objective, network, transform, ema: The parts of the training.
      key: The random key of the initial parameters.
      teacher: See `Objective.init`.
    """
    params = objective.init(network, key, teacher)
    learned = trainable(params, objective)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, ema=ema.init(learned), opt_state=transform.init(learned),
        objective_state=objective.initial_state(), guard=guards.counters(),
    )  # fmt: skip


def trainable(params: dict[str, Params], objective: Objective) -> dict[str, Params]:
    """Returns the networks that the objective does not freeze."""
    return {name: value for name, value in params.items() if name not in objective.frozen}


def averaged(state: TrainState, name: str) -> dict[str, Params]:
    """Returns the dict of networks with the copies of one average in place of the trainable ones."""
    return {**state.params, **state.ema[name]}
