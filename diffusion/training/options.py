"""The options of a training: how long it runs, what it reports, and when it saves."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Literal

from diffusion.core.checks import at_least, at_most, positive, rate
from diffusion.core.types import InputError
from diffusion.training.resilience.guards import Guard

CONFIG_VERSION = 2  # increases whenever a stored config can no longer be read as it is


@dataclasses.dataclass(frozen=True)
class Options:
    """How long to train, and what to report.

    Attributes:
      steps: Number of steps of the whole run, restarts included.
      batch_size: Examples per step, over all devices.
      accumulate: Number of micro-batches that a step averages its gradient over.
      trainable: Regular expressions on the paths of the parameters that are trained, such as `net/blocks`; the others
        keep their values, which must come from `init_from`. None trains all, or those that the adapter adds.
      cond_drop_rate: Share of the examples trained without their conditions; guidance needs a rate above 0. A mapping
        has a rate per condition, drawn independently, and as `joint` the rate at which all are dropped together. Of
        several text encoders, `text.NAME` is the rate of one.
      log_every: Steps between two lines of metrics; a line has the means over these steps.
      preview_every: Steps between two grids of samples; 0 disables them.
      prefetch: Number of batches read ahead.
      workers: Processes that read the data; 0 reads in threads, which is best for data that need little work.
      patience: Number of consecutive bad steps that ends the run. A step is bad, and changes nothing, if its loss or
        gradient is not finite.
      spike: A step is bad too if its loss exceeds the running mean by more than this many times the running mean of
        its absolute deviation, of whatever sign the loss is; None disables this limit.
      rollbacks: How many times the run returns to its newest checkpoint, and continues with data that it has not seen,
        before bad steps end it.
      hang_timeout: Minutes without a completed step after which the jobs end a run, with the stacks of all threads; 0
        disables the watchdog. The first step, which is compiled, saves and previews have ten times as long.
    """

    steps: int = 1000
    batch_size: int = 128
    accumulate: int = 1
    trainable: tuple[str, ...] | None = None
    cond_drop_rate: float | Mapping[str, float] = 0.1
    log_every: int = 50
    preview_every: int = 0
    prefetch: int = 8
    workers: int = 0
    patience: int = 10
    spike: float | None = None
    rollbacks: int = 0
    hang_timeout: float = 10.0

    def __post_init__(self):
        positive_names = ("steps", "batch_size", "accumulate", "log_every", "prefetch", "patience")
        at_least(1, **{name: getattr(self, name) for name in positive_names})
        at_least(0, **{name: getattr(self, name) for name in ("preview_every", "workers", "rollbacks", "hang_timeout")})
        for name, most in (("batch_size", 10**7), ("prefetch", 10**4), ("workers", 10**4)):
            at_most(most, getattr(self, name), name)
        Guard(self.spike)
        rates = self.cond_drop_rate if isinstance(self.cond_drop_rate, Mapping) else {"": self.cond_drop_rate}
        for name, value in rates.items():
            rate(**{f"cond_drop_rate.{name}" if name else "cond_drop_rate": value})
        if self.batch_size % self.accumulate:
            raise InputError("accumulate", f"{self.accumulate} does not divide the batch of {self.batch_size}")

    def unconditional_share(self, conditions: Collection[str]) -> float:
        """Returns the share of the examples trained without any of the data's conditions.

        Raises:
          InputError: `cond_drop_rate` names a condition that the data do not have.
        """
        check_drop_rate(self.cond_drop_rate, conditions)
        if not isinstance(self.cond_drop_rate, Mapping):
            return self.cond_drop_rate
        joint = self.cond_drop_rate.get("joint", 0.0)
        return joint + (1 - joint) * math.prod(self.cond_drop_rate.get(name, 0.0) for name in conditions)


def check_drop_rate(
    rate: float | Mapping[str, float], conditions: Collection[str], parts: Collection[str] | None = None
) -> None:
    """Checks the names of `cond_drop_rate`: those of conditions of the data, `joint`, or `text.NAME`.

    Args:
      parts: The text encoders that can be dropped one by one; None if they are not known.
    """
    for name in rate if isinstance(rate, Mapping) else ():
        known = (*conditions, "joint", *(f"text.{part}" for part in parts or ()))
        if name not in known and not (parts is None and name.startswith("text.")):
            problem = f"the data have no condition {name!r}; one of: {', '.join(known)}"
            raise InputError("train.cond_drop_rate", problem)


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When to save, and which checkpoints to keep.

    Attributes:
      every: Steps between two checkpoints; the last step is always saved.
      minutes: Also save when this many minutes have passed since the last save; None disables this.
      keep: Number of the newest checkpoints to keep.
      keep_every: Keep the checkpoints of steps divisible by this number for good; None keeps no others.
      keep_best: Name of a metric, of the train step or, as `eval/NAME`, of the evaluation; keep the checkpoint at which
        it was best. None keeps no others.
      keep_best_mode: Whether the lowest (`min`) or the highest (`max`) value is the best.
    """

    every: int = 1000
    minutes: float | None = None
    keep: int = 3
    keep_every: int | None = None
    keep_best: str | None = None
    keep_best_mode: Literal["min", "max"] = "min"

    def __post_init__(self):
        positive(**{name: getattr(self, name) for name in ("every", "minutes", "keep", "keep_every")})
