"""Players: networks that an objective trains against each other, each with its loss and optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core.types import Array, Objective, Params, Player


def players_of(objective: Objective) -> Mapping[str, Player] | None:
    """Returns the players of an objective; None if it has a single loss."""
    return getattr(objective, "players", None)


def gradients(
    losses: Callable[[Mapping[str, Params]], tuple[Mapping[str, Array], Any]],
    learned: Mapping[str, Params],
    players: Mapping[str, Player] | None,
) -> tuple[dict[str, Params], Any]:
    """Returns the gradient of each player's loss with respect to the networks of that player alone.

    The forward pass runs once. The backward pass of a loss contains only what its player's networks need.

    Args:
      losses: Maps the networks to the mean loss of each player, and auxiliary outputs.
      learned: The trained networks of all players.
      players: The players by name; None for a single loss of all networks.
    """
    means, pullback, aux = jax.vjp(losses, learned, has_aux=True)
    if players is None:
        return pullback(jax.tree.map(jnp.ones_like, means))[0], aux
    grads = {}
    for name, player in players.items():
        (grad,) = pullback({other: jnp.float32(other == name) for other in means})
        grads |= {network: grad[network] for network in player.networks}
    return grads, aux
