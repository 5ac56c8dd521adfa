"""Prepares the data sets that a config reads.

python -m experiments.prepare_data --config=configs/mnist.py [--data_dir=data]
python -m experiments.prepare_data --config=configs/shapes.py --out=data/shapes [--num=10000]

Without --out, the TensorFlow Datasets of the sections `data` and `eval.data` are downloaded and written as ArrayRecord
files; a data set that is prepared as TFRecord is converted. This requires TensorFlow (requirements-tf.txt), but reading
the files does not. A custom builder is found if the config imports its module. Pass --config.data.data_dir to jobs that
read the data from another --data_dir.

With --out, the examples of `data`, from any source, are written as an `array_record` data set, in the shape that
training receives and without random augmentation.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from diffusion.core.build import build, check, find
from diffusion.core.progress import Progress
from diffusion.core.types import InputError
from diffusion.data import records
from diffusion.data.pipeline import in_order
from diffusion.data.sources.tfds import builder_of
from diffusion.pipelines import tfds_preparation
from diffusion.pipelines.build_training import training
from diffusion.pipelines.config import check_config
from experiments import cli

CONFIG = cli.define_config()
DATA_DIR = cli.define_path(
    "data_dir", None, "Folder of all TensorFlow Datasets. Default: the config's, or the default of tfds."
)
OUT = cli.define_path("out", None, "New folder to write the examples of `data` to, as an array_record data set.")
NUM = flags.DEFINE_integer("num", None, "With --out, the number of examples. Default: all.")
flags.mark_flags_as_required(["config"])

ENDLESS = 2**31 - 1  # length of a source that generates its examples


def main() -> None:
    config = CONFIG.value
    check_config(config)
    if OUT.value is not None:
        return write_records(config, OUT.value)
    sections = {"data": config["data"], "eval.data": config["eval"]["data"]}
    requested = {field: section for field, section in sections.items() if section.get("name") == "tfds"}
    if not requested:
        raise InputError("data.name", f"must be 'tfds' to be downloaded, got {config['data'].get('name')!r}; "
                         "--out=FOLDER writes the examples of any source as a new data set")  # fmt: skip
    done = set()
    for field, section in requested.items():
        check(find("data", "tfds", field=field), {key: section[key] for key in section if key != "name"}, field=field)
        data_dir = DATA_DIR.value or section.get("data_dir")
        if (section["dataset"], data_dir) not in done:
            try:
                prepare_tfds(section["dataset"], data_dir)
            except InputError as error:
                raise error.within(field) from None
            done.add((section["dataset"], data_dir))


def write_records(config: Mapping[str, Any], out: str) -> None:
    """Writes the examples of a config's `data` as a new data set, and prints how many."""
    source, workers = build("data", config["data"], field="data"), training(config)["options"].workers
    num = len(source) if NUM.value is None else NUM.value
    if not 1 <= num <= len(source) or (num == ENDLESS and NUM.value is None):
        raise InputError("--num", f"must be from 1 to {len(source):,}, the number of examples; got {NUM.value}")
    progress = Progress("write", num)

    def examples() -> Iterator[Mapping[str, Any]]:
        for done, example in enumerate(in_order(source, num, workers=workers), 1):
            yield example
            progress.update(done)

    try:
        count = records.write(source, examples(), out, num)
    finally:
        progress.close()
    skipped = f", {num - count:,} left out" if count < num else ""
    print(f"{out}: {count:,} examples{skipped}; train on data = {{'name': 'array_record', 'path': {out!r}}}")


def prepare_tfds(dataset: str, data_dir: str | None) -> None:
    """Prepares a data set unless it is prepared already, and prints its splits."""
    data_dir = os.path.expanduser(data_dir) if data_dir else None
    builder = builder_of(dataset, data_dir)
    if tfds_preparation.is_prepared(builder):
        print(f"{builder.data_dir} is prepared already: {tfds_preparation.splits(builder)}")
        return
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError("dataset", "preparing it requires TensorFlow: pip install -r requirements-tf.txt")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        tfds_preparation.prepare(builder)
    except Exception as error:  # tfds raises the errors of downloads, files and the builder's own code
        if flags.FLAGS.debug:
            raise
        raise InputError("dataset", f"{dataset} cannot be prepared: {type(error).__name__}: {error}") from error
    prepared = builder_of(dataset, data_dir)
    print(f"{prepared.data_dir}: {tfds_preparation.splits(prepared)}")


if __name__ == "__main__":
    cli.run(main)
