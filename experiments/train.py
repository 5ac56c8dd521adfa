"""Trains the model of a config, or resumes the training of a workdir.

python -m experiments.train --config=configs/digits.py --workdir=runs/digits [--config.train.steps=200] [--check]
"""

import contextlib
import os
import shlex
from collections.abc import Iterator

from absl import flags

from diffusion.pipelines.build_training import build_training, check_training
from diffusion.training.resilience.preemption import Preemption
from diffusion.training.resilience.watchdog import Watchdog
from diffusion.training.trainer import Trainer
from experiments import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_path("workdir", None, "Folder of the run: checkpoints, metrics, previews.")
CHECK = flags.DEFINE_bool("check", False, "Build and trace everything, print what would be trained, and write nothing.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    training = build_training(CONFIG.value, WORKDIR.value)
    if CHECK.value:
        print(f"{WORKDIR.value}: {check_training(training, WORKDIR.value)}; nothing written")
        return
    limit = 60 * training["options"].hang_timeout
    watchdog = Watchdog(limit, os.path.join(WORKDIR.value, "hang_stacks.txt"), end_process=os._exit)
    preemption = Preemption(end_process=os._exit)
    trainer = Trainer(
        **training,
        workdir=WORKDIR.value,
        should_stop=lambda: preemption.requested,
        heartbeat=lambda activity, limit_factor: watchdog.beat(activity, limit_factor * limit),
        during_steps=_both(watchdog, preemption),
    )
    del training  # with the arrays of a warm start, which the state takes over
    trainer.fit()
    job = "evaluate" if hasattr(trainer.objective, "reconstruct") else "sample"
    print(f"done; next: python -m experiments.{job} --workdir={shlex.quote(WORKDIR.value)}")


@contextlib.contextmanager
def _both(watchdog: Watchdog, preemption: Preemption) -> Iterator[None]:
    with watchdog, preemption:
        yield


if __name__ == "__main__":
    cli.exit_on_signals()
    cli.run(main)
