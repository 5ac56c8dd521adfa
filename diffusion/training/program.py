"""The train step as a program: jitted with its places on the mesh, and described before any of its arrays exists."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from diffusion.core.types import Batch, InputError, Network, Objective, Spec
from diffusion.distributed import activation_sharding, sharding
from diffusion.training.ema import EMA
from diffusion.training.optimizer import Optimizer
from diffusion.training.resilience.guards import Guard
from diffusion.training.state import TrainState, init_state
from diffusion.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """Attributes:
    init: the teacher's networks, or None -> the state before the first step; jitted, each array born in its place.
    step: `make_step`'s, jitted, the state donated.
    state: of `jax.ShapeDtypeStruct`, each with its sharding.
    batch: the sharding of every array of a batch.
    """

    init: Callable[[Mapping | None], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    state: TrainState
    batch: NamedSharding


def make_program(
    *, network: Network, objective: Objective, optimizer: Optimizer, ema: EMA, mesh: Mesh,
    rules: tuple[sharding.Rule, ...] = (), sequence: str | None = None, seed: int, batch_size: int,
    cond_drop_rate: float = 0.0, accumulate: int = 1, guard: Guard | None = None, teacher: Mapping | None = None,
) -> Program:  # fmt: skip
    """Nothing of the model is computed, and no array of it made.

    Args:
      rules: see `sharding.of_state`.
      sequence: the mesh axis that splits tokens between the blocks of a network; see `layers.borders`.
      seed, cond_drop_rate, accumulate, guard: see `make_step`.
      teacher: the networks that the objective's teacher has, or their shapes; see `Objective.init`.

    Raises:
      InputError: the mesh does not divide the batch, or a rule does not fit.
    """
    shards = sharding.batch_shards(mesh)
    if batch_size % (shards * accumulate):
        micro = f" in {accumulate} micro-batches" if accumulate > 1 else ""
        raise InputError(
            "train.batch_size",
            f"{batch_size} examples{micro} cannot be divided over the mesh's data x fsdp = {shards}; "
            f"use a multiple of {shards * accumulate}",
        )

    def init(teacher: Mapping | None) -> TrainState:
        return init_state(objective, network, optimizer.transform, ema, jax.random.key(seed), teacher)

    shapes = jax.eval_shape(init, teacher)
    places = sharding.of_state(shapes, mesh, rules)
    state = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                         shapes, places)  # fmt: skip
    batch = sharding.by_example(mesh)
    step = make_step(objective, network, optimizer, ema, seed=seed, cond_drop_rate=cond_drop_rate,
                     accumulate=accumulate, guard=guard)  # fmt: skip
    if mesh.size > 1:
        step = activation_sharding.enabled(step, batch, sequence)
    return Program(
        init=jax.jit(init, out_shardings=places),
        step=jax.jit(step, in_shardings=(places, batch), out_shardings=(places, sharding.replicated(mesh)),
                     donate_argnums=0),
        state=state,
        batch=batch,
    )  # fmt: skip


def abstract_batch(spec: Spec, size: int, place: NamedSharding) -> Batch:
    """What a batch of `size` examples of a data set looks like."""
    cond = {"label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=place)} if spec.num_classes else {}
    return Batch(x=jax.ShapeDtypeStruct((size, *spec.shape), jnp.float32, sharding=place), cond=cond)
