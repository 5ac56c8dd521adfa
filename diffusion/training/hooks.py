"""Hooks: functions that the trainer calls at certain steps."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from diffusion.core import files, images
from diffusion.core.types import Params


@dataclasses.dataclass(frozen=True)
class Hook:
    """A function of the trainer, and the steps at which it runs.

    Attributes:
      when: Runs every `when` steps and at the last one, or at the steps for which `when(step)` is true.
      function: Called as `function(trainer)`, with `trainer.step`, `trainer.state` and `trainer.metrics` up to date.
      name: Shown when the function hangs.
      metrics: Names of the metrics that the function returns, by name. They are written with those of the step, and
        `checkpoint.keep_best` may name them, since a hook with metrics runs before the checkpoint of its step. All
        others run after it and return nothing.
    """

    when: int | Callable[[int], bool]
    function: Callable[[Any], Mapping[str, float] | None]
    name: str = "hook"
    metrics: tuple[str, ...] = ()

    def is_due(self, step: int, is_last: bool) -> bool:
        """Returns whether the hook runs after a step."""
        return self.when(step) if callable(self.when) else is_last or step % self.when == 0

    def run(self, trainer: Any) -> Mapping[str, float]:
        """Calls the function, and returns its metrics."""
        return self.function(trainer) or {}


def every(steps: int, function: Callable[[Any], None]) -> Hook:
    """Returns a hook that calls `function(trainer)` every `steps` steps and at the last one."""
    return Hook(steps, function, getattr(function, "__name__", "hook"))


def preview(steps: int, draw: Callable[[Params], Image.Image]) -> Hook:
    """Returns a hook that writes `draw(averaged parameters)` to `previews/step_NNNNNNN.png` in the workdir."""

    def save(trainer: Any) -> None:
        sheet = draw(trainer.averaged_params())
        folder = os.path.join(trainer.workdir, "previews")
        files.make_folder(folder, "workdir")
        images.save_png(sheet, os.path.join(folder, f"step_{trainer.step:07d}.png"))

    return Hook(steps, save, "preview")


def evaluate(steps: int, measure: Callable[[Params], Mapping[str, float]], names: Sequence[str]) -> Hook:
    """Returns a hook that measures the averaged parameters; the metrics of the run are named `eval/NAME`.

    Args:
      measure: Returns metrics by name.
      names: The names.
    """

    def run(trainer: Any) -> dict[str, float]:
        return {f"eval/{name}": value for name, value in measure(trainer.averaged_params()).items()}

    return Hook(steps, run, "evaluation", tuple(f"eval/{name}" for name in names))
