"""Draws samples from a trained run, which is read from its workdir.

python -m experiments.sample --workdir=runs/digits --num=100 --labels=0,1,2 --seed=0 --out=DIR \\
    --sampler=dpm_solver_pp:order=3 --grid=karras:rho=5 --steps=20 --guidance=1.5 --interval=0.2,0.8
python -m experiments.sample --workdir=runs/digits --sweep="steps=10,20,50;guidance=1,2,4"
python -m experiments.sample --workdir=runs/shapes_text --prompts="a red circle; two blue squares" --guidance=3

Samples are written as they are drawn, and the same command resumes after the files of an interrupted one.
Samplers, grids and guidance are written NAME:option=value:option=value; docs/samplers.md lists them. Conditions other
than labels and prompts are those of the data's examples, in turn; `Run.sample` takes others.
"""

import os

from absl import flags

from diffusion.core.types import InputError
from diffusion.pipelines import overrides
from diffusion.pipelines.generator import check_numbers, is_neutral
from diffusion.pipelines.sample_files import FORMATS, PICTURE, write_samples
from diffusion.pipelines.sampling_sweep import sweep
from experiments import cli, condition_flags, sampling_flags
from experiments.condition_flags import CROP, LABELS, NEGATIVE_PROMPT, ORIGINAL_SIZE, PROMPT_WEIGHTS, SIZE
from experiments.sampling_flags import BATCH_SIZE, CLIP_SKIP, DTYPE, TILES

WORKDIR = cli.define_path("workdir", None, "Folder of the run.")
NUM = flags.DEFINE_integer("num", 100, "Number of samples.")
SWEEP = flags.DEFINE_string(
    "sweep", None, f"Every combination of NAME=value,value;NAME=...: {overrides.AXES}; or those of @FILE.json."
)
METRICS = flags.DEFINE_bool("metrics", False, "With --sweep: measure the samples with the metrics of the eval section.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
OUT = cli.define_path("out", None, "Folder for samples.png and the samples. Default: WORKDIR/samples.")
OUT_FORMAT = flags.DEFINE_enum(
    "out_format", "npz", FORMATS, "npz: samples.npz, or samples_00000.npz, ... of 10,000 samples each; png: images/."
)
NO_METADATA = flags.DEFINE_bool(
    "no_metadata", False, "Write PNG files without their prompt and settings, which other tools show otherwise."
)
flags.adopt_module_key_flags(sampling_flags)
flags.adopt_module_key_flags(condition_flags)
flags.mark_flags_as_required(["workdir"])

MOST_COLUMNS = 50  # of a sheet with one column per class


def main() -> None:
    num, prompts = condition_flags.numbered(NUM)
    check_numbers("--", seed=SEED.value, num=num, batch_size=BATCH_SIZE.value)
    run = condition_flags.sized(sampling_flags.opened(WORKDIR.value))
    cond = condition_flags.conditions(run, num, prompts)
    labels = cond.get("label")
    chosen, out = sampling_flags.chosen(), OUT.value or os.path.join(WORKDIR.value, "samples")
    if SWEEP.value is not None and PROMPT_WEIGHTS.value is not None:
        raise InputError("--prompt_weights", "cannot be combined with --sweep; leave one out")
    if SWEEP.value is not None:
        if METRICS.value and SIZE.value is not None:
            raise InputError("--size", "excludes --metrics, which compare samples with the data; leave one out")
        metrics = [metric for metric in run.metrics() if metric.kind == "samples"] if METRICS.value else []
        sweep(
            run, chosen, SWEEP.value, out, cond=cond, num=num, seed=SEED.value, batch_size=BATCH_SIZE.value,
            metrics=metrics,
        )  # fmt: skip
        return
    sampler, guidance = overrides.sections(run.config, chosen)
    if NEGATIVE_PROMPT.value is not None and is_neutral(guidance):
        raise InputError("--negative_prompt", "has no effect without guidance; add --guidance=3, or leave it out")
    generator = run.generator(sampler=sampler, guidance=guidance, prompt_weights=PROMPT_WEIGHTS.value)
    settings = {"workdir": WORKDIR.value, "step": run.step, "ema": run.ema, "sampler": sampler, "guidance": guidance,
                "seed": SEED.value, "labels": LABELS.value, "prompts": prompts,
                "negative_prompt": NEGATIVE_PROMPT.value, "prompt_weights": PROMPT_WEIGHTS.value,
                "size": SIZE.value, "original_size": ORIGINAL_SIZE.value, "crop": CROP.value,
                "clip_skip": CLIP_SKIP.value, "tiles": TILES.value, "dtype": DTYPE.value}  # fmt: skip
    by_class = labels is not None and LABELS.value is None and run.spec.num_classes <= MOST_COLUMNS
    where = write_samples(
        lambda first: generator.batches(
            run.params, cond, num, seed=SEED.value, batch_size=BATCH_SIZE.value, title="sample", first=first
        ),
        out, labels=labels, num=num, spec=run.spec, settings=settings, out_format=OUT_FORMAT.value,
        columns=run.spec.num_classes if by_class else None, prompts=cond.get("prompt"),
        metadata=not NO_METADATA.value,
    )  # fmt: skip
    print(f"{num} samples: {os.path.join(out, PICTURE)} and {where}")


if __name__ == "__main__":
    cli.run(main)
