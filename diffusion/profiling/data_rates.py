"""Measures how fast data are read, transformed, batched and moved to the devices."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from diffusion.core.types import Source
from diffusion.data.pipeline import Batches
from diffusion.distributed import sharding
from diffusion.profiling.timing import calls_per_second


def example_rates(source: Source, seconds: float) -> dict[str, float]:
    """Measures examples per second in one thread, for each of the source's `stages` alone and for a whole example.

    Args:
      source: The examples, which are read in a random order.
      seconds: How long to measure each rate.
    """
    order = np.random.default_rng(0).permutation(min(len(source), 1 << 20)).tolist()
    rates = {}
    if hasattr(source, "stages"):
        spent, count, end = [0.0] * len(source.stages), 0, time.perf_counter() + seconds
        for index in itertools.cycle(order):
            value = index
            for number, (_, function) in enumerate(source.stages):
                begin = time.perf_counter()
                value = function(value)
                spent[number] += time.perf_counter() - begin
            count += 1
            if time.perf_counter() > end:
                break
        rates = {name: count / duration for (name, _), duration in zip(source.stages, spent, strict=True)}
    indices = itertools.cycle(order)
    return {**rates, "an example": calls_per_second(lambda: source[next(indices)], seconds)}


def batch_rates(
    source: Source, options: dict[str, Any], place: Sharding, seconds: float
) -> Iterator[tuple[str, float]]:  # fmt: skip
    """Measures examples per second in batches on the host, and in batches that are moved to the devices.

    Args:
      source: The examples.
      options: Keyword arguments of `Batches`.
      place: The sharding of a batch on the devices.
      seconds: How long to measure each rate.

    Yields:
      The name of each rate, and the rate.
    """

    def to_devices(batch: dict[str, Any]) -> None:
        jax.block_until_ready(sharding.to_global({"x": batch["x"], "cond": batch["cond"]}, place))

    uses = {"in batches, read ahead": lambda batch: None, "on the devices": to_devices}
    for name, use in uses.items():
        stream = Batches(source, **options)
        use(next(stream))  # starts the workers
        rate = calls_per_second(lambda use=use, stream=stream: use(next(stream)), seconds) * options["batch_size"]
        stream.close()
        yield name, rate
