"""Draws samples from a trained run, which is read from its workdir alone.

python -m experiments.sample --workdir=runs/digits --num=100 --labels=0,1,2 --seed=0 --out=DIR \\
    --sampler=dpm_solver_pp:order=3 --grid=karras:rho=5 --steps=20 --guidance=1.5 --interval=0.2,0.8
python -m experiments.sample --workdir=runs/digits --sweep="steps=10,20,50;guidance=1,2,4"

Samplers, grids and guidance are written NAME:keyword=value:keyword=value; docs/samplers.md has them all.
"""

import json
import os

import numpy as np
from absl import flags

from diffusion.core import files, images
from diffusion.core.types import InputError, SampleMetric
from diffusion.pipelines import overrides
from diffusion.pipelines.generator import check_numbers
from diffusion.pipelines.run import open_run
from diffusion.pipelines.sampling_sweep import sweep
from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
NUM = flags.DEFINE_integer("num", 100, "How many samples.")
LABELS = flags.DEFINE_list("labels", None, "Classes to draw, repeated in turn up to --num. Default: all.")
CHOICES = {
    name: flags.DEFINE_string(name, None, text)
    for name, text in {
        "sampler": "The sampler, as ddim or heun:churn=40. Default: the config's, with its keywords.",
        "grid": "Where the steps lie, as karras or karras:rho=5. Default: the config's.",
        "steps": "Steps of the sampler. Default: the config's.",
        "evaluations": "Evaluations of the model, in place of --steps: as many steps as they are enough for.",
        "guidance": "Guidance: its scale (1 is none), or apg:scale=2:eta=0.5. Default: the config's.",
        "interval": "Guide only at times lo,hi, or at noise levels sigma / alpha lo,hi,sigma.",
        "rescale": "Bring the guided x0 back to its standard deviation before guidance, by this share in [0, 1].",
        "threshold": "Keep x0 in range: 1 clips it, below 1 is the percentile of dynamic thresholding.",
        "unroll": "Steps to an iteration of the loop.",
    }.items()
}
SWEEP = flags.DEFINE_string(
    "sweep", None, f"Every combination of NAME=value,value;NAME=...: {overrides.AXES}; or those of @FILE.json."
)
METRICS = flags.DEFINE_bool("metrics", False, "With --sweep: measure the samples, by the metrics of the config's eval.")
EMA = flags.DEFINE_string("ema", None, "Which average of the parameters, or none. Default: the config's last.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 250, "Samples at a time; the samples do not depend on it.")
OUT = flags.DEFINE_string("out", None, "Folder for samples.png and samples.npz. Default: WORKDIR/samples.")
flags.mark_flags_as_required(["workdir"])

MOST_COLUMNS = 50  # of a sheet with a column for each class


def main() -> None:
    check_numbers(seed=SEED.value, num=NUM.value, batch_size=BATCH_SIZE.value)
    run = open_run(WORKDIR.value, EMA.value)
    labels = classes(LABELS.value, NUM.value, run.spec.num_classes)
    chosen = {name: flag.value for name, flag in CHOICES.items() if flag.value is not None}
    if {"steps", "evaluations"} <= chosen.keys():
        raise InputError("--steps", "follow from --evaluations; give one of the two")
    out = OUT.value or os.path.join(WORKDIR.value, "samples")
    if SWEEP.value is not None:
        metrics = [metric for metric in run.metrics() if isinstance(metric, SampleMetric)] if METRICS.value else []
        sweep(
            run, chosen, SWEEP.value, out, labels=labels, num=NUM.value, seed=SEED.value, batch_size=BATCH_SIZE.value,
            metrics=metrics,
        )  # fmt: skip
        return
    sampler, guidance = overrides.sections(run.config, chosen)
    drawer = run.drawer(sampler=sampler, guidance=guidance)
    files.make_folder(out, "--out")

    x = drawer(run.params, labels, NUM.value, seed=SEED.value, batch_size=BATCH_SIZE.value, title="sample")
    settings = {"workdir": WORKDIR.value, "step": run.step, "ema": run.ema, "sampler": sampler, "guidance": guidance,
                "seed": SEED.value, "num": NUM.value}  # fmt: skip
    path = os.path.join(out, "samples.npz")
    with files.replace(path, "wb") as file:
        np.savez(
            file,
            samples=images.to_uint8(x) if run.spec.is_image else x,
            labels=np.zeros(NUM.value, np.int32) if labels is None else labels,
            settings=np.array(json.dumps(settings)),
        )
    picture = os.path.join(out, "samples.png")
    by_class = labels is not None and LABELS.value is None and run.spec.num_classes <= MOST_COLUMNS
    columns = run.spec.num_classes if by_class else None
    images.save_png(images.picture(x, columns), picture)
    print(f"{NUM.value} samples: {picture} and {path}")


def classes(given: list[str] | None, num: int, num_classes: int) -> np.ndarray | None:
    """The label of each of `num` samples, int32 `[num]`; None where the data has no classes."""
    if not num_classes:
        if given:
            raise InputError("--labels", "the run's data has no classes; leave it out")
        return None
    if given is None:
        return np.arange(num, dtype=np.int32) % num_classes
    for label in given:
        if not overrides.is_whole(label) or not int(label) < num_classes:
            raise InputError("--labels", f"must be numbers from 0 to {num_classes - 1}, as in 0,1,2; got {label!r}")
    if not given:
        raise InputError("--labels", "is empty; leave it out for all classes")
    return np.resize(np.array([int(label) for label in given], np.int32), num)


if __name__ == "__main__":
    cli.run(main)
