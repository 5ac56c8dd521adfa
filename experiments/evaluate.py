"""Evaluates a trained run with the metrics of the config's `eval` section.

python -m experiments.evaluate --workdir=runs/digits [--steps=50] [--sampler=heun] [--seed=0]

Writes `evaluation.json` to the workdir, and appends the same to `evaluations.jsonl`. Each metric sets its own guidance
scale; --guidance may name another guidance.
"""

import json
import os

from absl import flags

from diffusion.core import files
from diffusion.pipelines import overrides
from diffusion.pipelines.generator import check_numbers
from diffusion.pipelines.run import open_run
from experiments import cli, sampling_flags
from experiments.sampling_flags import ALLOW_IMPORTS, BATCH_SIZE, EMA

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
SEED = flags.DEFINE_integer("seed", 1, "Seed of the noise.")
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    check_numbers(seed=SEED.value, batch_size=BATCH_SIZE.value)
    run = open_run(WORKDIR.value, EMA.value, allow_imports=ALLOW_IMPORTS.value)
    sampler, guidance = overrides.sections(run.config, sampling_flags.chosen())
    results = {}
    for values, note in run.measure(sampler, guidance, seed=SEED.value, batch_size=BATCH_SIZE.value, progress=True):
        results |= values
        for name, value in values.items():
            print(f"{name} {value:.4f}  {note}".rstrip())
    settings = {"step": run.step, "ema": run.ema, "sampler": sampler, "guidance": guidance, "seed": SEED.value}
    found = {**results, "settings": settings}
    with files.replace(os.path.join(WORKDIR.value, "evaluation.json")) as file:
        json.dump(found, file, indent=2)
    lines = files.Lines(os.path.join(WORKDIR.value, "evaluations.jsonl"))
    lines.add(json.dumps(found))
    lines.close()


if __name__ == "__main__":
    cli.run(main)
