"""Keeps bad steps out of the state: those with a non-finite loss or gradient, or with a loss far above the others."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core import files
from diffusion.core.types import Array, InputError

DUMP = "diverged.json"
LOSS_DECAY = 0.99  # of the running means of the loss and of its deviation
WARMUP = 100  # good steps before losses are compared with the running mean


class Diverged(Exception):
    """Too many consecutive steps were bad, or samples are not finite."""


def counters() -> dict[str, Array]:
    """Returns the counters before the first step.

    They are the numbers of `bad` steps in total and `in_row`, the number of `good` steps, and the running means of
    the `loss` of the good steps and of its `deviation`, the absolute difference from that mean.
    """
    counts = {name: jnp.int32(0) for name in ("bad", "in_row", "good")}
    return {**counts, "loss": jnp.float32(0), "deviation": jnp.float32(0)}


def continued(stored: dict[str, Array]) -> dict[str, Array]:
    """Returns the counters of a checkpoint; where they have no `deviation` yet, the running means start again."""
    return stored if "deviation" in stored else {**counters(), "bad": stored["bad"], "in_row": stored["in_row"]}


@dataclasses.dataclass(frozen=True)
class Guard:
    """Checks steps on the device, so that the host need not wait for them.

    Attributes:
      spike: A step is bad if its loss exceeds the running mean by more than `spike` times the mean absolute deviation;
        None for no such limit. Both means have the decay `LOSS_DECAY`.
    """

    spike: float | None = None

    def __post_init__(self):
        if self.spike is not None and self.spike <= 1:
            raise InputError("spike", f"must be greater than 1, got {self.spike}")

    def check_step(self, before: dict[str, Array], loss: Array, grad_norm: Array) -> tuple[Array, dict[str, Array]]:
        """Returns whether a step is good, and the counters after it.

        Args:
          before: The counters before the step.
          loss: The mean loss.
          grad_norm: The global norm of the gradient.
        """
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        total = LOSS_DECAY * before["loss"] + (1 - LOSS_DECAY) * loss
        mean = total / (1 - LOSS_DECAY ** (before["good"] + 1).astype(jnp.float32))
        deviation = LOSS_DECAY * before["deviation"] + (1 - LOSS_DECAY) * jnp.abs(loss - mean)
        if self.spike is not None:
            # Both sides times the deviation's correction for its start at 0, which is 0 before the first step.
            correction = 1 - LOSS_DECAY ** before["good"].astype(jnp.float32)
            ok &= (before["good"] < WARMUP) | ((loss - mean) * correction <= self.spike * before["deviation"])
        bad = 1 - ok.astype(jnp.int32)
        return ok, {
            "bad": before["bad"] + bad,
            "in_row": (before["in_row"] + 1) * bad,
            "good": before["good"] + 1 - bad,
            "loss": jnp.where(ok, total, before["loss"]),
            "deviation": jnp.where(ok, deviation, before["deviation"]),
        }


def select_if_ok(ok: Array, new: Any, old: Any) -> Any:
    """Returns the tree `new` if `ok`, and otherwise `old` bit for bit."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def dump(workdir: str, step: int, found: Mapping[str, Any]) -> None:
    """Writes `diverged.json`.

    Args:
      workdir: The run's folder.
      step: The step that ended the run.
      found: Its seed, metrics and the positions of its examples in the data order, JSON-serializable.
    """
    files.write_json(os.path.join(workdir, DUMP), {"step": step, **found})
