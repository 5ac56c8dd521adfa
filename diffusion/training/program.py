"""The compiled train step: jitted with its shardings, and described before any of its arrays exists."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffusion.core import trees
from diffusion.core.types import Autoencoder, Batch, InputError, Network, Objective, Params, Source, Spec, TextEncoder
from diffusion.distributed import activation_sharding, sharding
from diffusion.training.ema import EMA
from diffusion.training.optimizer import Optimizer
from diffusion.training.resilience.guards import Guard
from diffusion.training.state import TrainState, init_state, initial_params, pretrained_of
from diffusion.training.state import trainable as learned_networks
from diffusion.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of a training, and the shapes and shardings of their arguments.

    Attributes:
      init: Maps the teacher's networks, or None, and the leaves of a warm start to the state before the first step. It
        creates each array with its final sharding.
      step: The function of `make_step`, which donates the state.
      state: The state as `jax.ShapeDtypeStruct` with shardings.
      frozen: The third argument of `step`, likewise.
      batch: The sharding of every array of a batch.
    """

    init: Callable[[Mapping | None, Mapping], TrainState]
    step: Callable[[TrainState, Batch, Mapping], tuple[TrainState, dict[str, Any]]]
    state: TrainState
    frozen: dict[str, Any]
    batch: NamedSharding

    def trace(self, source: Source, batch_size: int) -> dict[str, Any]:
        """Traces a step with examples of each size that a source has, and returns its metrics as shapes.

        Raises:
          InputError: The step does not fit the examples.
        """
        buckets = getattr(source, "buckets", None)
        firsts = [0] if buckets is None else np.unique(buckets, return_index=True)[1]
        for index in map(int, firsts):
            batch = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((batch_size, *np.shape(leaf)), np.asarray(leaf).dtype), source[index]
            )
            try:
                _, metrics = jax.eval_shape(self.step, self.state, batch, self.frozen)
            except (TypeError, ValueError) as error:
                of_size = not isinstance(error, InputError) or error.field == "network.x"
                if buckets is None or not of_size:
                    raise
                size = " x ".join(map(str, batch["x"].shape[1:3]))
                problem = f"network or autoencoder cannot read images of {size}; choose sizes that their levels divide"
                raise InputError("data.size", problem) from error
        return metrics

    def check_frozen(self, start: Mapping[str, Any]) -> None:
        """Checks that a warm start provides the leaves that are not trained.

        Raises:
          InputError: One is missing or has another shape.
        """
        given = trees.by_path(dict(start))
        for path, leaf in trees.by_path(self.frozen.get("params", {})).items():
            if getattr(given.get(path), "shape", None) != leaf.shape:
                problem = f"leaves out {path}, which init_from does not provide"
                raise InputError("train.trainable", f"{problem}; train it, or start from a run that has it")

    def place_frozen(
        self,
        start: Mapping[str, Any],
        pretrained: Mapping[str, Params],
        autoencoder: Autoencoder | None,
        text_encoder: TextEncoder | None = None,
    ) -> dict[str, Any]:
        """Returns the arrays that a step reads and never changes, with their shardings.

        Args:
          start: The leaves of a warm start.
          pretrained: See `Objective`.
          autoencoder, text_encoder: The encoders, if there are any.

        Raises:
          InputError: See `check_frozen`.
        """
        self.check_frozen(start)
        given = {"params": dict(start), "pretrained": dict(pretrained)}
        given = trees.by_path(given | _arrays_of(autoencoder, text_encoder))
        return jax.tree.map_with_path(
            lambda path, leaf: jax.device_put(given[trees.path_name(path)], leaf.sharding), self.frozen
        )


