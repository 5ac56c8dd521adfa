"""The job that prepares data sets, in separate processes. Tests that need TensorFlow are marked; the prepared data are
read without it."""

import importlib.util
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.core.build import build
from tests.data import tfds_sets
from tests.data.test_tfds import read_elsewhere
from tests.jobs import ROOT, job
from tests.refusals import refused, refused_field

CONFIG = """
{first}
import runpy

def get_config():
    config = runpy.run_path({digits!r})["get_config"]()
    config.data = {data!r}
    config.eval.data = {held_out!r}
    return config
"""
CUSTOM = "import tests.data.tfds_sets"  # defines the builder of tiny_things
KILLED_AT_AN_EXAMPLE = f"""{CUSTOM}, os
tests.data.tfds_sets._file = lambda image: os.kill(os.getpid(), 9)
"""
KILLED_AT_A_FILE = """import os
replace, left = os.replace, [{moved}]
def killed(a, b):
    if "incomplete." in os.fspath(a):
        if not left[0]:
            os.kill(os.getpid(), 9)
        left[0] -= 1
    replace(a, b)
os.replace = killed
"""
NO_TENSORFLOW = f"""{CUSTOM}, importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "tensorflow" else find_spec(name)
"""
PATH = "tiny_things/1.2.0"


def needs_tensorflow(test):
    absent = importlib.util.find_spec("tensorflow") is None
    return pytest.mark.peers(pytest.mark.skipif(absent, reason="TensorFlow is not installed")(test))


@pytest.fixture
def prepare(tmp_path):
    """Runs the job on a config whose `data` and `eval.data` are TensorFlow Datasets."""

    def run(*flags, data=None, held_out=None, first=CUSTOM):
        data = {"name": "tfds", "dataset": "tiny_things", **(data or {})}
        held_out = {"name": "tfds", "dataset": "tiny_things", "split": "test", **(held_out or {})}
        config = tmp_path / "config.py"
        digits = str(ROOT / "configs/digits.py")
        config.write_text(CONFIG.format(first=first, digits=digits, data=data, held_out=held_out))
        return job("prepare_data", f"--config={config}", *flags)

    return run


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A folder with the data set as ArrayRecord."""
    path = str(tmp_path_factory.mktemp("ready"))
    tfds_sets.prepare(path)
    return path


@pytest.fixture
def tfrecord(tmp_path):
    """A folder with the data set as TFRecord."""
    path = str(tmp_path / "sets")
    tfds_sets.prepare(path, "tfrecord")
    return path


def source_of(folder, split="train"):
    return build("data", {"name": "tfds", "dataset": "tiny_things", "split": split, "data_dir": str(folder)})


def assert_complete(folder, tmp_path):
    """Checks that every pixel is read correctly, in a process without TensorFlow."""
    found = read_elsewhere(str(folder), str(tmp_path / "read.npz"))
    jax.tree.map(np.testing.assert_array_equal, found, tfds_sets.expected("train"))
    assert len(source_of(folder, "test")) == 6


def last_line(done):
    """Returns the error of a job; the progress lines of tfds may precede it."""
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and line.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    return line


def test_without_tensorflow_the_error_says_what_to_install(prepare, tmp_path):
    done = prepare(f"--data_dir={tmp_path}/sets", first=NO_TENSORFLOW)
    assert refused_field(done) == "data.dataset" and "requirements-tf.txt" in done.stderr
    assert not (tmp_path / "sets").exists()


@pytest.mark.parametrize("by", ["flag", "config", "environment"])
def test_a_prepared_data_set_is_left_alone(prepare, ready, by, monkeypatch):
    def state():
        return sorted((path, os.stat(path).st_mtime_ns) for path, _, _ in os.walk(ready))

    before = state()
    if by == "environment":
        monkeypatch.setenv("TFDS_DATA_DIR", ready)
    where = {"data_dir": ready} if by == "config" else {}
    done = prepare(*([f"--data_dir={ready}"] if by == "flag" else []), data=where, held_out=where)
    assert (done.returncode, done.stdout) == (0, f"{ready}/{PATH} is prepared already: train 14, test 6\n"), done.stderr
    assert state() == before


def test_refusals(prepare, ready):
    here = f"--data_dir={ready}"
    assert refused_field(prepare(here, data={"dataset": "nothing"})) == "data.dataset"
    assert refused_field(prepare(here, held_out={"dataset": "mnistt"})) == "eval.data.dataset"
    assert refused_field(prepare(here, data={"splitt": "a"})) == "data.splitt"
    assert refused_field(job("prepare_data", "--config=configs/digits.py")) == "data.name"


@needs_tensorflow
def test_prepares(prepare, tmp_path):
    sets = tmp_path / "sets"
    done = prepare(f"--data_dir={sets}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{sets}/{PATH}: train 14, test 6"
    assert_complete(sets, tmp_path)


@needs_tensorflow
def test_converts(prepare, tfrecord, tmp_path):
    """Converts a folder without the code of its builder."""
    with refused("data.dataset"):
        source_of(tfrecord)
    done = prepare(f"--data_dir={tfrecord}", first="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tfrecord}/{PATH}: train 14, test 6\n"
    assert "20/20 (100 %)" in done.stderr
    assert_complete(tfrecord, tmp_path)
    assert not any(name.startswith("incomplete") for name in os.listdir(f"{tfrecord}/{PATH}"))


@needs_tensorflow
def test_a_killed_preparation_is_not_read(prepare, tmp_path):
    sets = tmp_path / "sets"
    done = prepare(f"--data_dir={sets}", first=KILLED_AT_AN_EXAMPLE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(path.name.startswith("incomplete") for path in (sets / "tiny_things").iterdir())
    with refused("data.dataset"):
        source_of(sets)
    assert prepare(f"--data_dir={sets}").returncode == 0
    assert_complete(sets, tmp_path)


@needs_tensorflow
@pytest.mark.parametrize("moved", [1, 2])
def test_a_killed_conversion_is_not_read(prepare, tfrecord, tmp_path, moved):
    """Kills the job after it has moved one or both data files, but not the file that declares them."""
    done = prepare(f"--data_dir={tfrecord}", first=KILLED_AT_A_FILE.format(moved=moved))
    assert done.returncode == -signal.SIGKILL, done.stderr
    with refused("data.dataset"):
        source_of(tfrecord)
    done = prepare(f"--data_dir={tfrecord}", first="")
    assert done.returncode == 0, done.stderr
    assert_complete(tfrecord, tmp_path)


@needs_tensorflow
@pytest.mark.parametrize("damage", ["truncated", "incomplete"])
def test_a_corrupt_file_is_reported_in_one_line(prepare, tfrecord, damage):
    """One file ends in the middle of an example, the other lacks examples."""
    file = f"{tfrecord}/{PATH}/tiny_things-test.tfrecord-00000-of-00001"
    with open(file, "rb") as complete:
        data = complete.read()
    end = 16 + int.from_bytes(data[:8], "little")  # end of the first example, its length and checksums included
    with open(file, "wb") as corrupt:
        corrupt.write(data[: end if damage == "incomplete" else end - 5])
    line = last_line(prepare(f"--data_dir={tfrecord}", first=""))
    assert line.startswith("error: data.dataset: ")
    assert "1 examples instead of 6" in line or damage == "truncated"
    assert sorted(os.listdir(f"{tfrecord}/{PATH}")) == [
        "dataset_info.json", "features.json", "label.labels.txt", "tiny_things-test.tfrecord-00000-of-00001",
        "tiny_things-train.tfrecord-00000-of-00001",
    ]  # fmt: skip


FOLDER = """
import runpy

