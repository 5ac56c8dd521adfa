"""Measures samplers on trained runs at the same numbers of evaluations, and inserts the table into a Markdown file,
between its lines `<!-- table -->` and `<!-- end of table -->`.

python -m experiments.sampler_table --workdirs=runs/digits,runs/digits_flow --out=docs/samplers.md
"""

import os

from absl import flags

from diffusion.pipelines import overrides, tables
from diffusion.pipelines.evaluation import check_finite, measure_samples
from diffusion.pipelines.run import Run, open_run
from experiments import cli

WORKDIRS = cli.define_paths("workdirs", "Folders of the runs.")
OUT = cli.define_path("out", "docs/samplers.md", "The file that the table is inserted into.")
NUM = flags.DEFINE_integer("num", 1000, "Samples per measurement.")
EVALUATIONS = flags.DEFINE_list("evaluations", ["5", "10", "20", "50"], "Evaluations of the model per sample.")
SAMPLERS = flags.DEFINE_list("samplers", [
    "ddim", "ancestral", "ancestral:variance=analytic", "heun", "heun:churn=5", "dpm2", "dpm2_ancestral", "lms",
    "dpm_solver:order=2", "dpm_solver", "dpm_solver_pp:singlestep=true", "dpm_solver_pp", "dpm_solver_pp:order=3",
    "dpm_solver_pp:sde=true", "unipc", "unipc:order=3", "deis", "pndm", "rk4", "euler_maruyama", "predictor_corrector",
], "The samplers, written as for experiments.sample.")  # fmt: skip
flags.mark_flags_as_required(["workdirs"])


def main() -> None:
    tables.surroundings(OUT.value, "--out")
    made = [table(open_run(workdir), os.path.basename(os.path.normpath(workdir))) for workdir in WORKDIRS.value]
    tables.insert(OUT.value, made, "--out")
    print(f"updated {OUT.value}")


def table(run: Run, title: str) -> str:
    """Returns a table with a row per sampler and a column per number of evaluations.

    A cell has the first value of each metric.
    """
    metrics = [metric for metric in run.metrics() if metric.kind == "samples"]
    cond = run.conditions(NUM.value)
    grid = run.config["sampler"]["grid"]["name"]
    rows, names = [], [metric.names[0] for metric in metrics]
    for sampler in SAMPLERS.value:
        cells = []
        for count in EVALUATIONS.value:
            section, guidance = overrides.sections(run.config, {"sampler": sampler, "evaluations": count})
            generator = run.generator(sampler=section, guidance={"name": guidance["name"], "scale": 1.0})
            samples = generator.batches(run.params, cond, NUM.value, seed=1, title=f"{title} {sampler} {count}")
            measured, problem = measure_samples(metrics, samples, run.spec)
            check_finite([f"{title} {sampler}: {problem}"] if problem else [], 1, "measurements")
            cells.append(" / ".join(f"{values[name]:.3f}" for name, values in zip(names, measured, strict=True)))
        rows.append([f"`{sampler}`", *cells])
    return "\n".join([
        f"**{title}**, step {run.step}, average {run.ema}, grid `{grid}`, no guidance, {NUM.value} samples: "
        f"{' / '.join(names)} by evaluations of the model.",
        "",
        tables.markdown(["sampler", *EVALUATIONS.value], rows),
    ])  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
