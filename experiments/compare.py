"""Compares trained runs at the same small numbers of evaluations of the model, each with its own sampler and grid and
without guidance. Writes a table, a plot of quality against evaluations, and a contact sheet.

python -m experiments.compare --runs=runs/digits,runs/digits_flow --nfe=1,2,4,8,50 [--docs=docs/few_step.md]

All runs are measured with the metrics of the first run's config. The folder --out receives `compare.csv`, `compare.png`
and `compare_samples.png`. With --docs, the table is also inserted into that file, between its lines `<!-- table -->`
and `<!-- end of table -->`, and the pictures are written next to it: few_step.png and few_step_samples.png for
few_step.md.
"""

from absl import flags

from diffusion.pipelines.comparison import compare
from diffusion.pipelines.generator import check_numbers
from experiments import cli

RUNS = cli.define_paths("runs", "Workdirs of the runs; their data must have the same spec.")
NFE = flags.DEFINE_list("nfe", ["1", "2", "4", "8", "50"], "Evaluations of the model per sample.")
OUT = cli.define_path("out", "runs/compare", "Folder for the table and the pictures.")
DOCS = cli.define_path("docs", None, "A Markdown file that the table is also inserted into.")
NUM = flags.DEFINE_integer("num", 1000, "Samples per measurement.")
SEED = flags.DEFINE_integer("seed", 1, "Seed of the noise, which is the same for every run.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 250, "Samples per batch; the samples do not depend on it.")
EMA = flags.DEFINE_string(
    "ema", None, "The average of the parameters, or none for the raw ones. Default: each config's last."
)
flags.mark_flags_as_required(["runs"])


def main() -> None:
    check_numbers("--", seed=SEED.value, num=NUM.value, batch_size=BATCH_SIZE.value)
    compare(RUNS.value, NFE.value, out=OUT.value, docs=DOCS.value, num=NUM.value, seed=SEED.value,
            batch_size=BATCH_SIZE.value, ema=EMA.value)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