def get_config():
    config = runpy.run_path({digits!r})["get_config"]()
    config.data = {data!r}
    return config
"""


@pytest.fixture
def write(tmp_path):
    """Runs the job with --out on a folder of five images, one of which is corrupt."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        Image.new("L", (12, 9), 50 * number).save(images / f"{number}.png")
    (images / "3.png").write_bytes(b"")

    def run(*flags, **data):
        data = {"name": "folder", "path": str(images), "size": 8, "channels": 1, "labels": False, **data}
        config = tmp_path / "config.py"
        config.write_text(FOLDER.format(digits=str(ROOT / "configs/digits.py"), data=data))
        return job("prepare_data", f"--config={config}", f"--out={tmp_path}/set", *flags)

    return run


def test_the_examples_of_any_source_are_written_as_records(write, tmp_path):
    done = write("--config.train.workers=1", on_error="skip")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/set: 4 examples, 1 left out; train on data = " in done.stdout
    found = build("data", {"name": "array_record", "path": str(tmp_path / "set")})
    assert found.spec.shape == (8, 8, 1)
    assert [int(example["x"][0, 0, 0]) for example in found] == [0, 50, 100, 200]
    assert refused_field(write(on_error="skip")) == "--out"  # it exists


def test_num_limits_the_examples(write, tmp_path):
    assert write("--num=2").returncode == 0
    assert len(build("data", {"name": "array_record", "path": str(tmp_path / "set")})) == 2


def test_a_corrupt_image_stops_the_writing(write, tmp_path):
    done = write()
    assert refused_field(done) == "data" and "3.png" in done.stderr
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("num", ["0", "6"])
def test_an_invalid_number_is_named(write, num):
    assert refused_field(write(f"--num={num}")) == "--num"


def test_an_endless_source_requires_a_number(tmp_path):
    assert refused_field(job("prepare_data", "--config=configs/shapes.py", f"--out={tmp_path}/set")) == "--num"
