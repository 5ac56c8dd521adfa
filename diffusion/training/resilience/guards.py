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
LOSS_DECAY = 0.99  # of the running mean of the loss
WARMUP = 100  # good steps before losses are compared with the running mean


class Diverged(Exception):
    """Too many consecutive steps were bad, or samples are not finite."""


def counters() -> dict[str, Array]:
    """Returns the counters before the first step.

    They are the numbers of `bad` steps in total and `in_row`, the number of `good` steps, and the running mean of the
    `loss` of the good steps.
    """
    return {"bad": jnp.int32(0), "in_row": jnp.int32(0), "good": jnp.int32(0), "loss": jnp.float32(0)}


@dataclasses.dataclass(frozen=True)
class Guard:
    """Checks steps on the device, so that the host need not wait for them.

    Attributes:
      spike: A step is bad if its loss exceeds the running mean by more than spike - 1 times the mean's absolute value;
        None for no such limit.
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
        if self.spike is not None:
            mean = before["loss"] / (1 - LOSS_DECAY ** before["good"].astype(jnp.float32))
            ok &= (before["good"] < WARMUP) | (loss - mean <= (self.spike - 1) * jnp.abs(mean))
        bad = 1 - ok.astype(jnp.int32)
        return ok, {
            "bad": before["bad"] + bad,
            "in_row": (before["in_row"] + 1) * bad,
            "good": before["good"] + 1 - bad,
            "loss": jnp.where(ok, LOSS_DECAY * before["loss"] + (1 - LOSS_DECAY) * loss, before["loss"]),
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
