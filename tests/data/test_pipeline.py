"""The order of examples and batches: with several processes, workers and buckets, and after resuming."""

import dataclasses
import hashlib
import inspect
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from diffusion.core.build import build, find
from diffusion.core.types import ArraySpec, InputError, Spec
from diffusion.data.pipeline import Batches, location_keywords
from tests.refusals import refused
from tests.tiers import slow_except

SIZE, BATCH_SIZE, LONG = 50, 6, 100


@dataclasses.dataclass
class Numbers:
    """A source whose x of example i is i. In training, `noisy` adds a random number in [0, 1)."""

    size: int
    noisy: bool = False
    fails: int | None = None
    kills: bool = False

    spec = Spec(ArraySpec((1,), "points"))

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index == self.fails:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("data", f"number {index}")
        return {"x": np.float32([index]), "cond": {"label": np.int32(index)}}

    def draw(self, index, rng):
        example = self[index]
        return {**example, "x": example["x"] + rng.random(dtype=np.float32)} if self.noisy else example


class Bucketed(Numbers):
    """A source with three buckets, whose x has length 1, 2 (every third example) or 3 (every twelfth)."""

    def __init__(self, size):
        super().__init__(size)
        self.buckets = np.array([0 if index % 3 else 1 + (index % 12 == 0) for index in range(size)])

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return {**example, "x": np.repeat(example["x"], 1 + self.buckets[index])}


def take(iterator, n):
    return [next(iterator)["x"].ravel().astype(int).tolist() for _ in range(n)]


def hashes(iterator, n):
    found = []
    for _ in range(n):
        total = hashlib.sha256()
        for leaf in jax.tree.leaves(next(iterator)):
            total.update(np.ascontiguousarray(leaf).tobytes())
        found.append(total.hexdigest())
    return found


def test_an_epoch_visits_every_example_once_in_a_new_order():
    epochs = take(Batches(Numbers(12), batch_size=12, seed=0), 3)
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_run_across_epochs():
    seen = np.ravel(take(Batches(Numbers(10), batch_size=4, seed=0), 15))
    for epoch in seen.reshape(6, 10):
        assert sorted(epoch) == list(range(10))


def test_fewer_examples_than_a_batch():
    seen = np.ravel(take(Batches(Numbers(3), batch_size=7, seed=0), 6))
    for epoch in seen.reshape(14, 3):
        assert sorted(epoch) == list(range(3))


def test_the_order_depends_on_the_seed():
    first, again, other = (take(Batches(Numbers(50), batch_size=7, seed=s), 20) for s in (1, 1, 2))
    assert first == again and first != other
    with refused("seed"):
        Batches(Numbers(50), batch_size=7, seed=-1)


@pytest.fixture(scope="module", params=[Numbers(SIZE, noisy=True), Bucketed(SIZE)], ids=["plain", "buckets"])
def source(request):
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(source):
    return hashes(Batches(source, batch_size=BATCH_SIZE, seed=3), LONG)


def test_runs_are_reproducible(source, uninterrupted):
    assert hashes(Batches(source, batch_size=BATCH_SIZE, seed=3), LONG) == uninterrupted
    assert len(set(uninterrupted)) == LONG


def test_random_numbers_differ_between_epochs():
    stream = Batches(Numbers(12, noisy=True), batch_size=12, seed=0)
    epochs = np.concatenate([np.sort(next(stream)["x"], axis=0) for _ in range(3)], axis=1) % 1
    assert (np.ptp(epochs, axis=1) > 0).all() and len(np.unique(epochs)) > 30


def test_worker_processes_change_nothing(source, uninterrupted):
    """Checks a run from the start and one that resumes with another number of workers."""
    stream = Batches(source, batch_size=BATCH_SIZE, seed=3, workers=2)
    assert hashes(stream, LONG) == uninterrupted
    stream.close()
    stream = Batches(source, batch_size=BATCH_SIZE, seed=3, workers=1, position=position(source, 37))
    assert hashes(stream, 20) == uninterrupted[37:57]
    stream.close()


