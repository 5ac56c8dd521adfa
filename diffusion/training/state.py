"""The train state: everything that a step changes.

objective.init -> params ----+-- frozen networks of the objective (a teacher)     state.params
                             +-- trained leaves                                   state.params, state.ema, opt_state
                             +-- leaves that are not trained (`train.trainable`)  frozen["params"], not in the state
objective.pretrained, read by the loss                                            frozen["pretrained"], not in the state
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core import trees
from diffusion.core.types import Array, Network, Objective, Params
from diffusion.training.ema import EMA
from diffusion.training.optimizer import Optimizer
from diffusion.training.players import players_of
from diffusion.training.resilience import guards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state between two steps. It has no random key: the key of a step follows from the seed and the step.

    Attributes:
      step: Number of completed optimizer steps, int32.
      params: The dict of networks, float32, without the leaves that are not trained.
      ema: The averaged copy of the trained networks, by the name of the average.
      opt_state: optax's state for the trained networks; a dict by player if the objective has several.
      objective_state: The arrays that the objective keeps in addition to its parameters (`Objective.initial_state`).
      guard: The counters of bad steps.
    """

    step: Array
    params: dict[str, Params]
    ema: dict[str, dict[str, Params]]
    opt_state: Any
    objective_state: Any
    guard: dict[str, Array]


def initial_params(
    objective: Objective, network: Network, key: Array, teacher: Mapping | None = None, start: Mapping | None = None
) -> dict[str, Params]:
    """Returns the dict of networks before the first step, all leaves included.

    Args:
      objective, network: The parts of the training.
      key: The random key of the initial parameters.
      teacher: See `Objective.init`.
      start: Leaves of a warm start, by network; they replace the initial ones, also in copies that the objective makes.
    """
    if not start:
        return objective.init(network, key, teacher)
    ours = start.get("net", {})
    warm = dataclasses.replace(network, init=lambda key: trees.merge(network.init(key), ours))
    return trees.merge(objective.init(warm, key, teacher), start)


def init_state(
    objective: Objective,
    network: Network,
    optimizer: Optimizer,
    ema: EMA,
    key: Array,
    teacher: Mapping | None = None,
    start: Mapping | None = None,
    matches: trees.Matches | None = None,
) -> TrainState:
    """Returns the state before the first step.

    It is pure: apply `jax.jit` with `out_shardings` to create each array with its sharding.

    Args:
      objective, network, optimizer, ema: The parts of the training.
      key, teacher, start: See `initial_params`.
      matches: Whether the leaf of a path is trained; None for all.
    """
    params = initial_params(objective, network, key, teacher, start)
    learned = trainable(params, objective, matches)
    fixed = {name: value for name, value in params.items() if name in objective.frozen}
    players = players_of(objective)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params={**fixed, **learned}, ema=ema.init(averages(learned, objective)),
        opt_state=optimizer.init(learned, players), objective_state=objective.initial_state(params),
        guard=guards.counters(),
    )  # fmt: skip


def trainable(
    params: Mapping[str, Params], objective: Objective, matches: trees.Matches | None = None
) -> dict[str, Params]:
    """Returns the networks that the objective does not freeze, with those of their leaves that are trained."""
    learned = {name: value for name, value in params.items() if name not in objective.frozen}
    return learned if matches is None else trees.split(learned, matches)[0]


def pretrained_of(objective: Objective) -> Mapping[str, Params]:
    """Returns the networks that the loss of an objective reads and nothing changes."""
    return getattr(objective, "pretrained", {})


def averages(learned: Mapping[str, Params], objective: Objective) -> dict[str, Params]:
    """Returns those of the trained networks that are averaged."""
    players = players_of(objective)
    if players is None:
        return dict(learned)
    names = [name for player in players.values() if player.averaged for name in player.networks]
    return {name: value for name, value in learned.items() if name in names}


def averaged(state: TrainState, name: str) -> dict[str, Params]:
    """Returns the dict of networks with the copies of one average in place of the trained ones."""
    return {**state.params, **state.ema[name]}
