"""Makes the data sets that a config reads.

python -m experiments.prepare_data --config=configs/mnist.py [--data_dir=data]
python -m experiments.prepare_data --config=configs/shapes.py --out=data/shapes [--num=10000]

Sets of TensorFlow Datasets, those of `data` and `eval.data`, are downloaded and written as ArrayRecord files; one that
is there as TFRecord is converted. This takes TensorFlow (requirements-tf.txt), and reading them does not. A builder of
your own is found if the config imports its module. Jobs read another --data_dir with --config.data.data_dir.

With --out, the examples of `data`, whatever its source, are written as a set of our own (`array_record`), in the shape
that training gets them in and without what is random in them.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from diffusion.core.build import build, check, find
from diffusion.core.progress import Progress
from diffusion.core.types import InputError
from diffusion.data.pipeline import in_order
from diffusion.data.sources import array_record
from diffusion.data.sources.tfds import builder_of
from diffusion.pipelines.build_training import training
from diffusion.pipelines.config import check_sections
from experiments import cli

CONFIG = cli.define_config()
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of all TFDS sets. Default: the config's, or tfds' own.")
OUT = flags.DEFINE_string("out", None, "New folder to write the examples of `data` to, as a set of our own.")
NUM = flags.DEFINE_integer("num", None, "With --out, how many examples. Default: all.")
flags.mark_flags_as_required(["config"])

ARRAY_RECORD = "array_record"
ENDLESS = 2**31 - 1  # examples of a set that is drawn as it is needed


def main() -> None:
    config = CONFIG.value.to_dict()
    check_sections(config)
    if OUT.value is not None:
        return write_records(config, OUT.value)
    sections = {"data": config["data"], "eval.data": config["eval"].get("data", {})}
    wanted = {field: section for field, section in sections.items() if section.get("name") == "tfds"}
    if not wanted:
        raise InputError("data.name", f"is {config['data'].get('name')!r}, and it is sets of tfds that are downloaded; "
                         "--out=FOLDER writes any as a set of our own")  # fmt: skip
    done = set()
    for field, section in wanted.items():
        check(find("data", "tfds", field=field), {key: section[key] for key in section if key != "name"}, field=field)
        data_dir = DATA_DIR.value or section.get("data_dir")
        if (section["dataset"], data_dir) not in done:
            try:
                prepare_tfds(section, data_dir)
            except InputError as error:
                raise error.within(field) from None
            done.add((section["dataset"], data_dir))


def write_records(config: Mapping[str, Any], out: str) -> None:
    """Writes the examples of a config's `data` as a set of our own, and says what there is."""
    source, workers = build("data", config["data"], field="data"), training(config)["options"].workers
    num = len(source) if NUM.value is None else NUM.value
    if not 1 <= num <= len(source) or (num == ENDLESS and NUM.value is None):
        raise InputError("--num", f"must be from 1 to {len(source):,}, the examples that there are; got {NUM.value}")
    progress = Progress("write", num)

    def examples() -> Iterator[Mapping[str, Any]]:
        for done, example in enumerate(in_order(source, num, workers=workers), 1):
            yield example
            progress.update(done)

    try:
        count = array_record.write(source, examples(), out)
    finally:
        progress.close()
    skipped = f", {num - count:,} left out" if count < num else ""
    print(f"{out}: {count:,} examples{skipped}; train on data = {{'name': 'array_record', 'path': {out!r}}}")


def prepare_tfds(section: Mapping[str, Any], data_dir: str | None) -> None:
    """Sees to it that a folder has the set of a `data` section as ArrayRecord, and says what there is."""
    dataset, data_dir = section["dataset"], os.path.expanduser(data_dir) if data_dir else None
    builder = builder_of(dataset, data_dir)
    prepared = builder.is_prepared()
    if prepared and ARRAY_RECORD in _formats(builder):
        print(f"{builder.data_dir} is prepared already: {_splits(builder)}")
        return
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError("dataset", "preparing it takes TensorFlow; pip install -r requirements-tf.txt")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        if prepared:
            _convert(builder)
        else:
            _download(builder)
    except Exception as error:
        if flags.FLAGS.debug:
            raise
        raise InputError("dataset", f"{dataset} cannot be prepared: {type(error).__name__}: {error}") from error
    made = builder_of(dataset, data_dir)
    print(f"{made.data_dir}: {_splits(made)}")


def _download(builder: Any) -> None:
    """tfds writes beside the set's folder and renames it at the end."""
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(try_download_gcs=False)  # there it has TFRecord alone
    builder.download_and_prepare(download_config=config, file_format=ARRAY_RECORD)


def _convert(builder: Any) -> None:
    """Adds ArrayRecord files to a prepared set. It is `dataset_info.json`, replaced at the end, that tells of them."""
    from tensorflow_datasets.core import dataset_info, file_adapters

    folder, info = builder.data_dir, builder.info
    reader = file_adapters.ADAPTER_FOR_FORMAT[info.file_format]
    writer = file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat.ARRAY_RECORD]
    progress = Progress(f"converting {info.full_name}", sum(split.num_examples for split in info.splits.values()))
    partial, done = os.path.join(folder, "incomplete.array_record"), 0
    shutil.rmtree(partial, ignore_errors=True)  # of a job that was killed
    os.mkdir(partial)
    try:
        for split in info.splits.values():
            theirs = split.filename_template
            ours = theirs.replace(data_dir=partial, filetype_suffix=ARRAY_RECORD)
            for shard, length in enumerate(split.shard_lengths):
                place = {"shard_index": shard, "num_shards": split.num_shards}
                source, target = theirs.sharded_filepath(**place), ours.sharded_filepath(**place)
                writer.write_examples(target, enumerate(reader.make_tf_data(source).as_numpy_iterator()))
                count = writer.num_examples(target)
                if count != length:
                    raise ValueError(f"{source} has {count:,} examples of {length:,}")
                done += length
                progress.update(done)
        proto = dataset_info.read_proto_from_builder_dir(folder)
        proto.alternative_file_formats.append(ARRAY_RECORD)
        dataset_info.write_dataset_info_proto(proto, partial)
        for name in sorted(os.listdir(partial), key=lambda name: name == "dataset_info.json"):
            os.replace(os.path.join(partial, name), os.path.join(folder, name))
    finally:
        progress.close()
        shutil.rmtree(partial, ignore_errors=True)


def _formats(builder: Any) -> set[str]:
    return {one.value for one in builder.info.available_file_formats()}


def _splits(builder: Any) -> str:
    return ", ".join(f"{name} {split.num_examples:,}" for name, split in builder.info.splits.items())


if __name__ == "__main__":
    cli.run(main)
