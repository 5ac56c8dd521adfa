"""TensorFlow Datasets: a small data set, prepared and read without TensorFlow, and mocks of well-known data sets."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import cloudpickle
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffusion.core.build import build
from diffusion.data.pipeline import Batches
from diffusion.pipelines.config import read_config, resolve
from diffusion.pipelines.run import open_run
from tests.data import tfds_sets
from tests.experiments.test_teachers import train
from tests.jobs import ROOT
from tests.refusals import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of `tiny_things`, prepared as ArrayRecord."""
    path = str(tmp_path_factory.mktemp("tfds"))
    tfds_sets.prepare(path)
    return path


def tiny(folder, **keywords):
    return build("data", {"name": "tfds", "dataset": "tiny_things", "data_dir": folder, **keywords})


def test_examples_are_those_of_the_builder(folder):
    source = tiny(folder, captions=True, caption="caption")
    assert source.spec.shape == (6, 4, 3) and source.spec.num_classes == 3 and source.spec.captions
    assert (source.spec.x.low, source.spec.x.high) == (0, 255) and source.spec.class_names == tfds_sets.NAMES
    expected, labels = tfds_sets.expected("train"), {}
    assert len(source) == len(expected) == 14
    for example in (source[index] for index in range(14)):
        np.testing.assert_array_equal(example["x"], expected.pop(example["caption"]))
        assert example["x"].dtype == source.spec.x.dtype == "uint8" and example["cond"]["label"].dtype == np.int32
        labels[int(example["caption"].split()[2])] = int(example["cond"]["label"])
    assert not expected and labels == {index: index % 3 for index in range(14)}


def test_labels_and_captions_are_optional(folder):
    example = tiny(folder, labels=False)[0]
    assert example.keys() == {"x", "cond"} and not example["cond"]
    assert tiny(folder, labels=False).spec.num_classes == 0 and tiny(folder, labels=False).spec.class_names == ()


def test_features_by_name(folder):
    source = tiny(folder, image="wild", size=4, channels=1, label="attributes/Big", captions=True, caption="texts/text")
    assert source.spec.shape == (4, 4, 1) and source.spec.class_names == ("not Big", "Big")
    for example in (source[index] for index in range(14)):
        word, number = example["caption"].split()
        assert word == "one" and example["cond"]["label"] == int(number) % 2
        np.testing.assert_array_equal(example["x"], 0)
    drawn = {source.draw(3, np.random.default_rng(seed))["caption"].split()[0] for seed in range(20)}
    assert drawn == {"one", "two"}


def test_splits(folder):
    assert len(tiny(folder, split="test")) == 6 and len(tiny(folder, split="train+test")) == 20
    assert len(tiny(folder, split="train[:50%]")) == 7 and len(tiny(folder, split="all")) == 20
    assert tiny(folder, dataset="tiny_things:1.2.0", split="train[13:]")[0]["x"].shape == (6, 4, 3)


def test_draws_are_random_and_indexing_is_not(folder):
    source = tiny(folder, flip=True)
    plain = source[2]["x"]
    np.testing.assert_array_equal(plain, tiny(folder)[2]["x"])
    drawn = [source.draw(2, np.random.default_rng(seed))["x"] for seed in range(40)]
    mirrored = [np.array_equal(x, plain[:, ::-1]) for x in drawn]
    assert 8 < sum(mirrored) < 32
    assert all(np.array_equal(x, plain) for x, flipped in zip(drawn, mirrored, strict=True) if not flipped)
    cropped = tiny(folder, size=3, crop="random")
    assert len({cropped.draw(2, np.random.default_rng(seed))["x"].tobytes() for seed in range(20)}) > 5
    np.testing.assert_array_equal(cropped[2]["x"], tiny(folder, size=3)[2]["x"])


def test_index_out_of_range(folder):
    source = tiny(folder)
    for index in (-1, 14):
        with pytest.raises(IndexError):
            source[index]
        with pytest.raises(IndexError):
            source.draw(index, np.random.default_rng(0))


