"""The compiled train step: jitted with its shardings, and described before any of its arrays exists."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
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
    """The jitted functions of a training, and the shapes and shardings of their arguments.

    Attributes:
      init: Maps the teacher's networks, or None, to the state before the first step. It creates each array with its
        final sharding.
      step: The function of `make_step`, which donates the state.
      state: The state as `jax.ShapeDtypeStruct` with shardings.
      batch: The sharding of every array of a batch.
    """

    init: Callable[[Mapping | None], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    state: TrainState
    batch: NamedSharding


def make_program(
    *, network: Network, objective: Objective, optimizer: Optimizer, ema: EMA, mesh: Mesh,
    rules: tuple[sharding.Rule, ...] = (), sequence: str | None = None, fsdp_min_size: int = sharding.FSDP_MIN_SIZE,
    seed: int, batch_size: int, cond_drop_rate: float | Mapping[str, float] = 0.0, accumulate: int = 1,
    guard: Guard | None = None, teacher: Mapping | None = None,
) -> Program:  # fmt: skip
    """Builds the program without computing anything of the model or creating any of its arrays.

    Args:
      network, objective, optimizer, ema: The parts of the training.
      mesh: The device mesh.
      rules, fsdp_min_size: See `sharding.of_state`.
      sequence: The mesh axis that shards tokens between the blocks of a network; see
        `distributed.activation_sharding`.
      seed, cond_drop_rate, accumulate, guard: See `make_step`.
      batch_size: Number of examples over all devices.
      teacher: The networks of the objective's teacher, or their shapes; see `Objective.init`.

    Raises:
      InputError: The mesh does not divide the batch, or a sharding rule does not fit.
    """
    shards = sharding.batch_shards(mesh)
    if batch_size % (shards * accumulate):
        micro = f" in {accumulate} micro-batches" if accumulate > 1 else ""
        raise InputError(
            "train.batch_size",
            f"{batch_size} examples{micro} cannot be sharded over the mesh's data x fsdp = {shards}; "
            f"use a multiple of {shards * accumulate}",
        )

    def init(teacher: Mapping | None) -> TrainState:
        return init_state(objective, network, optimizer.transform, ema, jax.random.key(seed), teacher)

    shapes = jax.eval_shape(init, teacher)
    shardings = sharding.of_state(shapes, mesh, rules, fsdp_min_size)
    state = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                         shapes, shardings)  # fmt: skip
    batch = sharding.by_example(mesh)
    step = make_step(objective, network, optimizer, ema, seed=seed, cond_drop_rate=cond_drop_rate,
                     accumulate=accumulate, guard=guard)  # fmt: skip
    if mesh.size > 1:
        step = activation_sharding.enabled(step, batch, sequence)
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(step, in_shardings=(shardings, batch), out_shardings=(shardings, sharding.replicated(mesh)),
                     donate_argnums=0),
        state=state,
        batch=batch,
    )  # fmt: skip


def abstract_batch(spec: Spec, size: int, place: NamedSharding) -> Batch:
    """Returns a batch of `size` examples as `jax.ShapeDtypeStruct` with the sharding `place`."""
    cond = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), spec.zeros(size))
    return Batch(x=jax.ShapeDtypeStruct((size, *spec.shape), spec.x.dtype, sharding=place), cond=cond)
