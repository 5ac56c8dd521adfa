"""From a source to an endless stream of batches: shuffled, sharded over processes, its position saveable."""

import grain

from diffusion.types import Source

PREFETCH_THREADS = 4


def batches(
    source: Source, *, batch_size: int, seed: int, process: int = 0, processes: int = 1, prefetch: int = 8
) -> grain.DatasetIterator:
    """An iterator over this process's part of the batches.

    Every epoch is a new order of all examples, which follows from the seed alone; batches run across the ends of
    epochs. Process p of P takes examples p, p + P, ... of that order, so all processes together see what one would.
    `get_state()` and `set_state()` of the iterator hold the position.

    Args:
      source: examples by index.
      batch_size: examples a batch over all processes; divisible by `processes`.
      seed: of the order.
      process, processes: this process and their number.
      prefetch: batches read ahead by threads.

    Returns:
      An iterator of `{"x": [b, ...], "cond": {...}}`, numpy, b = batch_size / processes.
    """
    order = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    mine = order[process::processes].batch(batch_size // processes, drop_remainder=True)
    options = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=prefetch)
    return iter(mine.to_iter_dataset(options))
