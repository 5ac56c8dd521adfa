"""Sets of TensorFlow Datasets: one of the tests' own, prepared for real and read without TensorFlow, and mocks of some
that all know."""

import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys

import cloudpickle
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffusion.core.build import build
from diffusion.core.types import InputError
from diffusion.data.pipeline import Batches
from diffusion.pipelines.run import open_run
from tests.data import tfds_sets
from tests.experiments.test_teachers import train
from tests.jobs import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The set, prepared as ArrayRecord."""
    path = str(tmp_path_factory.mktemp("tfds"))
    tfds_sets.prepare(path)
    return path


def of(folder, **keywords):
    return build("data", {"name": "tfds", "dataset": "tiny_things", "data_dir": folder, **keywords})


def raw(x):
    return np.round((x + 1) * 127.5).astype(np.uint8)


def test_gives_what_was_put_in(folder):
    source = of(folder, captions=True, caption="caption")
    assert source.spec.shape == (6, 4, 3) and source.spec.num_classes == 3 and source.spec.captions
    assert (source.spec.low, source.spec.high) == (0, 255) and source.class_names == tfds_sets.NAMES
    expected, labels = tfds_sets.expected("train"), {}
    assert len(source) == len(expected) == 14
    for example in (source[index] for index in range(14)):
        np.testing.assert_array_equal(raw(example["x"]), expected.pop(example["caption"]))
        assert example["x"].dtype == np.float32 and example["cond"]["label"].dtype == np.int32
        labels[int(example["caption"].split()[2])] = int(example["cond"]["label"])
    assert not expected and labels == {index: index % 3 for index in range(14)}


def test_what_is_not_asked_for_is_not_there(folder):
    example = of(folder, labels=False)[0]
    assert example.keys() == {"x", "cond"} and not example["cond"]
    assert of(folder, labels=False).spec.num_classes == 0 and of(folder, labels=False).class_names == ()


def test_features_by_name(folder):
    source = of(folder, image="wild", size=4, channels=1, label="attributes/Big", captions=True, caption="texts/text")
    assert source.spec.shape == (4, 4, 1) and source.class_names == ("not Big", "Big")
    for example in (source[index] for index in range(14)):
        word, number = example["caption"].split()
        assert word == "one" and example["cond"]["label"] == int(number) % 2
        np.testing.assert_array_equal(example["x"], -1)
    drawn = {source.draw(3, np.random.default_rng(seed))["caption"].split()[0] for seed in range(20)}
    assert drawn == {"one", "two"}


def test_splits(folder):
    assert len(of(folder, split="test")) == 6 and len(of(folder, split="train+test")) == 20
    assert len(of(folder, split="train[:50%]")) == 7 and len(of(folder, split="all")) == 20
    assert of(folder, dataset="tiny_things:1.2.0", split="train[13:]")[0]["x"].shape == (6, 4, 3)


def test_draws_are_random_and_indexing_is_not(folder):
    source = of(folder, flip=True)
    plain = source[2]["x"]
    np.testing.assert_array_equal(plain, of(folder)[2]["x"])
    drawn = [source.draw(2, np.random.default_rng(seed))["x"] for seed in range(40)]
    mirrored = [np.array_equal(x, plain[:, ::-1]) for x in drawn]
    assert 8 < sum(mirrored) < 32
    assert all(np.array_equal(x, plain) for x, turned in zip(drawn, mirrored, strict=True) if not turned)
    cropped = of(folder, size=3, crop="random")
    assert len({cropped.draw(2, np.random.default_rng(seed))["x"].tobytes() for seed in range(20)}) > 5
    np.testing.assert_array_equal(cropped[2]["x"], of(folder, size=3)[2]["x"])


def test_indices_end(folder):
    source = of(folder)
    for index in (-1, 14):
        with pytest.raises(IndexError):
            source[index]
        with pytest.raises(IndexError):
            source.draw(index, np.random.default_rng(0))


def test_stages_make_an_example(folder):
    source = of(folder, captions=True, caption="caption", size=3)
    value = 5
    for _, stage in source.stages:
        value = stage(value)
    jax.tree.map(np.testing.assert_array_equal, value, source[5])


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_pickles(folder, module):
    source = of(folder)
    source[0]  # with its files open
    again = module.loads(module.dumps(source))
    np.testing.assert_array_equal(again[3]["x"], source[3]["x"])
    assert again.spec == source.spec and len(module.dumps(source)) < 10_000


def test_data_workers_read_the_same(folder):
    def first(workers):
        stream = Batches(of(folder, flip=True), batch_size=4, seed=1, workers=workers)
        batches = [next(stream) for _ in range(5)]
        stream.close()
        return batches

    jax.tree.map(np.testing.assert_array_equal, first(0), first(1))


READER = """
import sys
import numpy as np
from diffusion.build import build
source = build("data", {"name": "tfds", "dataset": "tiny_things", "data_dir": sys.argv[1], "captions": True,
                        "caption": "caption"})