def test_stages_compose_to_an_example(folder):
    source = tiny(folder, captions=True, caption="caption", size=3)
    value = 5
    for _, stage in source.stages:
        value = stage(value)
    jax.tree.map(np.testing.assert_array_equal, value, source[5])


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_pickling(folder, module):
    source = tiny(folder)
    source[0]  # opens its files
    again = module.loads(module.dumps(source))
    np.testing.assert_array_equal(again[3]["x"], source[3]["x"])
    assert again.spec == source.spec and len(module.dumps(source)) < 10_000


def test_data_workers_read_the_same(folder):
    def first(workers):
        stream = Batches(tiny(folder, flip=True), batch_size=4, seed=1, workers=workers)
        batches = [next(stream) for _ in range(5)]
        stream.close()
        return batches

    jax.tree.map(np.testing.assert_array_equal, first(0), first(1))


READER = """
import sys
import numpy as np
from diffusion.core.build import build
source = build("data", {"name": "tfds", "dataset": "tiny_things", "data_dir": sys.argv[1], "captions": True,
                        "caption": "caption"})
examples = [source[index] for index in range(len(source))]
np.savez(sys.argv[2], **{example["caption"]: example["x"] for example in examples})
assert "tests.data.tfds_sets" not in sys.modules
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
"""


def read_elsewhere(folder, out):
    """Returns `{caption: raw image}` as read by a process that imports neither TensorFlow nor the builder."""
    done = subprocess.run([sys.executable, "-c", READER, folder, out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


def test_reading_needs_neither_tensorflow_nor_the_builder(folder, tmp_path):
    found = read_elsewhere(folder, str(tmp_path / "read.npz"))
    jax.tree.map(np.testing.assert_array_equal, found, tfds_sets.expected("train"))


MOCKED = {
    "mnist": ({}, (28, 28, 1), 10, "0"),
    "cifar10": ({"split": "test"}, (32, 32, 3), 10, "airplane"),
    "celeb_a": ({"size": (48, 40), "label": "attributes/Male"}, (48, 40, 3), 2, "not Male"),
    "imagenet_resized/64x64": ({"split": "validation"}, (64, 64, 3), 1000, "n02119789"),
}


def mocked(dataset, **keywords):
    """Returns a mocked data set as a source and as TFDS reads it."""
    with tfds.testing.mock_data(num_examples=5):
        return build("data", {"name": "tfds", "dataset": dataset, **keywords}), tfds.data_source(dataset, split="train")


@pytest.mark.parametrize("dataset", MOCKED)
def test_known_data_sets(dataset):
    keywords, shape, num_classes, first_name = MOCKED[dataset]
    source, theirs = mocked(dataset, **keywords)
    assert source.spec.shape == shape and source.spec.num_classes == num_classes == len(source.spec.class_names)
    if dataset != "cifar10":  # its class names are stored in its files
        assert source.spec.class_names[0] == first_name
    assert len(source) == 5
    for index in range(2):
        label = theirs[index]["attributes"]["Male"] if dataset == "celeb_a" else theirs[index]["label"]
        assert source[index]["x"].shape == shape and source[index]["cond"]["label"] == label
        if "size" not in keywords:
            np.testing.assert_array_equal(source[index]["x"], theirs[index]["image"])


def test_the_supervised_target_comes_first():
    """CIFAR-100 has two class features; `label` is its supervised target."""
    source, _ = mocked("cifar100")
    assert source.spec.num_classes == 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "cifar10_ddpm"])
def test_configs_train(name, tmp_path):
    """Traces the config's network and trains a small one for ten steps. MNIST has levels of 28, 14 and 7 pixels."""
    config = read_config(str(ROOT / "configs" / f"{name}.py"))
    shape, num_classes = ((28, 28, 1), 10) if name == "mnist" else ((32, 32, 3), 0)
    network = build("networks", config["network"], shape=shape, num_classes=num_classes)
    params = jax.eval_shape(network.init, jax.random.key(0))
    cond = {"label": jax.ShapeDtypeStruct((2,), np.int32)} if num_classes else {}
    x, c_noise = jax.ShapeDtypeStruct((2, *shape), np.float32), jax.ShapeDtypeStruct((2,), np.float32)
    assert jax.eval_shape(network.apply, params, x, c_noise, cond).shape == (2, *shape)

    config["network"] = {"name": "mlp", "width": 8, "depth": 1}
    config["train"] |= {"steps": 10, "batch_size": 8, "log_every": 1, "preview_every": 0}
    config["optimizer"]["warmup"] = 1
    with tfds.testing.mock_data(num_examples=20):
        train(resolve(config), tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 11))
    assert all(np.isfinite(line["loss"]) for line in metrics)
    spec = open_run(str(tmp_path / "run")).spec
    assert (spec.shape, spec.num_classes) == (shape, num_classes)


