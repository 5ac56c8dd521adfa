"""The job that prepares sets of TFDS, in processes of its own. What takes TensorFlow is marked; what comes of it is
read without."""

import importlib.util
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.core.build import build
from diffusion.core.types import InputError
from tests.data import tfds_sets
from tests.data.test_tfds import read_elsewhere
from tests.jobs import ROOT, job, one_line

CONFIG = """
{first}
import runpy

def get_config():
    config = runpy.run_path({digits!r})["get_config"]()
    config.data = {data!r}
    config.eval.data = {held_out!r}
    return config
"""
OWN = "import tests.data.tfds_sets"  # the builder
KILLED_AT_AN_EXAMPLE = f"""{OWN}, os
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
NO_TENSORFLOW = f"""{OWN}, importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "tensorflow" else find_spec(name)
"""
PATH = "tiny_things/1.2.0"


def takes_tensorflow(test):
    absent = importlib.util.find_spec("tensorflow") is None
    return pytest.mark.peers(pytest.mark.skipif(absent, reason="TensorFlow is not installed")(test))


@pytest.fixture
def prepare(tmp_path):
    """Runs the job with a config of two sections."""

    def run(*flags, data=None, held_out=None, first=OWN):
        data = {"name": "tfds", "dataset": "tiny_things", **(data or {})}
        held_out = {"name": "tfds", "dataset": "tiny_things", "split": "test", **(held_out or {})}
        config = tmp_path / "config.py"
        digits = str(ROOT / "configs/digits.py")
        config.write_text(CONFIG.format(first=first, digits=digits, data=data, held_out=held_out))
        return job("prepare_data", f"--config={config}", *flags)

    return run


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A folder with the set as ArrayRecord."""
    path = str(tmp_path_factory.mktemp("ready"))
    tfds_sets.prepare(path)
    return path


@pytest.fixture
def tfrecord(tmp_path):
    """The set as TFRecord, in a folder."""
    path = str(tmp_path / "sets")
    tfds_sets.prepare(path, "tfrecord")
    return path


def source_of(folder, split="train"):
    return build("data", {"name": "tfds", "dataset": "tiny_things", "split": split, "data_dir": str(folder)})


def assert_whole(folder, tmp_path):
    """It reads pixel for pixel, in a process without TensorFlow."""
    found = read_elsewhere(str(folder), str(tmp_path / "read.npz"))
    jax.tree.map(np.testing.assert_array_equal, found, tfds_sets.expected("train"))
    assert len(source_of(folder, "test")) == 6


def last_line(done):
    """As `one_line`; what tfds tells of its progress may stand before it."""
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and line.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    return line


def test_without_tensorflow_it_says_what_to_install(prepare, tmp_path):
    done = prepare(f"--data_dir={tmp_path}/sets", first=NO_TENSORFLOW)
    assert one_line(done) == ("error: data.dataset: preparing it takes TensorFlow; pip install -r requirements-tf.txt")
    assert not (tmp_path / "sets").exists()


@pytest.mark.parametrize("by", ["flag", "config", "environment"])
def test_a_prepared_set_is_left_alone(prepare, ready, by, monkeypatch):
    def state():
        return sorted((path, os.stat(path).st_mtime_ns) for path, _, _ in os.walk(ready))

    before = state()
    if by == "environment":
        monkeypatch.setenv("TFDS_DATA_DIR", ready)
    where = {"data_dir": ready} if by == "config" else {}
    done = prepare(*([f"--data_dir={ready}"] if by == "flag" else []), data=where, held_out=where)
    assert (done.returncode, done.stdout) == (0, f"{ready}/{PATH} is prepared already: train 14, test 6\n"), done.stderr
    assert state() == before


def test_refusals(prepare, ready, tmp_path):
    here = f"--data_dir={ready}"
    assert "error: data.dataset: there is no nothing in " in one_line(prepare(here, data={"dataset": "nothing"}))
    done = prepare(here, held_out={"dataset": "mnistt"})
    assert "error: eval.data.dataset: there is no mnistt in " in one_line(done) and "mnist, " in done.stderr
    assert "data.splitt: diffusion/data/tfds.py takes no 'splitt'" in one_line(prepare(here, data={"splitt": "a"}))
    digits = job("prepare_data", "--config=configs/digits.py")
    assert one_line(digits).startswith("error: data.name: is 'digits', and it is sets of tfds that are downloaded")


