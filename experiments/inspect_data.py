"""Shows what a config's data are, as training would get them: spec, values, a labelled sheet, images a second by stage.

python -m experiments.inspect_data --config=configs/digits.py [--out=data.png] [--num=48] [--all]
"""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion.core import files, images
from diffusion.core.build import build
from diffusion.core.progress import Progress
from diffusion.core.types import InputError, Source
from diffusion.data.pipeline import Batches
from diffusion.distributed import sharding
from diffusion.pipelines.build_training import training
from diffusion.pipelines.config import check_sections
from diffusion.pipelines.generator import check_numbers
from experiments import cli

CONFIG = cli.define_config()
OUT = flags.DEFINE_string("out", "data.png", "The sheet of examples.")
NUM = flags.DEFINE_integer("num", 48, "Examples on the sheet.")
ALL = flags.DEFINE_bool("all", False, "Read every example and list those that cannot be read.")
flags.mark_flags_as_required(["config"])

SECONDS = 2.0  # for each rate
BINS = 20
BARS = " ▁▂▃▄▅▆▇█"
LISTED = 10


def main() -> None:
    check_numbers(seed=0, num=NUM.value)
    config = CONFIG.value.to_dict()
    check_sections(config)
    keywords = training(config)
    source = build("data", config["data"], field="data")
    files.make_folder(os.path.dirname(os.path.abspath(OUT.value)), "--out")
    options = keywords["options"]

    def batches() -> Batches:
        return Batches(source, batch_size=options.batch_size, seed=config["seed"], workers=options.workers,
                       prefetch=options.prefetch)  # fmt: skip

    _print("data", f"{config['data']['name']}: {_described(source)}")
    _print("epoch", f"{len(source) / options.batch_size:,.1f} steps of {options.batch_size} examples")
    if ALL.value:
        _read_all(source)
    stream = batches()
    examples = list(itertools.islice(_examples(stream), max(NUM.value, 256)))
    stream.close()
    _values(np.concatenate([example["x"].ravel() for example in examples]))
    if source.spec.num_classes:
        counts = np.bincount([int(example["cond"]["label"]) for example in examples], minlength=source.spec.num_classes)
        _print("labels", f"{np.count_nonzero(counts)} of {len(counts)} among {len(examples)}, "
               f"{counts.min()} to {counts.max()} each")  # fmt: skip
    shown = examples[: NUM.value]
    sheet = images.captioned([example["x"] for example in shown], [_text(example, source) for example in shown])
    images.save_png(sheet, OUT.value)
    _rates(source, batches, sharding.by_example(keywords["mesh"]), options.batch_size)
    _print("sheet", OUT.value)


def _described(source: Source) -> str:
    spec = source.spec
    shapes = getattr(source, "shapes", (spec.shape[:-1],))
    sizes = " or ".join(" x ".join(map(str, (*shape, spec.shape[-1]))) for shape in shapes)
    parts = [
        f"{len(source):,} examples of {sizes}",
        f"{spec.num_classes} classes" if spec.num_classes else "no classes",
        "captions" if spec.captions else "no captions",
        f"raw values {spec.low:g} to {spec.high:g}",
    ]
    ignored = getattr(getattr(source, "index", None), "ignored", None)
    if ignored:
        kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in ignored.items())
        parts.append(f"ignored files: {kinds}")
    return ", ".join(parts)


def _read_all(source: Source) -> None:
    """Raises InputError if any example cannot be read, once it has named the first of them."""
    progress, bad = Progress("read", len(source)), 0
    for index in range(len(source)):
        try:
            bad += bool(source[index].get("skipped", False))
        except InputError as error:
            bad += 1
            if bad <= LISTED:
                _print("bad", error.problem)
        progress.update(index + 1, bad=bad)
    progress.close()
    if bad:
        raise InputError("data", f"{bad:,} of {len(source):,} examples cannot be read")
    _print("all", "every example can be read")


def _examples(stream: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for batch in stream:
        for index in range(len(batch["x"])):
            yield jax.tree.map(lambda leaf, index=index: leaf[index], batch)


def _values(values: np.ndarray) -> None:
    """The histogram of the values that the network is given."""
    counts, edges = np.histogram(values, BINS)
    bars = "".join(BARS[int(np.ceil(count / counts.max() * (len(BARS) - 1)))] for count in counts)
    _print("values", f"{edges[0]:+.2f} {bars} {edges[-1]:+.2f}  mean {values.mean():+.3f}, "
           f"deviation {values.std():.3f}")  # fmt: skip


def _text(example: dict[str, Any], source: Source) -> str:
    if "caption" in example:
        return str(example["caption"])
    if "label" not in example["cond"]:
        return ""
    label, names = int(example["cond"]["label"]), getattr(source, "class_names", ())
    return names[label] if names else str(label)


def _rates(source: Source, batches: Callable[[], Batches], place: Any, batch_size: int) -> None:
    order = np.random.default_rng(0).permutation(min(len(source), 1 << 20)).tolist()
    for name, rate in _stages(source, order).items():
        _print("images/s", f"{rate:10,.0f}  {name}, one thread")
    uses = {"in batches, read ahead": lambda batch: None, "on the devices": lambda batch: _placed(batch, place)}
    for name, use in uses.items():
        stream = batches()
        use(next(stream))
        rate = _rate(lambda use=use, stream=stream: use(next(stream))) * batch_size
        stream.close()
        _print("images/s", f"{rate:10,.0f}  {name}")


def _placed(batch: dict[str, Any], place: Any) -> None:
    jax.block_until_ready(sharding.to_global({"x": batch["x"], "cond": batch["cond"]}, place))


def _stages(source: Source, order: list[int]) -> dict[str, float]:
    """Examples a second of each stage alone, and of all together."""
    rates = {}
    if hasattr(source, "stages"):
        spent, done, until = [0.0] * len(source.stages), 0, time.perf_counter() + SECONDS
        for index in itertools.cycle(order):
            value = index
            for number, (_, function) in enumerate(source.stages):
                begin = time.perf_counter()
                value = function(value)
                spent[number] += time.perf_counter() - begin
            done += 1
            if time.perf_counter() > until:
                break
        rates = {name: done / seconds for (name, _), seconds in zip(source.stages, spent, strict=True)}
    numbers = itertools.cycle(order)
    return {**rates, "an example": _rate(lambda: source[next(numbers)])}


def _rate(function: Callable[[], Any]) -> float:
    """Calls a second."""
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() < begin + SECONDS:
        function()
        calls += 1
    return calls / (time.perf_counter() - begin)


def _print(name: str, text: str) -> None:
    print(f"{name:9}{text}")


if __name__ == "__main__":
    cli.run(main)