def position(source, batches, **keywords):
    stream = Batches(source, batch_size=BATCH_SIZE, seed=3, **keywords)
    take(stream, batches)
    return stream.position()


def test_resuming(source, uninterrupted):
    stream = Batches(source, batch_size=BATCH_SIZE, seed=3, position=position(source, 37))
    assert stream.position() == {"examples": 37 * BATCH_SIZE, "size": SIZE}
    assert hashes(stream, LONG - 37) == uninterrupted[37:]


def test_the_parts_of_all_processes_make_up_the_batch_of_one(source):
    one = take(Batches(source, batch_size=BATCH_SIZE, seed=4), 40)
    two = [take(Batches(source, batch_size=BATCH_SIZE, seed=4, process=p, processes=2), 40) for p in (0, 1)]
    for step in range(40):
        assert two[0][step] + two[1][step] == one[step]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1), (3, 2)])
def test_resuming_with_another_number_of_processes(source, before, after):
    one = take(Batches(source, batch_size=BATCH_SIZE, seed=3), 40)
    saved = [position(source, 11, process=p, processes=before) for p in range(before)]
    assert all(other == saved[0] for other in saved)
    parts = [
        take(Batches(source, batch_size=BATCH_SIZE, seed=3, process=p, processes=after, position=saved[0]), 29)
        for p in range(after)
    ]
    for step, together in enumerate(zip(*parts, strict=True)):
        assert list(itertools.chain(*together)) == one[11 + step]


def test_resuming_with_another_batch_size():
    one = np.ravel(take(Batches(Numbers(SIZE), batch_size=BATCH_SIZE, seed=3), 40))
    rest = np.ravel(take(Batches(Numbers(SIZE), batch_size=10, seed=3, position=position(Numbers(SIZE), 5)), 10))
    np.testing.assert_array_equal(rest, one[30:130])
    with refused("train.batch_size"):
        Batches(Bucketed(SIZE), batch_size=7, seed=3, position=position(Bucketed(SIZE), 5))


def test_resuming_with_other_data():
    with refused("data"):
        Batches(Numbers(51), batch_size=BATCH_SIZE, seed=3, position=position(Numbers(50), 5))


def test_buckets():
    """Checks that a batch has one bucket, and that each bucket has its own epochs and its share of the batches."""
    source = Bucketed(120)
    batches = [next(stream) for stream in [Batches(source, batch_size=5, seed=0)] for _ in range(240)]
    bucket_of = [np.unique(source.buckets[batch["cond"]["label"]]) for batch in batches]
    assert all(len(one) == 1 for one in bucket_of)
    assert [batch["x"].shape for batch in batches] == [(5, 1 + int(one[0])) for one in bucket_of]
    for bucket, size in enumerate((80, 30, 10)):
        seen = np.concatenate(
            [b["cond"]["label"] for b, one in zip(batches, bucket_of, strict=True) if one[0] == bucket]
        )
        assert len(seen) == 10 * size
        epochs = seen.reshape(10, size)
        assert all(len(set(epoch)) == size for epoch in epochs) and (epochs[0] != epochs[1]).any()
    # At any step, each bucket has had its share of the batches to within one batch.
    longest = np.cumsum([one[0] == 2 for one in bucket_of])
    assert np.abs(longest - np.arange(1, 241) / 12).max() <= 1


@pytest.mark.parametrize("workers", slow_except((0, 1), (0, 1, 2)))
def test_the_errors_of_a_source_are_raised(workers):
    stream = Batches(Numbers(20, fails=13), batch_size=4, seed=0, workers=workers)
    with refused("data") as caught:
        take(stream, 6)
    assert caught.value.problem == "number 13"  # without the text that grain adds
    stream.close()


