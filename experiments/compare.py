"""Measures trained runs against each other at the same few evaluations of the model, each with its own sampler and grid
and without guidance: a table, a plot of quality against evaluations, and a contact sheet.

python -m experiments.compare --runs=runs/digits,runs/digits_flow --nfe=1,2,4,8,50 [--docs=docs/few_step.md]

All runs are measured by the metrics of the first one's config. Into the folder --out go `compare.csv`, `compare.png`
and `compare_samples.png`. With --docs, the table is written into that file too, between its lines `<!-- table -->` and
`<!-- end of table -->`, and the pictures beside it, under its name: for few_step.md they are few_step.png and
few_step_samples.png.
"""

from absl import flags

from diffusion.pipelines.comparison import compare
from diffusion.pipelines.generator import check_numbers
from experiments import cli

RUNS = flags.DEFINE_list("runs", None, "Folders of the runs, trained on data of one kind.")
NFE = flags.DEFINE_list("nfe", ["1", "2", "4", "8", "50"], "Evaluations of the model for each sample.")
OUT = flags.DEFINE_string("out", "runs/compare", "Folder for the table and the pictures.")
DOCS = flags.DEFINE_string("docs", None, "A Markdown file that the table is written into as well.")
NUM = flags.DEFINE_integer("num", 1000, "Samples for each figure.")
SEED = flags.DEFINE_integer("seed", 1, "Seed of the noise, which is the same for every run.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 250, "Samples at a time; the samples do not depend on it.")
EMA = flags.DEFINE_string("ema", None, "Which average of the parameters, or none. Default: each config's last.")
flags.mark_flags_as_required(["runs"])


def main() -> None:
    check_numbers(seed=SEED.value, num=NUM.value, batch_size=BATCH_SIZE.value)
    compare(RUNS.value, NFE.value, out=OUT.value, docs=DOCS.value, num=NUM.value, seed=SEED.value,
            batch_size=BATCH_SIZE.value, ema=EMA.value)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
