"""The order of examples and batches: with processes, workers, buckets, and where a run goes on."""

import dataclasses
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import InputError, Spec
from diffusion.data.pipeline import Batches

SIZE, BATCH_SIZE, LONG = 50, 6, 200


@dataclasses.dataclass
class ScalarEmbedding:
    """x of example i is i; drawn in training, a number is added to it that is random."""

    size: int
    noisy: bool = False
    fails: int | None = None
    kills: bool = False

    spec = Spec(shape=(1,))

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


class Bucketed(ScalarEmbedding):
    """Every third example is longer, every twelfth is longer still."""

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


def test_every_example_once_an_epoch_in_a_new_order():
    epochs = take(Batches(ScalarEmbedding(12), batch_size=12, seed=0), 3)
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_run_across_epochs():
    seen = np.ravel(take(Batches(ScalarEmbedding(10), batch_size=4, seed=0), 15))
    for epoch in seen.reshape(6, 10):
        assert sorted(epoch) == list(range(10))


def test_the_order_follows_from_the_seed():
    first, again, other = (take(Batches(ScalarEmbedding(50), batch_size=7, seed=s), 20) for s in (1, 1, 2))
    assert first == again and first != other
    with pytest.raises(InputError, match="seed: must be from 0 to 2"):
        Batches(ScalarEmbedding(50), batch_size=7, seed=-1)


@pytest.fixture(scope="module", params=[ScalarEmbedding(SIZE, noisy=True), Bucketed(SIZE)], ids=["plain", "buckets"])
def source(request):
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(source):
    return hashes(Batches(source, batch_size=BATCH_SIZE, seed=3), LONG)


def test_twice_the_same(source, uninterrupted):
    assert hashes(Batches(source, batch_size=BATCH_SIZE, seed=3), LONG) == uninterrupted
    assert len(set(uninterrupted)) == LONG


def test_what_is_random_is_drawn_anew_every_epoch():
    stream = Batches(ScalarEmbedding(12, noisy=True), batch_size=12, seed=0)
    epochs = np.concatenate([np.sort(next(stream)["x"], axis=0) for _ in range(3)], axis=1) % 1
    assert (np.ptp(epochs, axis=1) > 0).all() and len(np.unique(epochs)) > 30


def test_worker_processes_change_nothing(source, uninterrupted):
    """Neither from the start nor going on from another number of them."""
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


def test_going_on(source, uninterrupted):
    stream = Batches(source, batch_size=BATCH_SIZE, seed=3, position=position(source, 37))
    assert stream.position() == {"examples": 37 * BATCH_SIZE, "size": SIZE}
    assert hashes(stream, LONG - 37) == uninterrupted[37:]


def test_processes_together_see_what_one_sees(source):
    one = take(Batches(source, batch_size=BATCH_SIZE, seed=4), 40)
    two = [take(Batches(source, batch_size=BATCH_SIZE, seed=4, process=p, processes=2), 40) for p in (0, 1)]
    for step in range(40):
        assert two[0][step] + two[1][step] == one[step]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1), (3, 2)])
def test_going_on_with_another_number_of_processes(source, before, after):
    one = take(Batches(source, batch_size=BATCH_SIZE, seed=3), 40)
    begun = [position(source, 11, process=p, processes=before) for p in range(before)]
    assert all(where == begun[0] for where in begun)
    parts = [
        take(Batches(source, batch_size=BATCH_SIZE, seed=3, process=p, processes=after, position=begun[0]), 29)
        for p in range(after)
    ]
    for step, together in enumerate(zip(*parts, strict=True)):
        assert list(itertools.chain(*together)) == one[11 + step]


def test_going_on_with_another_batch_size():
    one = np.ravel(take(Batches(ScalarEmbedding(SIZE), batch_size=BATCH_SIZE, seed=3), 40))
    rest = np.ravel(
        take(Batches(ScalarEmbedding(SIZE), batch_size=10, seed=3, position=position(ScalarEmbedding(SIZE), 5)), 10)
    )
    np.testing.assert_array_equal(rest, one[30:130])
    with pytest.raises(InputError, match=r"train.batch_size: 7 does not divide the 30 examples"):
        Batches(Bucketed(SIZE), batch_size=7, seed=3, position=position(Bucketed(SIZE), 5))


def test_going_on_with_other_data():
    with pytest.raises(InputError, match="data: has 51 examples, but the run began with 50"):
        Batches(ScalarEmbedding(51), batch_size=BATCH_SIZE, seed=3, position=position(ScalarEmbedding(50), 5))


def test_buckets():
    """A batch is of one; each has all of its examples once before any twice, and batches in its proportion."""
    source = Bucketed(120)
    batches = [next(stream) for stream in [Batches(source, batch_size=5, seed=0)] for _ in range(240)]
    of = [np.unique(source.buckets[batch["cond"]["label"]]) for batch in batches]
    assert all(len(one) == 1 for one in of)
    assert [batch["x"].shape for batch in batches] == [(5, 1 + int(one[0])) for one in of]
    for bucket, size in enumerate((80, 30, 10)):
        seen = np.concatenate([b["cond"]["label"] for b, one in zip(batches, of, strict=True) if one[0] == bucket])
        assert len(seen) == 10 * size
        epochs = seen.reshape(10, size)
        assert all(len(set(epoch)) == size for epoch in epochs) and (epochs[0] != epochs[1]).any()
    # In any stretch each bucket has its share, to within one batch: none waits for the end of an epoch.
    longest = np.cumsum([one[0] == 2 for one in of])
    assert np.abs(longest - np.arange(1, 241) / 12).max() <= 1


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_a_source_raises_arrives(workers):
    stream = Batches(ScalarEmbedding(20, fails=13), batch_size=4, seed=0, workers=workers)
    with pytest.raises(InputError, match=r"^data: number 13$") as caught:
        take(stream, 6)
    assert caught.value.field == "data"
    stream.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_does_not_hang_the_run(workers):
    stream = Batches(ScalarEmbedding(20, fails=13, kills=True), batch_size=4, seed=0, workers=workers)
    with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code -9"):
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


def test_digits_splits_do_not_meet():
    train, test = (build("data", {"name": "digits", "split": split}) for split in ("train", "test"))
    counts = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in counts for image in test.images) == 0


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    program = (
        "import multiprocessing, os, signal\n"
        "from tests.data.test_pipeline import Numbers\n"
        "from diffusion.data.pipeline import Batches\n"
        "if __name__ == '__main__':\n"
        "    stream = Batches(Numbers(20), batch_size=4, seed=0, workers=1)\n"
        "    next(stream)\n"
        "    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, tmp_path / "program.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (worker,) = (int(pid) for pid in done.stdout.split())
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}")