def test_errors_are_foreseen(source):
    """The position is that of the batches that were returned."""
    stream = Batches(Numbers(20, fails=13), batch_size=4, seed=0, foresight=2)
    known = Batches(Numbers(20), batch_size=4, seed=0)
    batches = take(known, 5)
    bad = next(number for number, batch in enumerate(batches) if 13 in batch)
    for number in range(bad):
        assert take(stream, 1) == [batches[number]] and stream.position()["examples"] == 4 * (number + 1)
        assert (stream.error is None) == (number + 2 < bad)
    with refused("data"):
        next(stream)
    ahead = Batches(source, batch_size=BATCH_SIZE, seed=3, foresight=2)
    assert hashes(ahead, 20) == hashes(Batches(source, batch_size=BATCH_SIZE, seed=3), 20)


@pytest.mark.parametrize("workers", slow_except((1,), (1, 2)))
def test_a_killed_worker_does_not_hang_the_run(workers):
    stream = Batches(Numbers(20, fails=13, kills=True), batch_size=4, seed=0, workers=workers)
    with pytest.raises(RuntimeError, match="exit code -9"):
        take(stream, 6)
    stream.close()


@pytest.mark.parametrize(("split", "size"), [("train", 1500), ("test", 297)])
def test_digits(split, size):
    source = build("data", {"name": "digits", "split": split})
    assert len(source) == size
    example = source[0]
    assert example["x"].shape == source.spec.shape and example["x"].dtype == np.float32
    assert source.images.min() == -1 and source.images.max() == 1
    assert set(source.labels) == set(range(source.spec.num_classes))


def test_digits_splits_are_disjoint():
    train, test = (build("data", {"name": "digits", "split": split}) for split in ("train", "test"))
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}


@pytest.mark.parametrize(
    ("name", "keywords"),
    [("folder", {"path", "index", "on_error"}), ("npy", {"path"}), ("tfds", {"data_dir"}), ("array_record", {"path"}),
     ("digits", set()), ("toy", set()), ("shapes", set()), ("moving_shapes", set())],
)  # fmt: skip
def test_location_keywords(name, keywords):
    assert set(location_keywords({"name": name, "size": 8})) == keywords
    assert keywords <= inspect.signature(find("data", name, field="data.name")).parameters.keys()


def test_location_keywords_of_external_parts():
    for name in (Numbers, "tests.data.test_pipeline:Numbers"):
        assert location_keywords({"name": name, "size": 8}) == ()
    with refused("data.name"):
        location_keywords({"name": "folders"})


PROGRAM = """
import multiprocessing, os, signal
from absl import flags
from diffusion.data.pipeline import Batches
from tests.data.test_pipeline import Numbers

if __name__ == "__main__":
    stream = Batches(Numbers(20), batch_size=4, seed=0, workers=1)
    next(stream)
    print(flags.FLAGS.is_parsed(), *(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


UNGUARDED = """
import sys
import diffusion as df

trainer = df.Trainer({"name": "toy", "kind": "moons"}, {"name": "mlp", "width": 8, "depth": 1}, "flow_matching",
                     batch_size=4, workers=1, workdir=sys.argv[1])
try:
    trainer.fit(2)
except Exception as error:
    print(error)
"""


@pytest.mark.slow
def test_a_program_without_a_main_guard(tmp_path):
    """Its workers run it again and end before they train; the error says so, even if the program catches errors.

    The examples are larger than the buffer of the pipe through which a worker receives them.
    """
    assert len(pickle.dumps(build("data", {"name": "toy", "kind": "moons"}))) > 2**17
    (tmp_path / "program.py").write_text(UNGUARDED)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, tmp_path / "program.py", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.startswith("train.workers: ") and 'if __name__ == "__main__":' in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.slow
def test_workers_in_a_program_that_does_not_parse_flags(tmp_path):
    """Checks that the flags of the program remain unparsed, and that the workers of a killed process exit."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, tmp_path / "program.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    parsed, worker = done.stdout.split()
    assert parsed == "False"
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}")
