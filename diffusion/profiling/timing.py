"""Times functions against each other on the host's clock. The functions must wait for their results."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def time_alternately(functions: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Calls each function in turn, `runs` times after one warm-up call, so that all see the same load of the machine.

    Returns:
      The seconds of each call, by the name of the function.
    """
    seconds = {name: [] for name in functions}
    for run in range(runs + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if run:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Returns the median ratio of values that were measured alternately."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def calls_per_second(function: Callable[[], Any], seconds: float) -> float:
    """Calls a function for at least `seconds` seconds and returns the rate."""
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() < begin + seconds:
        function()
        calls += 1
    return calls / (time.perf_counter() - begin)
