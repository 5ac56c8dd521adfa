"""Evaluates a trained run with the metrics of the config's `eval` section.

python -m experiments.evaluate --workdir=runs/digits [--steps=50] [--sampler=heun] [--seed=0]

Writes `evaluation.json` to the workdir or to --out, and appends the same to `evaluations.jsonl`. Each metric sets its
own guidance scale; --guidance may name another guidance.
"""

import os

from absl import flags

from diffusion.core import files
from diffusion.core.types import InputError
from diffusion.pipelines import overrides
from diffusion.pipelines.generator import check_numbers
from experiments import cli, sampling_flags
from experiments.sampling_flags import BATCH_SIZE

WORKDIR = cli.define_path("workdir", None, "Folder of the run.")
SEED = flags.DEFINE_integer("seed", 1, "Seed of the noise.")
OUT = cli.define_path("out", None, "Folder for evaluation.json and evaluations.jsonl. Default: WORKDIR.")
flags.adopt_module_key_flags(sampling_flags)
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    check_numbers("--", seed=SEED.value, batch_size=BATCH_SIZE.value)
    run = sampling_flags.opened(WORKDIR.value)
    if not run.config["eval"]["metrics"]:
        problem = "is empty, so that there is nothing to measure; train or convert with a config that lists metrics"
        raise InputError("config.eval.metrics", problem)
    out = files.make_folder(OUT.value or WORKDIR.value, "--out" if OUT.value else "--workdir")
    sampler, guidance = overrides.sections(run.config, sampling_flags.chosen())
    results = {}
    for values, note in run.measure(sampler, guidance, seed=SEED.value, batch_size=BATCH_SIZE.value, progress=True):
        results |= values
        for name, value in values.items():
            print(f"{name} {value:.4f}  {note}".rstrip())
    settings = {"step": run.step, "ema": run.ema, "sampler": sampler, "guidance": guidance, "seed": SEED.value}
    found = {**results, "settings": settings}
    files.write_json(os.path.join(out, "evaluation.json"), found)
    lines = files.Lines(os.path.join(out, "evaluations.jsonl"))
    lines.add(files.json_text(found))
    lines.close()


if __name__ == "__main__":
    cli.run(main)
