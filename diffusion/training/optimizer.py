"""Builds optax optimizers by name, with learning rate schedules, groups of parameters, and players."""

import dataclasses
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from diffusion.core import checks, trees
from diffusion.core.build import call
from diffusion.core.types import Array, InputError, Params, Player
from diffusion.training.resilience.guards import select_if_ok

# The last names of the paths of parameters that weight decay leaves alone: biases, scales of norms, and embeddings.
NO_DECAY = re.compile(r"(^|_)(bias|scale|gain|embedding)s?\d*$")
STACKED = re.compile(r"(^|/)blocks/")  # in the paths of the parameters of `layers.stack.Stack`
NONE: Mapping[str, Any] = MappingProxyType({})

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation, and its learning rate as a function of its step.

    Attributes:
      transform: The transformation.
      learning_rate: The learning rate at a step, counted from 0; None if it is unknown, as that of other code.
      players: Other optimizers for some of the players of an objective, by name.
      groups: The expressions of the groups of parameters.
    """

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule | None
    players: Mapping[str, "Optimizer"] = dataclasses.field(default_factory=dict)
    groups: tuple[str, ...] = ()

    def init(self, learned: Mapping[str, Params], players: Mapping[str, Player] | None = None) -> Any:
        """Returns the state for the trained networks; a dict by name if there are players."""
        if players is None:
            return self.transform.init(learned)
        return {name: self._of(name).transform.init(_own(learned, player)) for name, player in players.items()}

    def update(
        self, grads: Mapping[str, Params], state: Any, learned: Mapping[str, Params], step: Array,
        players: Mapping[str, Player] | None = None,
    ) -> tuple[dict[str, Params], Any]:  # fmt: skip
        """Returns the networks after a step, and the next state.

        Args:
          grads: The gradients of the networks.
          state: The state from `init`.
          learned: The trained networks.
          step: The number of the step; it decides which players make one.
          players: The players of the objective.
        """
        if players is None:
            updates, state = self.transform.update(grads, state, learned)
            return optax.apply_updates(learned, updates), state
        updated, states = dict(learned), {}
        for name, player in players.items():
            networks = _own(learned, player)
            updates, after = self._of(name).transform.update(_own(grads, player), state[name], networks)
            moved = optax.apply_updates(networks, updates), after
            if player.every > 1:
                moved = select_if_ok(step % player.every == 0, moved, (networks, state[name]))
            updated |= moved[0]
            states[name] = moved[1]
        return updated, states

    def _of(self, player: str) -> "Optimizer":
        return self.players.get(player, self)


def make_optimizer(
    steps: int,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    schedule: Literal["constant", "cosine", "linear"] = "constant",
    warmup: int = 0,
    cycles: int = 1,
    clip: float | None = 1.0,
    groups: Mapping[str, Mapping[str, Any] | None] = NONE,
    players: Mapping[str, Mapping[str, Any]] = NONE,
    **options: Any,
) -> Optimizer:
    """Returns clipping by global norm, followed by any optimizer of optax or optax.contrib.

    An optimizer with weight decay decays neither biases nor scales of norms nor embeddings. `muon` (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon) orthogonalises the updates of the kernels of linear and convolutional
    layers, each block's of a stack; the other parameters have Adam. With `consistent_rms = 0.2` its updates are as
    large as those of Adam (Liu et al. 2025, arXiv 2502.16982), and so is a good learning rate.

    Args:
      steps: Length of the whole run, at whose end a decaying schedule reaches 0.
      name: A function of optax or optax.contrib with a `learning_rate`: `adam`, `adamw`, `lion`, `muon`, `sgd`, ...
      learning_rate: The peak learning rate.
      schedule: The schedule after the warmup: `constant`, or a `cosine` or `linear` decay to 0.
      warmup: Steps of linear increase from 0; shortened to a tenth of the cycle if the cycle is not longer.
      cycles: Number of equal parts of the run, each with its own warmup and decay, for methods that train in rounds.
        If it does not divide `steps`, the last cycle is shorter.
      clip: Largest global norm of the gradient; None for no clipping.
      groups: Options for parts of the parameters, by a regular expression on their paths (`net/embed/label/embedding`):
        `learning_rate` and keywords of the optimizer, or None for parameters that keep their values. The first
        expression that is found in a path counts.
      players: Options for a player of the objective (`critic`), by its name; they replace those given here.
      **options: Keywords of the optimizer (`b1`, `b2`, `weight_decay`, ...).

    Raises:
      InputError: optax has no such optimizer or option, or does not accept a value of it.
    """
    common = dict(steps=steps, name=name, learning_rate=learning_rate, schedule=schedule, warmup=warmup, cycles=cycles,
                  clip=clip, groups=groups, **options)  # fmt: skip
    for player, changes in players.items():
        _check_section(changes, f"players.{player}")
    others = {player: call(make_optimizer, {**common, **changes}, field=f"players.{player}")
              for player, changes in players.items()}  # fmt: skip
    factory = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    if not inspect.isfunction(factory) or "learning_rate" not in inspect.signature(factory).parameters:
        raise InputError("name", f"optax has no optimizer {name!r}; use one such as adam, adamw, lion or sgd")
    checks.positive(learning_rate=learning_rate, clip=clip)
    checks.at_least(1, cycles=cycles)
    length = -(-steps // cycles)
    checks.at_least(0, warmup=warmup)
    if warmup >= length:
        shorter = length // 10
        logger.warning(f"optimizer.warmup = {warmup} is shortened to {shorter}: a cycle has {length} steps")
        warmup = shorter

    def rate_of(peak: float) -> optax.Schedule:
        after = {
            "constant": optax.constant_schedule(peak),
            "cosine": optax.cosine_decay_schedule(peak, length - warmup),
            "linear": optax.linear_schedule(peak, 0, length - warmup),
        }[schedule]
        cycle = optax.join_schedules([optax.linear_schedule(0, peak, warmup), after], [warmup]) if warmup else after
        return lambda step: cycle(step - jnp.minimum(step // length, cycles - 1) * length)

    def transform_of(peak: float, options: Mapping[str, Any], field: str = "") -> optax.GradientTransformation:
        for key, value in options.items():
            if isinstance(value, (Mapping, tuple, list)):
                problem = f"must be a single value, got {value!r}; use groups to give some parameters other options"
                raise InputError(f"{field}.{key}".lstrip("."), problem)
        keywords = {**options, "learning_rate": rate_of(peak)}
        if {"weight_decay", "mask"} <= inspect.signature(factory).parameters.keys():
            keywords.setdefault("mask", _decayed)
        if factory is optax.contrib.muon:
            keywords.setdefault("muon_weight_dimension_numbers", _axes_of_kernels)
            keywords.setdefault("weight_decay_mask", _decayed)
        try:
            transform = call(factory, keywords, field=field)
            if not any(map(callable, options.values())):  # those may require the names of the parameters
                jax.eval_shape(lambda x: transform.update(x, transform.init(x), x), {"": jnp.zeros((2, 2))})
        except InputError as error:
            if error.field.endswith("learning_rate"):
                problem = f"optax.{name} does not accept a learning rate schedule; use another optimizer"
                raise InputError("name", problem) from error
            raise InputError(error.field.lstrip("."), error.problem) from error
        except Exception as error:  # optax does not check its options
            given = " with " + ", ".join(f"{key}={value!r}" for key, value in options.items()) if options else ""
            raise InputError(field or "name", f"optax.{name} cannot be used{given}: {error}") from error
        return transform

    update = transform_of(learning_rate, options)
    if groups:
        transforms = {"": update}
        for pattern, changes in groups.items():
            field = f"groups.{pattern}"
            if changes is None:
                transforms[pattern] = optax.set_to_zero()
                continue
            _check_section(changes, field)
            peak = changes.get("learning_rate", learning_rate)
            checks.positive(**{f"{field}.learning_rate": peak})
            own = {key: value for key, value in changes.items() if key != "learning_rate"}
            transforms[pattern] = transform_of(peak, {**options, **own}, field)
        update = optax.multi_transform(transforms, _labels(groups))
    clipping = [] if clip is None else [optax.clip_by_global_norm(clip)]
    return Optimizer(optax.chain(*clipping, update), rate_of(learning_rate), others, tuple(groups))


def _decayed(params: Params) -> Any:
    """Returns a tree of booleans: whether weight decay applies to each parameter."""
    return jax.tree.map_with_path(
        lambda path, leaf: not NO_DECAY.search(trees.path_name(path).rpartition("/")[2]), params
    )


def _axes_of_kernels(params: Params) -> Any:
    """Returns a tree of the axes of the inputs and outputs of each kernel; None for other parameters.

    The last axis of a kernel is that of the outputs. Kernels of linear layers and of convolutions of images have an
    even number of axes; in a stack of blocks they have one more, the first, which counts the blocks.
    """

    def axes(path: tuple, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name = trees.path_name(path)
        first = leaf.ndim % 2 if STACKED.search(name) else 0
        if not name.endswith("kernel") or leaf.ndim < first + 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map_with_path(axes, params)


def _labels(groups: Mapping[str, Any]) -> Callable[[Params], Any]:
    """Returns the function that maps parameters to the expression of the group of each, "" where there is none."""
    matchers = {pattern: trees.matcher([pattern], "groups") for pattern in groups}

    def labels(params: Params) -> Any:
        def label(path: tuple, leaf: Any) -> str:
            name = trees.path_name(path)
            return next((pattern for pattern, matches in matchers.items() if matches(name)), "")

        return jax.tree.map_with_path(label, params)

    return labels


def _own(networks: Mapping[str, Params], player: Player) -> dict[str, Params]:
    return {name: networks[name] for name in player.networks}


def _check_section(value: Any, field: str) -> None:
    if not isinstance(value, Mapping):
        raise InputError(field, f"must be a section, as {{'learning_rate': 1e-4}}, got {value!r}")
