"""The input pipeline: an endless, shuffled, sharded stream of batches from a source, with a position to resume from."""

import collections
import contextlib
import inspect
import multiprocessing
import os
import pickletools
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from diffusion.core.build import find, is_external
from diffusion.core.types import Autoencoder, InputError, Source, Spec

THREADS = 4  # number of reading threads when there are no worker processes
UNGUARDED = 64  # exit code of a worker process that runs the whole program again


class Batches:
    """An iterator over this process's parts of the batches.

    A part is `{"x": [b, ...], "cond": {...}}` in numpy, where b is `batch_size` divided by the number of processes. It
    also holds `caption` and `skipped [b]` if the source provides them.

    Every epoch visits all examples in a new order. The order and the random numbers used for an example (its crop and
    flip) depend on the seed alone. Batches run across the ends of epochs. Every batch is cut into contiguous parts and
    process p receives the p-th, so the parts of all processes, concatenated, are the batch of a single process. The
    number of worker processes has no effect on the examples. A source with `buckets` has one order per bucket; every
    batch comes from a single bucket, and each bucket has a share of the batches proportional to its size.

    The position is the number of examples that all processes together have consumed. A run can therefore resume with
    another number of processes or workers and, without buckets, with another batch size.

    Args:
      source: The examples, by index.
      batch_size: Number of examples per batch over all processes; divisible by `processes`.
      seed: Seed of the order and of the random numbers used for the examples, in [0, 2^32).
      process: Index of this process.
      processes: Number of processes.
      workers: Number of worker processes that read examples. With 0, threads of this process read them, which is
        enough if an example takes little work.
      prefetch: Number of batches to read ahead, per worker.
      position: A result of `position()` to resume from.
      foresight: Number of batches that are known to be readable when one is returned; see `error`.

    Attributes:
      error: The error of the source that ends the stream after at most `foresight` more batches, or None.

    Raises:
      InputError: The position belongs to other data. Iteration raises the errors of the source.
    """

    def __init__(
        self, source: Source, *, batch_size: int, seed: int, process: int = 0, processes: int = 1, workers: int = 0,
        prefetch: int = 8, position: Mapping[str, int] | None = None, foresight: int = 0,
    ):  # fmt: skip
        if not 0 <= seed < 2**32:
            raise InputError("seed", f"must be in [0, 2^32), got {seed}")
        self.size, self.batch_size, self.foresight = len(source), batch_size, foresight
        self.error, self._ahead = None, collections.deque()
        buckets = getattr(source, "buckets", None)
        self.examples = 0 if position is None else check_position(source, position, batch_size)
        part = batch_size // processes
        if buckets is None:
            order = _examples(source, grain.MapDataset.range(self.size), seed)
            dataset = order[self.examples :].batch(part, drop_remainder=True)[process::processes]
        else:
            numbers, counts = np.unique(buckets, return_counts=True)
            orders = [
                _examples(source, grain.MapDataset.source(np.flatnonzero(buckets == number)), seed + int(number))
                for number in numbers
            ]
            streams = [order.batch(part, drop_remainder=True)[process::processes] for order in orders]
            dataset = grain.MapDataset.mix(streams, counts.tolist())[self.examples // batch_size :]
        self.iterator = _read_ahead(dataset, workers, prefetch)
        self._finalize = weakref.finalize(self, self.iterator.close)  # runs at interpreter exit at the latest

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        while self.error is None and len(self._ahead) <= self.foresight:
            try:
                with _original_errors():
                    self._ahead.append(next(self.iterator))
            except Exception as error:
                self.error = error
        if not self._ahead:
            raise self.error
        self.examples += self.batch_size
        return self._ahead.popleft()

    def position(self) -> dict[str, int]:
        """Returns where the next batch begins. The result is JSON-able and the same in all processes."""
        return {"examples": self.examples, "size": self.size}

    def close(self) -> None:
        """Ends the threads and worker processes."""
        self._finalize()


def check_position(source: Source, position: Mapping[str, int], batch_size: int) -> int:
    """Returns the number of examples consumed at a position, after checking that it belongs to a source.

    Raises:
      InputError: The source has another size, or buckets and another batch size.
    """
    size, examples = position.get("size", 0), position["examples"]
    if size != len(source):
        raise InputError("data", f"has {len(source):,} examples, but the run started with {size:,}; provide the "
                         "same data, or start a new run in another --workdir")  # fmt: skip
    if hasattr(source, "buckets") and examples % batch_size:
        raise InputError("train.batch_size", f"must divide the {examples:,} examples consumed so far, "
                         f"got {batch_size}; with several image sizes, keep the batch size")  # fmt: skip
    return examples


def in_order(
    source: Source, num: int, *, start: int = 0, workers: int = 0, prefetch: int = 64
) -> Iterator[dict[str, Any]]:
    """Yields the examples from `start` to `num - 1` once each and in order, read ahead as by `Batches`."""
    stream = _read_ahead(grain.MapDataset.range(start, num).map(_Reader(source.__getitem__)), workers, prefetch)
    try:
        with _original_errors():
            yield from stream
    finally:
        stream.close()


def is_encoded(source: Source) -> bool:
    """Returns whether the examples of a source were encoded in advance: x is what `Autoencoder.posterior` returns."""
    return getattr(source, "encoder", None) is not None


def decoded_spec(source: Source) -> Spec:
    """Returns the spec of what an autoencoder decodes a source to; `source.spec` if it was not encoded in advance."""
    return getattr(source, "decoded_spec", source.spec)


def check_encoder(source: Source, autoencoder: Autoencoder | None, field: str = "data") -> None:
    """Checks that a source that was encoded in advance was encoded by an autoencoder.

    Args:
      field: The section of the config that names the source.

    Raises:
      InputError: It was encoded by another one, or there is none.
    """
    if not is_encoded(source):
        return
    if autoencoder is None:
        problem = f"is missing, and {field} holds latents; set the one that has encoded them, or train on images"
        raise InputError("autoencoder", problem)
    if source.encoder != autoencoder.digest:
        folder = f"{field}, {source.path}," if hasattr(source, "path") else field
        digests = f"SHA-256 {source.encoder[:12]}..., got {autoencoder.digest[:12]}..."
        problem = f"is not the autoencoder that {folder} was encoded with ({digests})"
        raise InputError("autoencoder.path", f"{problem}; restore the path, or encode the images again")


def location_keywords(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the keywords of a `data` section that do not affect what its examples are.

    They say where the data are stored or how errors are handled, so a run may resume with other values. Each source
    module lists its own in `LOCATION_KEYWORDS`; parts from outside the package have none.
    """
    name = section.get("name")
    if name is None or is_external(name):
        return ()
    module = inspect.getmodule(find("data", name, field="data.name"))
    return getattr(module, "LOCATION_KEYWORDS", ())


def end_if_imported() -> None:
    """Ends this process if it is a data worker that runs the program's main module because nothing guards it.

    Call it before work that a worker must not do, such as locking a workdir. An exception could be caught by the
    program, and the process that waits for this one would wait forever.
    """
    frames = [frame.f_locals for frame, _ in traceback.walk_stack(inspect.currentframe())]
    if any(names.get("__name__") == "__mp_main__" for names in frames):  # multiprocessing's name of the main module
        for names in frames:
            if "from_parent" in names:  # in multiprocessing.spawn; the parent waits until its message is read
                pipe = names["from_parent"]
                message = types.SimpleNamespace(read=pipe.read, readline=pipe.readline)  # a pipe cannot `tell`
                collections.deque(pickletools.genops(message), maxlen=0)
        os._exit(UNGUARDED)


@contextlib.contextmanager
def _original_errors() -> Iterator[None]:
    """Raises the errors of a source without the text that grain adds to their messages."""
    try:
        yield
    except InputError as error:
        raise InputError(error.field, error.problem) from error
    except RuntimeError as error:
        if f"exit code {UNGUARDED}." in str(error):
            problem = 'the data workers import this program, which must train below `if __name__ == "__main__":` only'
            raise InputError("train.workers", f"{problem}; add that line, or set workers to 0") from error
        raise


def _read_ahead(dataset: grain.MapDataset, workers: int, prefetch: int) -> grain.DatasetIterator:
    threads = 1 if workers else THREADS
    read = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    if workers:
        end_if_imported()
        _make_grain_flags_readable()
        _start_tracker()
        read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch))
    return iter(read)


def _make_grain_flags_readable() -> None:
    """Lets grain read its own absl flags in a program that does not parse flags, such as a notebook.

    Grain's worker processes read them, and absl refuses to read a flag before parsing unless the flag is present. Only
    grain's flags are marked as present, so the flags of the program itself remain unparsed.
    """
    if not flags.FLAGS.is_parsed():
        for name in flags.FLAGS:
            if name.startswith("grain_"):
                flags.FLAGS[name].present = max(1, flags.FLAGS[name].present)


def _examples(source: Source, indices: grain.MapDataset, seed: int) -> grain.MapDataset:
    """Returns an endless stream of the examples with these indices, with a new order in every epoch."""
    order = indices.seed(seed).shuffle().repeat(None)
    if hasattr(source, "draw"):
        return order.random_map(_Reader(source.draw))
    return order.map(_Reader(source.__getitem__))


class _Reader:
    """Wraps a function that reads examples, so that a worker process that unpickles it exits with its parent process.

    Without this, the workers of a training that is killed would keep running and hold their memory.
    """

    def __init__(self, read: Callable):
        self.read = read

    def __call__(self, *args: Any) -> Any:
        return self.read(*args)

    def __reduce__(self) -> tuple:
        return _unpickle_reader, (self.read,)


def _unpickle_reader(read: Callable) -> _Reader:
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent,), name="exit with the parent", daemon=True).start()
    return _Reader(read)


def _exit_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    # This runs in a data worker process only, and ends that process alone. `sys.exit` would end this thread alone.
    os._exit(1)


def _start_tracker() -> None:
    """Starts multiprocessing's resource tracker with its warnings disabled.

    It frees the shared memory that other processes leave behind. When a run ends, that includes the batches in transit,
    which it would warn about.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker" + (f",{before}" if before else "")
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before:
            os.environ["PYTHONWARNINGS"] = before
