"""Prepares TensorFlow Datasets as ArrayRecord files, which are read without TensorFlow; preparing them requires it."""

import os
import shutil
from typing import Any

from diffusion.core.progress import Progress

ARRAY_RECORD = "array_record"


def is_prepared(builder: Any) -> bool:
    """Returns whether the folder of a `tfds.core.DatasetBuilder` has the data set as ArrayRecord."""
    return builder.is_prepared() and ARRAY_RECORD in {kind.value for kind in builder.info.available_file_formats()}


def splits(builder: Any) -> str:
    """Returns the names and sizes of a data set's splits: `train 60,000, test 10,000`."""
    return ", ".join(f"{name} {split.num_examples:,}" for name, split in builder.info.splits.items())


def prepare(builder: Any) -> None:
    """Downloads a data set as ArrayRecord, or converts the files of another format that its folder has.

    A killed preparation leaves nothing that is read as a data set, and may be repeated.
    """
    if builder.is_prepared():
        _convert(builder)
    else:
        _download(builder)


def _download(builder: Any) -> None:
    import tensorflow_datasets as tfds

    # The prepared data sets on Google Cloud Storage are TFRecord only.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config, file_format=ARRAY_RECORD)


def _convert(builder: Any) -> None:
    """Adds ArrayRecord files to a prepared data set.

    The files are written to a folder inside that of the data set and then moved. `dataset_info.json`, which declares
    them, is replaced last.
    """
    from tensorflow_datasets.core import dataset_info, file_adapters

    folder, info = builder.data_dir, builder.info
    reader = file_adapters.ADAPTER_FOR_FORMAT[info.file_format]
    writer = file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat.ARRAY_RECORD]
    progress = Progress(f"converting {info.full_name}", sum(split.num_examples for split in info.splits.values()))
    partial, done = os.path.join(folder, "incomplete.array_record"), 0
    shutil.rmtree(partial, ignore_errors=True)  # left behind by a job that was killed
    os.mkdir(partial)
    try:
        for split in info.splits.values():
            sources = split.filename_template
            targets = sources.replace(data_dir=partial, filetype_suffix=ARRAY_RECORD)
            for shard, length in enumerate(split.shard_lengths):
                place = {"shard_index": shard, "num_shards": split.num_shards}
                source, target = sources.sharded_filepath(**place), targets.sharded_filepath(**place)
                writer.write_examples(target, enumerate(reader.make_tf_data(source).as_numpy_iterator()))
                count = writer.num_examples(target)
                if count != length:
                    raise ValueError(f"{source} has {count:,} examples instead of {length:,}")
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
