"""The optimizer and its learning rate, from optax by name."""

import dataclasses
import inspect
from typing import Any, Literal

import jax.numpy as jnp
import optax

from diffusion.core.build import call
from diffusion.core.types import Array, InputError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation and the learning rate it follows, as a function of the step."""

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
    """Clipping by global norm, then any optimizer that optax has.

    Args:
      steps: of the whole run, at whose end a falling schedule is at 0.
      name: a function of optax with a `learning_rate`: `adam`, `adamw`, `lion`, `sgd`, ...
      learning_rate: its peak.
      schedule: what follows the warm-up: `constant`, or a fall to 0 along a `cosine` or a `linear` ramp.
      warmup: steps of linear rise from 0.
      cycles: equal parts of the run, each with a warm-up and a fall of its own, as methods that train in rounds want
        them; where `steps` cannot be divided, the last is the shorter.
      clip: largest global norm of the gradient; None for no clipping.
      **options: passed on to the optimizer (`b1`, `b2`, `weight_decay`, ...).
    """
    factory = getattr(optax, name, None)
    if not inspect.isfunction(factory) or "learning_rate" not in inspect.signature(factory).parameters:
        raise InputError("name", f"optax has no optimizer {name!r}; one of: adam, adamw, lion, sgd, ...")
    if learning_rate <= 0:
        raise InputError("learning_rate", f"must be positive, got {learning_rate}")
    if cycles < 1:
        raise InputError("cycles", f"must be at least 1, got {cycles}")
    length = -(-steps // cycles)
    if not 0 <= warmup < length:
        each = f" / {cycles} cycles" if cycles > 1 else ""
        raise InputError("warmup", f"must be at least 0 and less than train.steps = {steps}{each}, got {warmup}")
    if clip is not None and clip <= 0:
        raise InputError("clip", f"must be positive, or None for no clipping; got {clip}")
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, length - warmup),
        "linear": optax.linear_schedule(learning_rate, 0, length - warmup),
    }[schedule]
    once = optax.join_schedules([optax.linear_schedule(0, learning_rate, warmup), after], [warmup]) if warmup else after

    def rate(step: Array) -> Array:
        return once(step - jnp.minimum(step // length, cycles - 1) * length)

    update = call(factory, {**options, "learning_rate": rate}, field="options")
    clipping = [] if clip is None else [optax.clip_by_global_norm(clip)]
    return Optimizer(optax.chain(*clipping, update), rate)
