"""Encodes a data set with an autoencoder once, so that training reads its latents."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from diffusion.core import files
from diffusion.core.arrays import scaled
from diffusion.core.types import ArraySpec, Autoencoder, InputError, Source
from diffusion.data import records
from diffusion.data.pipeline import in_order
from diffusion.distributed import multihost

PLAN = "encoding.json"  # what is being encoded; in a folder that is not finished
SHARD_SIZE = 4096  # examples per shard, at most


def encode(
    source: Source,
    autoencoder: Autoencoder,
    folder: str,
    *,
    batch_size: int = 256,
    workers: int = 0,
    shard_size: int = SHARD_SIZE,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Writes the latents of a source as an `array_record` data set.

    A call that was interrupted is continued by the same call: complete shards stay. Several processes may share the
    work; process p writes every shard whose number is p modulo the number of processes.

    Args:
      source: The examples; without random augmentation.
      autoencoder: The autoencoder; a variational one encodes to its mean.
      folder: The folder to write.
      batch_size: Number of examples that are encoded at once.
      workers: Number of processes that read the examples; 0 reads in threads.
      shard_size: Number of examples per shard.
      process, processes: The index of this process, and the number of processes.
      progress: Called with the number of examples that this process has written or found.

    Returns:
      The number of examples in the data set.

    Raises:
      InputError: The folder holds something else, another job writes there, or records cannot hold the examples.
    """
    records.check_fits(source)
    num = len(source)
    latents = ArraySpec(autoencoder.shape, "latent", low=-1.0, high=1.0)
    decoded = records.describe(source, source.spec.x)
    decoded = {name: decoded[name] for name in ("shape", "kind", "low", "high", "dtype")}
    plan = {**records.describe(source, latents), "encoder": autoencoder.digest, "decoded": decoded}
    plan = files.plain({"num": num, "shard_size": shard_size, "info": plan})
    _start(folder, plan, 4 * num * math.prod(autoencoder.shape))
    apply, place = jax.jit(autoencoder.encode), jax.local_devices()[0]
    params = jax.device_put(autoencoder.params, place)

    def latents_of(examples: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        pending: list[Mapping[str, Any]] = []

        def flush() -> Iterator[dict[str, Any]]:
            x = scaled(np.stack([example["x"] for example in pending]))
            padded = np.concatenate([x, np.repeat(x[-1:], batch_size - len(x), axis=0)])  # one compiled size
            z = np.asarray(apply(params, jax.device_put(padded, place), None))
            for example, latent in zip(pending, z, strict=False):
                yield {**example, "x": latent}
            pending.clear()

        for example in examples:
            if not example.get("skipped", False):
                pending.append(example)
            if len(pending) == batch_size:
                yield from flush()
        if pending:
            yield from flush()

    done, mine = 0, range(process, -(-num // shard_size), processes)
    with multihost.locked(folder, "--out", remove=True):
        for number in mine:
            start, stop = number * shard_size, min((number + 1) * shard_size, num)
            if not os.path.exists(records.shard_path(folder, number)):
                examples = in_order(source, stop, start=start, workers=workers)
                with files.writing(folder, "--out"):
                    records.write_shard(folder, number, latents_of(examples), np.dtype(np.float32))
            done += stop - start
            progress(done)
        multihost.wait_for_all("all shards are written")
        shards = [records.shard_path(folder, number) for number in range(-(-num // shard_size))]
        count = len(ArrayRecordDataSource([shard for shard in shards if os.path.exists(shard)]))
        if files.writes():
            records.write_info(folder, {**plan["info"], "count": count})
    return count


def check_source(source: Source, autoencoder: Autoencoder | None) -> None:
    """Checks that latents that were encoded in advance are those of the config's autoencoder.

    Raises:
      InputError: They are those of another one, or the config has none.
    """
    encoder = getattr(source, "encoder", None)
    if encoder is None:
        return
    if autoencoder is None:
        problem = "is missing, and the data are latents; set the autoencoder that they were encoded with"
        raise InputError("autoencoder", problem)
    if encoder != autoencoder.digest:
        problem = "is not the autoencoder that the data were encoded with; encode them again"
        raise InputError("autoencoder.path", f"{problem} (SHA-256 {encoder[:12]}..., got {autoencoder.digest[:12]}...)")


def _start(folder: str, plan: Mapping[str, Any], size: int) -> None:
    """Makes the folder for `size` bytes, or checks that an earlier call with the same plan has made it."""
    path = os.path.join(folder, PLAN)
    if os.path.isdir(folder) and os.listdir(folder):
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            found = None
        if found != plan:
            problem = "holds other files, or latents of other data or of another autoencoder"
            raise InputError("--out", f"{folder} {problem}; remove it or give another folder")
    multihost.wait_for_all("the folder is checked")
    if files.writes() and not os.path.exists(path):
        files.make_folder(folder, "--out", size)
        files.write_json(path, plan)
    multihost.wait_for_all("the folder is made")
