"""Shows a config's data as training receives them: their spec, a histogram of the values, a sheet of examples with
their labels, and the examples per second of each stage.

python -m experiments.inspect_data --config=configs/digits.py [--out=data.png] [--num=48] [--all]
"""

import itertools
import os
import sys

import numpy as np
from absl import flags

from diffusion.core import files, images
from diffusion.core.build import build
from diffusion.core.types import InputError, Source
from diffusion.data.pipeline import Batches
from diffusion.distributed import sharding
from diffusion.pipelines import inspection
from diffusion.pipelines.build_training import training
from diffusion.pipelines.config import check_config
from diffusion.pipelines.generator import check_numbers
from diffusion.profiling.data_rates import batch_rates, example_rates
from experiments import cli

CONFIG = cli.define_config()
OUT = cli.define_path("out", "data.png", "The file for the sheet of examples.")
NUM = flags.DEFINE_integer("num", 48, "Examples on the sheet.")
ALL = flags.DEFINE_bool("all", False, "Read every example and list those that cannot be read.")
flags.mark_flags_as_required(["config"])

SECONDS = 2.0  # how long each rate is measured
LISTED = 10  # unreadable examples that are printed
MEASURED = 256  # examples in the statistics, at least


def main() -> None:
    check_numbers("--", seed=0, num=NUM.value)
    config = CONFIG.value
    check_config(config)
    keywords = training(config)
    options = keywords["options"]
    source = build("data", config["data"], field="data")
    files.make_folder(os.path.dirname(os.path.abspath(OUT.value)), "--out")

    print_line("data", f"{config['data']['name']}: {inspection.describe(source)}")
    print_line("epoch", f"{len(source) / options.batch_size:,.1f} steps of {options.batch_size} examples")
    for line in inspection.buckets(source, options.batch_size):
        print_line("bucket", line)
    if source.spec.class_names:
        print_line("classes", source.spec.classes())
    if ALL.value:
        read_all(source)
    reading = {"batch_size": options.batch_size, "seed": config["seed"], "workers": options.workers,
               "prefetch": options.prefetch}  # fmt: skip
    batches = Batches(source, **reading)
    examples = list(itertools.islice(inspection.examples_of(batches), max(NUM.value, MEASURED)))
    batches.close()
    values = np.concatenate([example["x"].ravel() for example in examples])
    print_line("values", inspection.histogram(values, encoding=sys.stdout.encoding))
    if source.spec.num_classes:
        counts = np.bincount([int(example["cond"]["label"]) for example in examples], minlength=source.spec.num_classes)
        print_line("labels", f"{np.count_nonzero(counts)} of {len(counts)} in {len(examples)} examples, "
                   f"{counts.min()} to {counts.max()} each")  # fmt: skip
    shown = examples[: NUM.value]
    captions = [inspection.caption_of(example, source.spec) for example in shown]
    images.save_png(images.captioned([example["x"] for example in shown], captions), OUT.value)
    for name, rate in example_rates(source, SECONDS).items():
        print_line("images/s", f"{rate:10,.0f}  {name}, one thread")
    for name, rate in batch_rates(source, reading, sharding.by_example(keywords["mesh"]), SECONDS):
        print_line("images/s", f"{rate:10,.0f}  {name}")
    print_line("sheet", OUT.value)


def read_all(source: Source) -> None:
    """Reads every example, and prints the first of those that cannot be read.

    Raises:
      InputError: There are such examples.
    """
    count = printed = 0
    for problem in inspection.unreadable_examples(source):
        count += 1
        if problem and printed < LISTED:
            print_line("bad", problem)
            printed += 1
    if count:
        raise InputError("data", f"{count:,} of {len(source):,} examples cannot be read")
    print_line("all", "every example can be read")


def print_line(name: str, text: str) -> None:
    print(f"{name:9}{text}")


if __name__ == "__main__":
    cli.run(main)