REFUSED = {
    "unknown data set": ({"dataset": "mnistt"}, "dataset", "mnist"),
    "over the network": ({"dataset": "huggingface:mnist"}, "dataset", ""),
    "unknown config": ({"dataset": "imagenet_resized/65x65"}, "dataset", "64x64"),
    "unknown version": ({"dataset": "mnist:9.0.0"}, "dataset", "3.0.1"),
    "not prepared": ({"dataset": "mnist"}, "dataset", "experiments.prepare_data --config=... --data_dir=/"),
    "unknown split": ({"split": "trian"}, "split", "train, test"),
    "bad split": ({"split": "train[50%"}, "split", ""),
    "empty split": ({"split": "train[:0]"}, "split", ""),
    "no such image": ({"image": "picture"}, "image", "image, wild;"),
    "no image": ({"image": "label"}, "image", "image, wild;"),
    "no label": ({"label": "filename"}, "label", "attributes/Big, label;"),
    "no caption": ({"captions": True, "caption": "label"}, "caption", "caption, filename, texts/text;"),
    "which caption": ({"captions": True}, "caption", "caption, filename, texts/text"),
    "label without labels": ({"label": "label", "labels": False}, "label", ""),
    "caption without captions": ({"caption": "caption"}, "caption", ""),
    "several sizes": ({"image": "wild"}, "size", ""),
    "size 0": ({"size": 0}, "size", ""),
    "crop without size": ({"crop": "random"}, "crop", ""),
    "bad channels": ({"channels": 2}, "channels", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options(folder, name):
    keywords, field, choices = REFUSED[name]
    with refused(f"data.{field}") as caught:
        tiny(folder, **keywords)
    assert choices in caught.value.problem


def changed(folder, to, change):
    shutil.copytree(folder, to)
    change(os.path.join(to, "tiny_things/1.2.0"))
    return str(to)


def as_tfrecord(path):
    """Edits the info of a data set to state that it is stored as TFRecord."""
    with open(f"{path}/dataset_info.json", encoding="utf-8") as file:
        info = json.load(file)
    with open(f"{path}/dataset_info.json", "w", encoding="utf-8") as file:
        json.dump({**info, "fileFormat": "tfrecord"}, file)


def cut(path):
    os.truncate(f"{path}/tiny_things-train.array_record-00000-of-00001", 100)


def lose(path):
    os.remove(f"{path}/tiny_things-train.array_record-00000-of-00001")


@pytest.mark.parametrize("change", [as_tfrecord, cut, lose])
def test_bad_data_sets(folder, tmp_path, change):
    with refused("data.dataset") as caught:
        tiny(changed(folder, tmp_path / "changed", change))
    assert ("experiments.prepare_data" in caught.value.problem) == (change is as_tfrecord)


def test_an_unreadable_example_is_reported_by_index(folder, tmp_path):
    path = changed(folder, tmp_path / "changed", lambda path: None)
    source = pickle.loads(pickle.dumps(tiny(path)))
    cut(f"{path}/tiny_things/1.2.0")
    with refused("data") as caught:
        source[3]
    assert "example 3 of tiny_things, train" in caught.value.problem


def test_a_missing_label_is_reported(folder):
    """TFDS stores -1 in test sets without labels."""
    source = tiny(folder)
    example = {**source.features.deserialize_example_np(source.records[0], decoders=source.decoders), "label": -1}
    source.records = [example]
    with refused("data") as caught:
        source[0]
    assert "example 0" in caught.value.problem and "labels=False" in caught.value.problem