examples = [source[index] for index in range(len(source))]
np.savez(sys.argv[2], **{example["caption"]: example["x"] for example in examples})
assert "tests.data.tfds_sets" not in sys.modules
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
"""


def read_elsewhere(folder, out):
    """The set, `{caption: raw image}`, as a process sees it that has neither TensorFlow nor the builder."""
    done = subprocess.run([sys.executable, "-c", READER, folder, out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {caption: raw(x) for caption, x in np.load(out).items()}


def test_reading_takes_neither_tensorflow_nor_the_builder(folder, tmp_path):
    found = read_elsewhere(folder, str(tmp_path / "read.npz"))
    jax.tree.map(np.testing.assert_array_equal, found, tfds_sets.expected("train"))


MOCKED = {
    "mnist": ({}, (28, 28, 1), 10, "0"),
    "cifar10": ({"split": "test"}, (32, 32, 3), 10, "airplane"),
    "celeb_a": ({"size": (48, 40), "label": "attributes/Male"}, (48, 40, 3), 2, "not Male"),
    "imagenet_resized/64x64": ({"split": "validation"}, (64, 64, 3), 1000, "n02119789"),
}


def mocked(dataset, **keywords):
    """A mocked set and the same of tfds itself."""
    with tfds.testing.mock_data(num_examples=5):
        return build("data", {"name": "tfds", "dataset": dataset, **keywords}), tfds.data_source(dataset, split="train")


@pytest.mark.parametrize("dataset", MOCKED)
def test_known_sets(dataset):
    keywords, shape, num_classes, first_name = MOCKED[dataset]
    source, theirs = mocked(dataset, **keywords)
    assert source.spec.shape == shape and source.spec.num_classes == num_classes == len(source.class_names)
    if dataset != "cifar10":  # its names come with the files
        assert source.class_names[0] == first_name
    assert len(source) == 5
    for index in range(2):
        label = theirs[index]["attributes"]["Male"] if dataset == "celeb_a" else theirs[index]["label"]
        assert source[index]["x"].shape == shape and source[index]["cond"]["label"] == label
        if "size" not in keywords:
            np.testing.assert_array_equal(raw(source[index]["x"]), theirs[index]["image"])


def test_a_main_feature_comes_first():
    """CIFAR-100 has two classes; its `label` is the one that it calls its target."""
    source, _ = mocked("cifar100")
    assert source.spec.num_classes == 100


@pytest.mark.parametrize("name", ["mnist", "cifar10_ddpm"])
def test_configs_train(name, tmp_path):
    """Ten steps of a small network; the config's own is traced, MNIST's with its levels of 28, 14 and 7 pixels."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]().to_dict()
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
        train(config, tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 11))
    assert all(np.isfinite(line["loss"]) for line in metrics)
    spec = open_run(str(tmp_path / "run")).spec
    assert (spec.shape, spec.num_classes) == (shape, num_classes)


