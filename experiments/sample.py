"""Draws samples from a trained run, which is read from its workdir alone.

python -m experiments.sample --workdir=runs/digits --num=100 --labels=0,1,2 --steps=50 --guidance=1.5 \
    --sampler=ddim --seed=0 --out=DIR
"""

import json
import os

import numpy as np
from absl import flags

from diffusion import files, visualize
from diffusion.types import InputError
from experiments import cli, parts

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
NUM = flags.DEFINE_integer("num", 100, "How many samples.")
LABELS = flags.DEFINE_list("labels", None, "Classes to draw, repeated in turn up to --num. Default: all.")
STEPS = flags.DEFINE_integer("steps", None, "Steps of the sampler. Default: the config's.")
GRID = flags.DEFINE_string("grid", None, "Where the steps lie. Default: the config's.")
SAMPLER = flags.DEFINE_string("sampler", None, "Name of the sampler. Default: the config's, with its keywords.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; 1 is none. Default: the config's.")
EMA = flags.DEFINE_string("ema", None, "Which average of the parameters, or none. Default: the config's last.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 250, "Samples at a time; the samples do not depend on it.")
OUT = flags.DEFINE_string("out", None, "Folder for samples.png and samples.npz. Default: WORKDIR/samples.")
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    for name, value in (("num", NUM.value), ("batch_size", BATCH_SIZE.value)):
        if value < 1:
            raise InputError(f"--{name}", f"must be at least 1, got {value}")
    run = parts.open_run(WORKDIR.value, EMA.value)
    labels = classes(LABELS.value, NUM.value, run.spec.num_classes)
    sampler, guidance = dict(run.config["sampler"]), dict(run.config["guidance"])
    if SAMPLER.value not in (None, sampler["name"]):
        sampler = {"name": SAMPLER.value, "steps": sampler["steps"], "grid": sampler.get("grid", "trailing")}
    if STEPS.value is not None:
        sampler["steps"] = STEPS.value
    if GRID.value is not None:
        sampler["grid"] = GRID.value
    if GUIDANCE.value is not None:
        guidance["scale"] = GUIDANCE.value
    drawer = run.drawer(sampler=sampler, guidance=guidance)
    out = files.make_folder(OUT.value or os.path.join(WORKDIR.value, "samples"), "--out")

    x = drawer(run.params, labels, NUM.value, seed=SEED.value, batch_size=BATCH_SIZE.value, title="sample")
    settings = {"workdir": WORKDIR.value, "step": run.step, "ema": run.ema, "sampler": sampler, "guidance": guidance,
                "seed": SEED.value, "num": NUM.value}  # fmt: skip
    path = os.path.join(out, "samples.npz")
    with files.replace(path, "wb") as file:
        np.savez(
            file,
            samples=visualize.to_uint8(x) if len(run.spec.shape) == 3 else x,
            labels=np.zeros(NUM.value, np.int32) if labels is None else labels,
            settings=np.array(json.dumps(settings)),
        )
    picture = os.path.join(out, "samples.png")
    columns = run.spec.num_classes if labels is not None and LABELS.value is None else None
    visualize.save_png(visualize.picture(x, columns), picture)
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
        if not label.strip().isdecimal() or not int(label) < num_classes:
            raise InputError("--labels", f"must be numbers from 0 to {num_classes - 1}, as in 0,1,2; got {label!r}")
    if not given:
        raise InputError("--labels", "is empty; leave it out for all classes")
    return np.resize(np.array([int(label) for label in given], np.int32), num)


if __name__ == "__main__":
    cli.run(main)