def make_program(
    *, network: Network, objective: Objective, optimizer: Optimizer, ema: EMA, mesh: Mesh,
    rules: tuple[sharding.Rule, ...] = (), sequence: str | None = None, fsdp_min_size: int = sharding.FSDP_MIN_SIZE,
    seed: int, batch_size: int, cond_drop_rate: float | Mapping[str, float] = 0.0, accumulate: int = 1,
    guard: Guard | None = None, teacher: Mapping | None = None, trainable: tuple[str, ...] | None = None,
    autoencoder: Autoencoder | None = None, encoded: bool = False, text_encoder: TextEncoder | None = None,
    text_encoded: bool = False,
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
      trainable: Regular expressions on the paths of the leaves that are trained; None for those of the network, which
        are all unless an adapter chooses them.
      autoencoder, encoded, text_encoder: See `make_step`.
      text_encoded: Whether batches hold encoded text, so that a step does not need the parameters of `text_encoder`.

    Raises:
      InputError: The mesh does not divide the batch, an expression for leaves is invalid or found in no path, or a
        sharding rule does not fit.
    """
    patterns = network.trainable if trainable is None else trainable
    matches = None if patterns is None else trees.matcher(patterns, "train.trainable")
    shards = sharding.batch_shards(mesh)
    if batch_size % (shards * accumulate):
        micro = f" in {accumulate} micro-batches" if accumulate > 1 else ""
        raise InputError(
            "train.batch_size",
            f"{batch_size} examples{micro} cannot be sharded over the mesh's data x fsdp = {shards}; "
            f"use a multiple of {shards * accumulate}",
        )

    def init(teacher: Mapping | None, start: Mapping) -> TrainState:
        return init_state(objective, network, optimizer, ema, jax.random.key(seed), teacher, start, matches)

    def with_places(shapes: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                            shapes, shardings)  # fmt: skip

    shapes, frozen = jax.eval_shape(init, teacher, {}), {}
    if matches is not None:
        params = jax.eval_shape(lambda: initial_params(objective, network, jax.random.key(seed), teacher))
        frozen["params"] = trees.split(learned_networks(params, objective), matches)[1]
    pretrained = pretrained_of(objective)
    if pretrained:
        frozen["pretrained"] = dict(pretrained)
    unused = [name for name, is_done in (("autoencoder", encoded), ("text_encoder", text_encoded)) if is_done]
    frozen |= {name: arrays for name, arrays in _arrays_of(autoencoder, text_encoder).items() if name not in unused}
    _check_patterns(shapes, patterns, optimizer, objective)
    shardings = sharding.of_state(shapes, mesh, rules, fsdp_min_size)
    state = with_places(shapes, shardings)
    frozen = with_places(frozen, sharding.of_state(frozen, mesh, rules, fsdp_min_size))
    sharding.warn_of_unused(rules, state, frozen)
    batch = sharding.by_example(mesh)
    step = make_step(objective, network, optimizer, ema, seed=seed, cond_drop_rate=cond_drop_rate,
                     accumulate=accumulate, guard=guard, matches=matches, autoencoder=autoencoder,
                     encoded=encoded, text_encoder=text_encoder)  # fmt: skip
    if mesh.size > 1:
        step = activation_sharding.enabled(step, batch, sequence)
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(step, in_shardings=(shardings, batch, jax.tree.map(lambda leaf: leaf.sharding, frozen)),
                     out_shardings=(shardings, sharding.replicated(mesh)), donate_argnums=0,
                     keep_unused=True),  # so that its memory includes all arguments, such as an autoencoder's decoder
        state=state,
        frozen=frozen,
        batch=batch,
    )  # fmt: skip


def _arrays_of(autoencoder: Autoencoder | None, text_encoder: TextEncoder | None) -> dict[str, Any]:
    """Returns the arrays of encoders by their names in `frozen`."""
    found = {} if autoencoder is None else {"autoencoder": autoencoder.params}
    if text_encoder is not None and text_encoder.encode is not None:
        found["text_encoder"] = text_encoder.params
        if text_encoder.null is not None:
            found["null_text"] = text_encoder.null
    return found


def abstract_batch(
    spec: Spec, size: int, place: NamedSharding, text_encoder: TextEncoder | None = None, text_encoded: bool = False
) -> Batch:
    """Returns a batch of `size` examples as `jax.ShapeDtypeStruct` with the sharding `place`."""
    cond = spec.zeros(size)
    if text_encoder is not None:
        cond["text"] = text_encoder.condition.zeros(size) if text_encoded else text_encoder.tokenize([""] * size)
    cond = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), cond)
    return Batch(x=jax.ShapeDtypeStruct((size, *spec.shape), spec.x.dtype, sharding=place), cond=cond)


def _check_patterns(
    state: TrainState, patterns: tuple[str, ...] | None, optimizer: Optimizer, objective: Objective
) -> None:
    """Checks that each expression for parameters is found in the path of one that is trained."""
    paths = [path for path in trees.by_path(state.params) if path.partition("/")[0] not in objective.frozen]
    for field, expressions in (("train.trainable", patterns or ()), ("optimizer.groups", optimizer.groups)):
        for expression in expressions:
            if not any(map(trees.matcher([expression], field), paths)):
                raise InputError(field, f"{expression!r} is found in the path of no parameter that is trained")