REFUSED = {
    "unknown set": ({"dataset": "mnistt"}, "dataset: there is no mnistt in .*, and tfds knows no 'mnistt', but mnist"),
    "from the network": ({"dataset": "huggingface:mnist"}, "dataset: 'huggingface:mnist' is no name such as mnist"),
    "unknown config": ({"dataset": "imagenet_resized/65x65"}, "dataset: .*no '65x65'; one of: 8x8, .*64x64"),
    "unknown version": ({"dataset": "mnist:9.0.0"}, "dataset: mnist:9.0.0 cannot be opened: .*only: 3.0.1"),
    "not prepared": (
        {"dataset": "mnist"},
        "dataset: there is no .*/mnist/3.0.1; prepare it: python -m experiments.prepare_data --config=... --data_dir=/",
    ),
    "unknown split": (
        {"split": "trian"},
        "split: 'trian' has no examples in tiny_things; one of: train, test, or",
    ),
    "bad split": ({"split": "train[50%"}, "split: 'train.50%' has no examples"),
    "empty split": ({"split": "train[:0]"}, "split: 'train.:0.' has no examples"),
    "no such image": ({"image": "picture"}, "image: tiny_things has no image 'picture'; one of: image, wild$"),
    "no image": ({"image": "label"}, "image: tiny_things has no image 'label'; one of: image, wild$"),
    "no label": ({"label": "filename"}, "label: .* no label 'filename'; one of: attributes/Big, label$"),
    "no caption": ({"captions": True, "caption": "label"}, "caption: .*; one of: caption, filename, texts/text$"),
    "which caption": ({"captions": True}, "caption: tiny_things has several texts; name one: caption, filename, texts"),
    "label unwanted": ({"label": "label", "labels": False}, "label: is 'label', but labels = False"),
    "caption unwanted": ({"caption": "caption"}, "caption: is 'caption'; set captions = True"),
    "many sizes": ({"image": "wild"}, "size: tiny_things has images of many sizes; give one"),
    "no size": ({"size": 0}, "size: must be at least 1"),
    "crop of nothing": ({"crop": "random"}, "crop: is of images scaled to a size; give one"),
    "bad channels": ({"channels": 2}, "channels: .*got 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(folder, name):
    keywords, message = REFUSED[name]
    with pytest.raises(InputError, match=f"^data.{message}"):
        of(folder, **keywords)


def changed(folder, to, change):
    shutil.copytree(folder, to)
    change(os.path.join(to, "tiny_things/1.2.0"))
    return str(to)


def as_tfrecord(path):
    """What tells that a set is there as TFRecord alone."""
    with open(f"{path}/dataset_info.json", encoding="utf-8") as file:
        info = json.load(file)
    with open(f"{path}/dataset_info.json", "w", encoding="utf-8") as file:
        json.dump({**info, "fileFormat": "tfrecord"}, file)


def cut(path):
    os.truncate(f"{path}/tiny_things-train.array_record-00000-of-00001", 100)


def lose(path):
    os.remove(f"{path}/tiny_things-train.array_record-00000-of-00001")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            as_tfrecord,
            "has tfrecord alone, and array_record is read; convert it: python -m experiments.prepare_data ",
        ),
        (cut, "/tiny_things/1.2.0 cannot be read: .*; remove it and prepare it anew"),
        (lose, "/tiny_things/1.2.0 cannot be read: .*; remove it and prepare it anew"),
    ],
)
def test_damaged_sets(folder, tmp_path, change, message):
    with pytest.raises(InputError, match=f"^data.dataset: .*{message}"):
        of(changed(folder, tmp_path / "changed", change))


def test_what_cannot_be_read_later_is_told_by_its_number(folder, tmp_path):
    path = changed(folder, tmp_path / "changed", lambda path: None)
    source = pickle.loads(pickle.dumps(of(path)))
    cut(f"{path}/tiny_things/1.2.0")
    with pytest.raises(InputError, match=r"^data: example 3 of tiny_things, train cannot be read"):
        source[3]


def test_a_hidden_label_is_told(folder):
    """As tfds marks test sets that keep their labels."""
    source = of(folder)
    example = {**source.features.deserialize_example_np(source.records[0], decoders=source.decoders), "label": -1}
    source.records = [example]
    with pytest.raises(InputError, match=r"^data: example 0 .* has the label -1, not one of 3; set labels=False"):
        source[0]
