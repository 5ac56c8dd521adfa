"""Builds optax optimizers by name, with their learning rate schedules."""

import dataclasses
import inspect
import logging
from typing import Any, Literal

import jax.numpy as jnp
import optax

from diffusion.core import checks
from diffusion.core.build import call
from diffusion.core.types import Array, InputError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation, and its learning rate as a function of the step."""

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule


def make_optimizer(
    steps: int,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    schedule: Literal["constant", "cosine", "linear"] = "constant",
    warmup: int = 0,
    cycles: int = 1,
    clip: float | None = 1.0,
    **options: Any,
) -> Optimizer:
    """Returns clipping by global norm, followed by any optimizer of optax.

    Args:
      steps: Length of the whole run, at whose end a decaying schedule reaches 0.
      name: A function of optax with a `learning_rate`: `adam`, `adamw`, `lion`, `sgd`, ...
      learning_rate: The peak learning rate.
      schedule: The schedule after the warmup: `constant`, or a `cosine` or `linear` decay to 0.
      warmup: Steps of linear increase from 0; shortened to a tenth of the cycle if the cycle is not longer.
      cycles: Number of equal parts of the run, each with its own warmup and decay, for methods that train in rounds.
        If it does not divide `steps`, the last cycle is shorter.
      clip: Largest global norm of the gradient; None for no clipping.
      **options: Keywords of the optimizer (`b1`, `b2`, `weight_decay`, ...).

    Raises:
      InputError: optax has no such optimizer or option, or a number is out of range.
    """
    factory = getattr(optax, name, None)
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
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, length - warmup),
        "linear": optax.linear_schedule(learning_rate, 0, length - warmup),
    }[schedule]
    cycle = (
        optax.join_schedules([optax.linear_schedule(0, learning_rate, warmup), after], [warmup]) if warmup else after
    )

    def rate(step: Array) -> Array:
        return cycle(step - jnp.minimum(step // length, cycles - 1) * length)

    try:
        update = call(factory, {**options, "learning_rate": rate}, field="options")
    except TypeError as error:  # optax does not annotate all of its options
        raise InputError("options", f"optax.{name} does not accept them: {error}") from error
    clipping = [] if clip is None else [optax.clip_by_global_norm(clip)]
    return Optimizer(optax.chain(*clipping, update), rate)
