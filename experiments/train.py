"""Trains the model of a config, or goes on with the workdir's.

python -m experiments.train --config=configs/digits.py --workdir=runs/digits [--config.train.steps=200] [--check]
"""

from absl import flags

from diffusion.pipelines.build_training import prepared, traced
from diffusion.training.resilience import preemption
from diffusion.training.trainer import train
from experiments import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, previews.")
CHECK = flags.DEFINE_bool(
    "check", False, "Build and trace all that the run needs, say what it would train, and write nothing."
)
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    run = prepared(CONFIG.value.to_dict(), WORKDIR.value)
    if CHECK.value:
        print(f"{WORKDIR.value}: {traced(run)}; nothing written")
    else:
        train(WORKDIR.value, **run)


if __name__ == "__main__":
    preemption.stop_at_once()
    cli.run(main)