@takes_tensorflow
def test_prepares(prepare, tmp_path):
    sets = tmp_path / "sets"
    done = prepare(f"--data_dir={sets}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{sets}/{PATH}: train 14, test 6"
    assert_whole(sets, tmp_path)


@takes_tensorflow
def test_converts(prepare, tfrecord, tmp_path):
    """Without the builder's code, from what is in the folder."""
    with pytest.raises(InputError, match=r"^data.dataset: .* has tfrecord alone"):
        source_of(tfrecord)
    done = prepare(f"--data_dir={tfrecord}", first="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tfrecord}/{PATH}: train 14, test 6\n"
    assert "20/20 (100 %)" in done.stderr
    assert_whole(tfrecord, tmp_path)
    assert not any(name.startswith("incomplete") for name in os.listdir(f"{tfrecord}/{PATH}"))


@takes_tensorflow
def test_a_killed_preparation_is_not_read(prepare, tmp_path):
    sets = tmp_path / "sets"
    done = prepare(f"--data_dir={sets}", first=KILLED_AT_AN_EXAMPLE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(path.name.startswith("incomplete") for path in (sets / "tiny_things").iterdir())
    with pytest.raises(InputError, match=r"^data.dataset: there is no "):
        source_of(sets)
    assert prepare(f"--data_dir={sets}").returncode == 0
    assert_whole(sets, tmp_path)


@takes_tensorflow
@pytest.mark.parametrize("moved", [1, 2])
def test_a_killed_conversion_is_not_read(prepare, tfrecord, tmp_path, moved):
    """Killed when one of two files is in its place, or both, and what tells of them is not."""
    done = prepare(f"--data_dir={tfrecord}", first=KILLED_AT_A_FILE.format(moved=moved))
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(InputError, match=r"^data.dataset: .* has tfrecord alone"):
        source_of(tfrecord)
    done = prepare(f"--data_dir={tfrecord}", first="")
    assert done.returncode == 0, done.stderr
    assert_whole(tfrecord, tmp_path)


@takes_tensorflow
@pytest.mark.parametrize("damage", ["cut", "short"])
def test_what_cannot_be_prepared_is_told_in_one_line(prepare, tfrecord, damage):
    """A file that ends in an example, and one that lacks some."""
    file = f"{tfrecord}/{PATH}/tiny_things-test.tfrecord-00000-of-00001"
    with open(file, "rb") as whole:
        data = whole.read()
    end = 16 + int.from_bytes(data[:8], "little")  # of the first example, with its length and checksums
    with open(file, "wb") as less:
        less.write(data[: end if damage == "short" else end - 5])
    line = last_line(prepare(f"--data_dir={tfrecord}", first=""))
    assert "error: data.dataset: tiny_things cannot be prepared: " in line
    assert "has 1 examples of 6" in line or damage == "cut"
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
    """Runs the job with --out on a folder of five images, of which one is damaged."""
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


def test_any_source_is_written_as_a_set_of_our_own(write, tmp_path):
    done = write("--config.train.workers=1", on_error="skip")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/set: 4 examples, 1 left out; train on data = " in done.stdout
    found = build("data", {"name": "array_record", "path": str(tmp_path / "set")})
    assert found.spec.shape == (8, 8, 1)
    assert [round((float(example["x"][0, 0, 0]) + 1) * 127.5) for example in found] == [0, 50, 100, 200]
    assert one_line(write(on_error="skip")).startswith(f"error: --out: {tmp_path}/set is there already")


def test_the_first_so_many(write, tmp_path):
    assert write("--num=2").returncode == 0
    assert len(build("data", {"name": "array_record", "path": str(tmp_path / "set")})) == 2


def test_a_damaged_image_ends_the_writing(write, tmp_path):
    done = write()
    assert "3.png is empty; mend or remove it, or set data.on_error='skip'" in one_line(done)
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("num", ["0", "6"])
def test_a_bad_number_is_named(write, num):
    assert one_line(write(f"--num={num}")).startswith("error: --num: must be from 1 to 5")


def test_a_set_without_an_end_wants_a_number(tmp_path):
    done = job("prepare_data", "--config=configs/shapes.py", f"--out={tmp_path}/set")
    assert one_line(done).startswith("error: --num: must be from 1 to 2,147,483,647")
