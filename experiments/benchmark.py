"""Measures the cost of the library on this machine against the bare computation that it wraps, and prints medians.

python -m experiments.benchmark --suite=loop        the trainer, against the jitted train step that it runs
python -m experiments.benchmark --suite=sampling    each sampler's scan, against calls of the denoiser; compiling 1,000
                                                    steps, against 10; the number of recompilations
python -m experiments.benchmark --suite=networks    networks against the same networks in PyTorch: train steps, guided
                                                    sampling, compiling (some minutes)
python -m experiments.benchmark --suite=data        reading images, against PyTorch's loader; training on these images
python -m experiments.benchmark --suite=text        the U-Net of Stable Diffusion 1.5, against PyTorch (16 GB of memory)
python -m experiments.benchmark --suite=reliability the guard, the watchdog, the time meter and checkpoints

The suites `networks`, `data` and `text` need requirements-peers.txt and a checkout of the repository.
"""

import importlib
import importlib.util
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from diffusion.core.types import InputError
from diffusion.pipelines import benchmarks
from diffusion.profiling.timing import median_ratio
from experiments import cli

SUITES = ["loop", "sampling", "networks", "data", "text", "reliability"]
SUITE = flags.DEFINE_enum("suite", "loop", SUITES, "What to measure.")
RUNS = flags.DEFINE_integer("runs", 5, "Repetitions of each measurement; the median is printed.", lower_bound=1)

SAVE_EVERY = 100  # steps


def main() -> None:
    {
        "loop": lambda: print_pair(benchmarks.loop_overhead(RUNS.value), "s/step"),
        "sampling": sampling,
        "networks": lambda: peer_suites().networks(RUNS.value),
        "data": lambda: peer_suites().data(RUNS.value),
        "text": lambda: peer_suites().text(RUNS.value),
        "reliability": reliability,
    }[SUITE.value]()


def sampling() -> None:
    seconds = benchmarks.scan_overhead(RUNS.value)
    print(f"{'':18} ms/evaluation   ratio to bare calls")
    for name, values in seconds.items():
        ratio = median_ratio(values, seconds["bare calls"])
        print(f"{name:18} {1000 * statistics.median(values):13.2f}   {ratio:.3f}")
    print_pair(benchmarks.compile_time(RUNS.value), "s")
    settings, compilations = benchmarks.recompilations()
    print(f"{settings} settings of scale, interval, times, seed and labels: {compilations} compilation(s)")


def reliability() -> None:
    found = benchmarks.reliability(RUNS.value)
    print(f"step               {found.step:.3f} s, batch {benchmarks.CIFAR10_BATCH_SIZE}")
    print(f"guard              {100 * found.guard:.2f} % of a step")
    print(f"watchdog and meter {1e6 * found.monitoring:.0f} us per step: {100 * found.monitoring / found.step:.4f} %")
    share = found.save / (SAVE_EVERY * found.step)
    print(f"save of {found.megabytes:.0f} MB     blocks {found.save:.3f} s: {100 * share:.2f} % of {SAVE_EVERY} steps; "
          f"a step during the save takes {found.step_during_save / found.step:.2f} x")  # fmt: skip


def peer_suites() -> Any:
    """Returns the module with the suites that compare with PyTorch, which is not part of the library.

    Raises:
      InputError: The peers are not installed, or the job does not run in a checkout.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers")):
        problem = f"{SUITE.value} compares with PyTorch: pip install -r requirements-peers.txt"
        raise InputError("--suite", problem)
    if not os.path.isfile(os.path.join("tests", "peers", "speed.py")):
        raise InputError("--suite", f"{SUITE.value} needs the folder tests; run it from the root of a checkout")
    return importlib.import_module("tests.peers.speed")


def print_pair(seconds: Mapping[str, Sequence[float]], unit: str) -> None:
    """Prints the medians of two measurements, and the median ratio of the second to the first."""
    for name, values in seconds.items():
        print(f"{name:18} {statistics.median(values):.4f} {unit}")
    first, second = seconds.values()
    print(f"ratio              {median_ratio(second, first):.3f}")


if __name__ == "__main__":
    cli.run(main)
