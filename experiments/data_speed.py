"""How fast data are read: a folder of photographs beside PyTorch's loader with Pillow, our own records beside the
folder, and training fed by them beside training on one batch again and again.

`experiments.benchmark --suite=data` is where it is started.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion.core.build import build
from diffusion.core.types import InputError, Source
from diffusion.data.pipeline import Batches
from diffusion.data.sources import array_record
from experiments import peer_speed

SIDE, SIZE, FILES, QUALITY = 512, 64, 512, 90
BATCH_SIZE, BATCHES, WORKERS, PREFETCH = 64, 40, 2, 2
NETWORK, STEPS = "DDPM U-Net, 32x32x3", 3
MANY, TOPS = 200_000, 200
TINY = b"not read here"


def data(runs: int) -> None:
    """Prints a table of rates, and the share of a train step that its data cost."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError("--suite", "data compares with PyTorch: pip install -r requirements-peers.txt") from None
    with tempfile.TemporaryDirectory() as folder:
        photographs, records = os.path.join(folder, "photographs"), os.path.join(folder, "records")
        write_photographs(photographs)
        source = build("data", {"name": "folder", "path": photographs, "size": SIZE})
        array_record.write(source, (source[index] for index in range(len(source))), records)
        prepared = build("data", {"name": "array_record", "path": records})
        gap = max(np.abs(source[index]["x"] - _Theirs(source)[index][0]).max() for index in range(8))
        print(f"{SIDE} x {SIDE} JPEGs, batches of {BATCH_SIZE} at {SIZE} x {SIZE}; images differ by {gap:.0e}")
        rates = {}
        for workers in (0, WORKERS):
            sides = {
                f"folder, ours, {workers} workers": lambda workers=workers: ours(source, workers),
                f"folder, PyTorch's, {workers} workers": lambda workers=workers: theirs(source, workers),
                f"array_record, {workers} workers": lambda workers=workers: ours(prepared, workers),
            }
            rates |= {name: [] for name in sides}
            for _, (name, side) in itertools.product(range(runs), sides.items()):
                rates[name].append(rate(side()))
        for name, values in rates.items():
            print(f"{name:34} {statistics.median(values):8,.0f} images/s")
        for workers in (0, WORKERS):
            read, peer, record = (
                rates[f"{name}, {workers} workers"] for name in ("folder, ours", "folder, PyTorch's", "array_record")
            )
            print(f"{workers} workers: ours / PyTorch's {ratio(read, peer):.2f}, "
                  f"array_record / folder {ratio(record, read):.1f}")  # fmt: skip
        training(photographs, runs)
        indexing(os.path.join(folder, "many"))


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median over runs made in turn."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def write_photographs(folder: str) -> None:
    """Files of about 90 kB, as a camera's are at this size: smooth, with noise."""
    rng = np.random.default_rng(0)
    os.makedirs(os.path.join(folder, "all"))
    for index in range(FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        pixels = (smooth + rng.normal(0, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(os.path.join(folder, "all", f"{index}.jpg"), quality=QUALITY)


def rate(stream: Iterator[int]) -> float:
    """Images a second after the first batch, with which processes have started."""
    next(stream)
    begin = time.perf_counter()
    count = sum(itertools.islice(stream, BATCHES))
    seconds = time.perf_counter() - begin
    stream.close()
    return count / seconds


def ours(source: Source, workers: int) -> Iterator[int]:
    stream = Batches(source, batch_size=BATCH_SIZE, seed=0, workers=workers, prefetch=PREFETCH)
    try:
        for batch in stream:
            yield len(batch["x"])
    finally:
        stream.close()


def theirs(source: Source, workers: int) -> Iterator[int]:
    from torch.utils.data import DataLoader

    loader = DataLoader(
        _Theirs(source), BATCH_SIZE, shuffle=True, num_workers=workers, drop_last=True,
        prefetch_factor=PREFETCH if workers else None, persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        for x, _ in loader:
            yield len(x)


class _Theirs:
    """The same images in the way that guided-diffusion reads them, with Pillow alone."""

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
        return pixels.astype(np.float32) / 127.5 - 1, self.labels[index]


def training(photographs: str, runs: int) -> None:
    """A train step of the CIFAR-10 U-Net on batches that are read, against the same on one that is there."""
    case = peer_speed.CASES[NETWORK]
    source = build("data", {"name": "folder", "path": photographs, "size": case.spec.shape[0], "labels": False})
    records = photographs + "_small"
    array_record.write(source, (source[index] for index in range(len(source))), records)
    sources = {"folder": source, "array_record": build("data", {"name": "array_record", "path": records})}
    streams = {name: Batches(read, batch_size=peer_speed.BATCH_SIZE, seed=0) for name, read in sources.items()}
    sides = {"synthetic": peer_speed.our_step(case)}
    sides |= {name: peer_speed.our_step(case, batches=stream) for name, stream in streams.items()}
    seconds = peer_speed.in_turn(sides, runs * STEPS)
    for stream in streams.values():
        stream.close()
    for name in streams:
        share = ratio(seconds[name], seconds["synthetic"])
        print(f"a train step of {NETWORK} fed by {name} / on one batch: {share:.3f}")


def indexing(folder: str) -> None:
    """What the list of many small files costs to make, to start from and to hold."""
    for top in range(TOPS):
        os.makedirs(os.path.join(folder, f"class {top:03}"))
        for number in range(MANY // TOPS):
            with open(os.path.join(folder, f"class {top:03}", f"image {number:05}.png"), "wb") as file:
                file.write(TINY)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        source = build("data", {"name": "folder", "path": folder, "size": 8})
        seconds.append(time.perf_counter() - begin)
    before = resident()
    for index in range(len(source)):
        source.index.path(index), source.index.labels[index]
    each = (resident() - before) / len(source)
    print(f"{len(source):,} files: listed in {seconds[0]:.1f} s, started from the list in {seconds[1]:.2f} s, "
          f"{each:.0f} bytes of memory each once all are touched")  # fmt: skip


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
