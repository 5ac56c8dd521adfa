"""What keeps a bad step out of the state: a loss or a gradient that is no number, or a loss far above the others."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core import files
from diffusion.core.types import Array, InputError

DUMP = "diverged.json"
MEMORY = 0.99  # of the running mean of the loss
WARMUP = 100  # sound steps before a loss is held against it


class Diverged(Exception):
    """Too many steps in a row were bad."""


def counters() -> dict[str, Array]:
    """Those of a run, before its first step: bad steps in all and in a row, sound ones, and the running mean of the
    losses of these."""
    return {"bad": jnp.int32(0), "in_row": jnp.int32(0), "sound": jnp.int32(0), "loss": jnp.float32(0)}


@dataclasses.dataclass(frozen=True)
class Guard:
    """Judges steps on the device; nothing waits for it.

    Attributes:
      spike: a loss above so many times the running mean of those before it is bad too; None for no such limit.
    """

    spike: float | None = None

    def __post_init__(self):
        if self.spike is not None and self.spike <= 1:
            raise InputError("spike", f"must be above 1, got {self.spike}")

    def check_step(self, counters: dict[str, Array], loss: Array, grad_norm: Array) -> tuple[Array, dict[str, Array]]:
        """Whether a step is sound, and the counters after it."""
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if self.spike is not None:
            mean = counters["loss"] / (1 - MEMORY ** counters["sound"].astype(jnp.float32))
            ok &= (counters["sound"] < WARMUP) | (loss <= self.spike * mean)
        bad = 1 - ok.astype(jnp.int32)
        return ok, {
            "bad": counters["bad"] + bad,
            "in_row": (counters["in_row"] + 1) * bad,
            "sound": counters["sound"] + 1 - bad,
            "loss": jnp.where(ok, MEMORY * counters["loss"] + (1 - MEMORY) * loss, counters["loss"]),
        }


def select_if_ok(ok: Array, new: Any, old: Any) -> Any:
    """`new` where the step is sound, bit for bit `old` where it is not."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def dump(workdir: str, step: int, found: Mapping[str, Any]) -> None:
    """Writes what is known of the step that ended a run: its seed, the examples' places in the order, its metrics."""
    with files.replace(os.path.join(workdir, DUMP)) as file:
        json.dump({"step": step, **found}, file, indent=2, default=float)
