"""Times reading images: a folder of photographs against PyTorch's loader with Pillow, prepared records against the
folder, and training on these images against training on one batch.

`python -m experiments.benchmark --suite=data` runs it, from a checkout with requirements-peers.txt installed.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from diffusion.core.build import build
from diffusion.core.types import Source
from diffusion.data.pipeline import Batches
from diffusion.data.records import write
from diffusion.profiling.timing import median_ratio, time_alternately
from tests.peers import speed

SIDE, SIZE, FILES, QUALITY = 512, 64, 512, 90
BATCH_SIZE, BATCHES, WORKERS, PREFETCH = 64, 40, 2, 2
NETWORK, STEPS = "DDPM U-Net, 32x32x3", 3
MANY_FILES, FOLDERS = 200_000, 200


def data(runs: int) -> None:
    """Prints the rates of reading images, and how much a train step slows down by reading its data."""
    with tempfile.TemporaryDirectory() as folder:
        photographs, records = os.path.join(folder, "photographs"), os.path.join(folder, "records")
        write_photographs(photographs)
        source = build("data", {"name": "folder", "path": photographs, "size": SIZE})
        write(source, (source[index] for index in range(len(source))), records)
        prepared = build("data", {"name": "array_record", "path": records})
        difference = max(
            np.abs(source[index]["x"].astype(int) - PillowDataset(source)[index][0]).max() for index in range(8)
        )
        print(f"{SIDE} x {SIDE} JPEGs, batches of {BATCH_SIZE} at {SIZE} x {SIZE}; images differ by {difference:.0e}")
        rates = {}
        for workers in (0, WORKERS):
            sides = {
                f"folder, ours, {workers} workers": lambda workers=workers: our_batches(source, workers),
                f"folder, PyTorch's, {workers} workers": lambda workers=workers: their_batches(source, workers),
                f"array_record, {workers} workers": lambda workers=workers: our_batches(prepared, workers),
            }
            rates |= {name: [] for name in sides}
            for _, (name, side) in itertools.product(range(runs), sides.items()):
                rates[name].append(rate(side()))
        for name, values in rates.items():
            print(f"{name:34} {statistics.median(values):8,.0f} images/s")
        for workers in (0, WORKERS):
            ours, theirs, record = (
                rates[f"{name}, {workers} workers"] for name in ("folder, ours", "folder, PyTorch's", "array_record")
            )
            print(f"{workers} workers: ours / PyTorch's {median_ratio(ours, theirs):.2f}, "
                  f"array_record / folder {median_ratio(record, ours):.1f}")  # fmt: skip
        training(photographs, runs)
        indexing(os.path.join(folder, "many"))


def write_photographs(folder: str) -> None:
    """Writes files of about 90 kB, the size of a camera's at this resolution: smooth images with noise."""
    rng = np.random.default_rng(0)
    os.makedirs(os.path.join(folder, "all"))
    for index in range(FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        pixels = (smooth + rng.normal(0, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(os.path.join(folder, "all", f"{index}.jpg"), quality=QUALITY)


def rate(stream: Iterator[int]) -> float:
    """Returns the images per second of a stream of batch sizes; the first batch, which starts workers, does not
    count."""
    next(stream)
    begin = time.perf_counter()
    count = sum(itertools.islice(stream, BATCHES))
    seconds = time.perf_counter() - begin
    stream.close()
    return count / seconds


def our_batches(source: Source, workers: int) -> Iterator[int]:
    """Yields the sizes of our batches."""
    stream = Batches(source, batch_size=BATCH_SIZE, seed=0, workers=workers, prefetch=PREFETCH)
    try:
        for batch in stream:
            yield len(batch["x"])
    finally:
        stream.close()


def their_batches(source: Source, workers: int) -> Iterator[int]:
    """Yields the sizes of PyTorch's batches."""
    loader = DataLoader(
        PillowDataset(source), BATCH_SIZE, shuffle=True, num_workers=workers, drop_last=True,
        prefetch_factor=PREFETCH if workers else None, persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        for x, _ in loader:
            yield len(x)


class PillowDataset:
    """The images of a folder source, read as in guided-diffusion with Pillow alone."""

    def __init__(self, source: Source):
        self.files = [source.index.path(index) for index in range(len(source))]
        self.labels = np.array(source.index.labels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        image = Image.open(self.files[index]).convert("RGB")
        while min(image.size) >= 2 * SIZE:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = SIZE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        pixels = np.array(image)
        top, left = (pixels.shape[0] - SIZE) // 2, (pixels.shape[1] - SIZE) // 2
        pixels = pixels[top : top + SIZE, left : left + SIZE]
        return pixels, self.labels[index]


def training(photographs: str, runs: int) -> None:
    """Prints the time of a train step of the CIFAR-10 U-Net on batches that are read, relative to one on a constant
    batch."""
    case = speed.CASES[NETWORK]
    source = build("data", {"name": "folder", "path": photographs, "size": case.spec.shape[0], "labels": False})
    records = photographs + "_small"
    write(source, (source[index] for index in range(len(source))), records)
    sources = {"folder": source, "array_record": build("data", {"name": "array_record", "path": records})}
    streams = {name: Batches(read, batch_size=speed.BATCH_SIZE, seed=0) for name, read in sources.items()}
    sides = {"synthetic": speed.our_step(case)}
    sides |= {name: speed.our_step(case, batches=stream) for name, stream in streams.items()}
    seconds = time_alternately(sides, runs * STEPS)
    for stream in streams.values():
        stream.close()
    for name in streams:
        ratio = median_ratio(seconds[name], seconds["synthetic"])
        print(f"a train step of {NETWORK} on batches of {name} / on one batch: {ratio:.3f}")


def indexing(folder: str) -> None:
    """Prints what the list of many small files costs to build, to reload and to hold in memory."""
    for top in range(FOLDERS):
        os.makedirs(os.path.join(folder, f"class {top:03}"))
        for number in range(MANY_FILES // FOLDERS):
            with open(os.path.join(folder, f"class {top:03}", f"image {number:05}.png"), "wb") as file:
                file.write(b"not read")
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        source = build("data", {"name": "folder", "path": folder, "size": 8})
        seconds.append(time.perf_counter() - begin)
    before = resident_memory()
    for index in range(len(source)):
        source.index.path(index), source.index.labels[index]
    per_file = (resident_memory() - before) / len(source)
    print(f"{len(source):,} files: listed in {seconds[0]:.1f} s, reloaded from the list in {seconds[1]:.2f} s, "
          f"{per_file:.0f} bytes of memory per file once all entries have been read")  # fmt: skip


def resident_memory() -> int:
    """Returns the resident memory of this process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
