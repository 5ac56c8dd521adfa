"""From a source to an endless stream of batches: shuffled, sharded over processes, its position saveable."""

import contextlib
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from diffusion.core.types import InputError, Source

THREADS = 4  # that read batches ahead, where no worker processes do


class Batches:
    """An iterator over this process's parts of the batches, `{"x": [b, ...], "cond": {...}}` in numpy, b examples of
    `batch_size` over all processes; `caption` and `skipped [b]` beside them where the source has them.

    Every epoch is a new order of all examples, which follows from the seed alone, and so does what is random in an
    example; batches run across the ends of epochs. Process p has the p-th part of every batch, so the batches of all
    processes together are those of one, row by row, and worker processes change nothing. A source with `buckets` has an
    order for each; a batch is of one bucket, and each bucket has batches in proportion to its examples.

    The position is how many examples all processes together have had, so a run may go on with another number of
    processes or workers and, without buckets, another batch size.

    Args:
      source: examples by index.
      batch_size: examples a batch over all processes; divisible by `processes`.
      seed: of the order and of what is random in examples.
      process, processes: this process and their number.
      workers: processes that read; 0 reads in threads of this one, which suits what needs little work.
      prefetch: batches read ahead, by each worker.
      position: a `position()` to go on from.

    Raises:
      InputError: the position is one in other data. A batch may raise what its source does.
    """

    def __init__(
        self, source: Source, *, batch_size: int, seed: int, process: int = 0, processes: int = 1, workers: int = 0,
        prefetch: int = 8, position: Mapping[str, int] | None = None,
    ):  # fmt: skip
        if not 0 <= seed < 2**32:
            raise InputError("seed", f"must be from 0 to 2^32 - 1, got {seed}")
        self.size, self.batch_size = len(source), batch_size
        buckets = getattr(source, "buckets", None)
        self.examples = 0 if position is None else self._begin(position, divides=buckets is not None)
        share = batch_size // processes
        if buckets is None:
            order = _examples(source, grain.MapDataset.range(self.size), seed)
            mine = order[self.examples :].batch(share, drop_remainder=True)[process::processes]
        else:
            numbers, counts = np.unique(buckets, return_counts=True)
            orders = [
                _examples(source, grain.MapDataset.source(np.flatnonzero(buckets == number)), seed + int(number))
                for number in numbers
            ]
            streams = [order.batch(share, drop_remainder=True)[process::processes] for order in orders]
            mine = grain.MapDataset.mix(streams, counts.tolist())[self.examples // batch_size :]
        self.iterator = _read_ahead(mine, workers, prefetch)
        self._finalize = weakref.finalize(self, self.iterator.close)  # at the latest when the interpreter ends

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        with _as_raised():
            batch = next(self.iterator)
        self.examples += self.batch_size
        return batch

    def position(self) -> dict[str, int]:
        """Where the next batch begins, JSON-able and the same in all processes."""
        return {"examples": self.examples, "size": self.size}

    def close(self) -> None:
        """Ends the threads and worker processes."""
        self._finalize()

    def _begin(self, position: Mapping[str, int], divides: bool) -> int:
        began = position.get("size", 0)
        if began != self.size:
            raise InputError("data", f"has {self.size:,} examples, but the run began with {began:,}; give it "
                             "the same data, or begin anew in another --workdir")  # fmt: skip
        if divides and position["examples"] % self.batch_size:
            raise InputError("train.batch_size", f"{self.batch_size} does not divide the {position['examples']:,} "
                             "examples that the run has had; batches of several sizes keep their number")  # fmt: skip
        return position["examples"]


def in_order(source: Source, num: int, *, workers: int = 0, prefetch: int = 64) -> Iterator[dict[str, Any]]:
    """The first `num` examples, each once, read ahead as `Batches` does."""
    stream = _read_ahead(grain.MapDataset.range(num).map(_Reader(source.__getitem__)), workers, prefetch)
    try:
        with _as_raised():
            yield from stream
    finally:
        stream.close()


@contextlib.contextmanager
def _as_raised() -> Iterator[None]:
    """A source's errors without what grain adds to their message."""
    try:
        yield
    except InputError as error:
        raise InputError(error.field, error.problem) from error


def _read_ahead(dataset: grain.MapDataset, workers: int, prefetch: int) -> grain.DatasetIterator:
    threads = 1 if workers else THREADS
    read = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain has flags of its own, which a notebook does not parse
            flags.FLAGS.mark_as_parsed()
        _start_tracker()
        read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch))
    return iter(read)


def _examples(source: Source, numbers: grain.MapDataset, seed: int) -> grain.MapDataset:
    """An endless stream of a source's examples of some numbers, each epoch in an order of its own."""
    order = numbers.seed(seed).shuffle().repeat(None)
    if hasattr(source, "draw"):
        return order.random_map(_Reader(source.draw))
    return order.map(_Reader(source.__getitem__))


class _Reader:
    """A source's function, which makes a process that it is sent to end when the one that sent it does: a worker would
    outlive a training that was killed, and keep its memory."""

    def __init__(self, read: Callable):
        self.read = read

    def __call__(self, *args: Any) -> Any:
        return self.read(*args)

    def __reduce__(self) -> tuple:
        return _arrived, (self.read,)


def _arrived(read: Callable) -> _Reader:
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), name="end with the parent", daemon=True).start()
    return _Reader(read)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _start_tracker() -> None:
    """Starts the process that frees what others leave in shared memory, and keeps it silent when it does: batches that
    were on their way when a run ended are left to it."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker" + (f",{before}" if before else "")
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before:
            os.environ["PYTHONWARNINGS"] = before
