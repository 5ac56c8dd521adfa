"""Draws samples from a trained run and measures them: the metrics of the config's `eval` section.

python -m experiments.evaluate --workdir=runs/digits [--steps=50] [--seed=0]
"""

import json
import os

import jax
import numpy as np
from absl import flags

from diffusion.core import files
from diffusion.core.types import SampleMetric
from diffusion.pipelines.generator import check_numbers
from diffusion.pipelines.run import open_run
from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
STEPS = flags.DEFINE_integer("steps", None, "Steps of the sampler. Default: the config's.")
EMA = flags.DEFINE_string("ema", None, "Which average of the parameters, or none. Default: the config's last.")
SEED = flags.DEFINE_integer("seed", 1, "Seed of the noise.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 250, "Samples at a time; the samples do not depend on it.")
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    check_numbers(seed=SEED.value, batch_size=BATCH_SIZE.value)
    run = open_run(WORKDIR.value, EMA.value)
    sampler = dict(run.config["sampler"])
    if STEPS.value is not None:
        sampler["steps"] = STEPS.value
    metrics = run.metrics()
    of_samples = [metric for metric in metrics if isinstance(metric, SampleMetric)]
    drawers = {
        scale: run.drawer(sampler=sampler, guidance={**run.config["guidance"], "scale": scale})
        for scale in {metric.guidance for metric in of_samples}
    }

    results, drawn = {}, {}
    for metric in metrics:
        if metric in of_samples:
            what = metric.guidance, metric.num
            labels = np.arange(metric.num) % run.spec.num_classes if run.spec.num_classes else None
            if what not in drawn:
                drawn[what] = drawers[metric.guidance](
                    run.params, labels, metric.num, seed=SEED.value, batch_size=BATCH_SIZE.value,
                    title=f"sample at guidance {metric.guidance:g}",
                )  # fmt: skip
            values = run.measured(metric, drawn[what], labels)
            note = f"  ({metric.num} samples, guidance {metric.guidance:g})"
        else:
            denoise = run.objective.denoiser(run.network.apply, run.params)
            values = metric(denoise, run.objective.schedule_for(run.params), jax.random.key(SEED.value))
            note = ""
        results |= values
        for name, value in values.items():
            print(f"{name} {value:.4f}{note}")
    settings = {"step": run.step, "ema": run.ema, "sampler": sampler, "seed": SEED.value}
    with files.replace(os.path.join(WORKDIR.value, "evaluation.json")) as file:
        json.dump({**results, "settings": settings}, file, indent=2)


if __name__ == "__main__":
    cli.run(main)
