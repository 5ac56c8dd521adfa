"""A helper for tests that call `Objective.loss` directly."""

import jax.numpy as jnp


def with_draws(objective, batch, key, step=0):
    """Returns the batch with what the objective draws for it at a step, from its initial state."""
    return {**batch, "draws": objective.draw(batch, key, jnp.int32(step), objective.initial_state({}))}
