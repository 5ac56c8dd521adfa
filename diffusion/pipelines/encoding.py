"""Encodes a data set with an autoencoder and a text encoder once, so that training need not.

What is stored is the result of `Autoencoder.posterior`, from which every step draws its latents as if it had encoded
the images itself, and next to it the encoded captions.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion.core import files
from diffusion.core.arrays import scaled
from diffusion.core.build import changed
from diffusion.core.types import Array, ArraySpec, Autoencoder, InputError, Source, Text, TextEncoder
from diffusion.data import captions, records, text_records
from diffusion.data.pipeline import in_order, location_keywords
from diffusion.distributed import multihost

PLAN = "encoding.json"  # what is being encoded
SHARD_SIZE = 4096  # examples per shard, at most
MEASURED_AT_ONCE = 256  # examples of a shard whose latents are drawn with one key to measure them


class Mirrored:
    """A source followed by the mirror images of its examples: example N + i is example i mirrored left to right."""

    def __init__(self, source: Source):
        self.source, self.spec = source, source.spec

    def __len__(self) -> int:
        return 2 * len(self.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        is_mirrored, index = divmod(index, len(self.source))
        example = self.source[index]
        return {**example, "x": example["x"][:, ::-1]} if is_mirrored else example


def encode(
    source: Source,
    autoencoder: Autoencoder,
    folder: str,
    *,
    text_encoder: TextEncoder | None = None,
    data: Mapping[str, Any] | None = None,
    flip: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    shard_size: int = SHARD_SIZE,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Writes a source as an `array_record` data set of what `Autoencoder.posterior` returns.

    A call that was interrupted is continued by the same call: complete shards stay. The processes of a job share the
    work; process p writes every shard whose number is p modulo the number of processes. The files are the same bytes
    however often it was interrupted and however many processes there are.

    Args:
      source: The examples; without random augmentation.
      autoencoder: The autoencoder.
      folder: The folder to write.
      text_encoder: Encodes the captions of the source; None to store the captions themselves, if it has any.
      data: The section `data` of the config that describes the source. It is recorded without the options that say
        where the data lie, and a call with another one is refused.
      flip: Whether the mirror images, left to right, follow the examples.
      batch_size: Number of examples that are encoded at once. Compilers may sum in another order for another number, so
        that the results are the same bits as in a step if it has as many examples per device. A call that was
        interrupted is continued with the same number alone.
      workers: Number of processes that read the examples; 0 reads in threads.
      shard_size: Number of examples per shard.
      progress: Called with the number of examples that this process has written or found.

    Returns:
      What `info.json` says of the data set, with the number of examples as `count`, and in `latents` the `mean` and the
      standard deviation `std` of each channel of the latents that training draws, measured on all examples.

    Raises:
      InputError: There are no captions to encode, the folder holds something else, another job writes there, records
        cannot hold the examples, they are no images to mirror, or the autoencoder encodes one to numbers that are not
        finite.
    """
    records.check_fits(source)
    if flip and not source.spec.is_image:
        raise InputError("--flip", f"mirrors images, and the data are {source.spec.x.kind}; leave it out")
    images, source = len(source), Mirrored(source) if flip else source
    num = len(source)
    like = jax.ShapeDtypeStruct((1, *source.spec.shape), np.float32)
    shape = jax.eval_shape(autoencoder.posterior, autoencoder.params, like).shape[1:]
    stored = ArraySpec(shape, "latent", low=-1.0, high=1.0)
    decoded = records.describe(source, source.spec.x)
    decoded = {name: decoded[name] for name in ("shape", "kind", "low", "high", "dtype")}
    info = {**records.describe(source, stored), "encoder": autoencoder.digest, "decoded": decoded}
    if text_encoder is not None:
        if not source.spec.captions:
            raise InputError("data.captions", "must be True, as text_encoder reads captions; the data need them")
        texts = _TextBatches(text_encoder, batch_size)
        info["text"] = {"encoder": text_encoder.digest, **texts.about}
    data = {} if data is None else data
    plan = {
        "num": num, "flip": flip, "batch_size": batch_size, "shard_size": shard_size, "info": info,
        "data": {key: value for key, value in data.items() if key not in location_keywords(data)},
    }  # fmt: skip
    less = "lower data.length" if "length" in data else "write less"
    _start(folder, files.plain(plan), 4 * num * math.prod(shape), less)
    apply, place = jax.jit(autoencoder.posterior), jax.local_devices()[0]
    params = jax.device_put(autoencoder.params, place)

    def encoded(examples: Iterable[Mapping[str, Any]], start: int) -> Iterator[dict[str, Any]]:
        """Yields the examples from number `start` with x encoded, without those that are skipped."""
        readable = (pair for pair in enumerate(examples, start) if not pair[1].get("skipped", False))
        while pending := list(itertools.islice(readable, batch_size)):
            x = scaled(np.stack([example["x"] for _, example in pending]))
            padded = np.concatenate([x, np.repeat(x[-1:], batch_size - len(x), axis=0)])  # one compiled size
            moments = np.asarray(apply(params, jax.device_put(padded, place)))
            if text_encoder is not None:
                encoded_texts = texts([captions.captions_of(example) for _, example in pending])
            for (index, example), found in zip(pending, moments, strict=False):
                if not np.isfinite(found).all():
                    name = f"example {index % images}" + (", mirrored," if index >= images else "")
                    problem = f"encodes {name} of the data to numbers that are not finite"
                    raise InputError("autoencoder", f"{problem} (SHA-256 {autoencoder.digest[:12]}...); use another, "
                                     "in float32, or leave the example out")  # fmt: skip
                pending_texts = {"texts": next(encoded_texts)} if text_encoder is not None else {}
                yield {**example, "x": found, **pending_texts}

    shards = [records.shard_path(folder, number) for number in range(-(-num // shard_size))]
    sums, done = np.zeros((len(shards), 3, autoencoder.shape[-1])), 0
    sample, key = jax.jit(autoencoder.sample), jax.random.key(0)
    with multihost.locked(folder, "--out", remove=True):
        for number in range(jax.process_index(), len(shards), jax.process_count()):
            start, stop = number * shard_size, min((number + 1) * shard_size, num)
            if not os.path.exists(shards[number]):
                examples = encoded(in_order(source, stop, start=start, workers=workers), start)
                with files.writing(folder, "--out"):
                    records.write_shard(folder, number, examples, np.dtype(np.float32))
            if os.path.exists(shards[number]):  # it does not if all of its examples are skipped
                moments = records.read_shard(shards[number], shape)
                sums[number] = _sums(moments, sample, jax.random.fold_in(key, number))
            done += stop - start
            progress(done)
        multihost.wait_for_all("all shards are written")
        count, total, squares = multihost.summed(sums).sum(axis=0)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        info |= {"count": int(count[0]) // math.prod(autoencoder.shape[:-1]), "latents": {"mean": mean, "std": std}}
        if files.writes():
            records.write_info(folder, info)
    return info


class _TextBatches:
    """Encodes captions in batches of one compiled size."""

    def __init__(self, encoder: TextEncoder, size: int):
        self.encoder, self.size, self.place = encoder, size, jax.local_devices()[0]
        self.apply, self.params = jax.jit(encoder.encode), jax.device_put(encoder.params, self.place)
        self.about = text_records.describe(jax.eval_shape(self.apply, self.params, encoder.tokenize([""])))

    def __call__(self, examples: Sequence[Sequence[str]]) -> Iterator[list[Text]]:
        """Yields the encoded captions of each example, from its captions."""
        encoded = self._each(list(itertools.chain.from_iterable(examples)))
        for given in examples:
            yield list(itertools.islice(encoded, len(given)))

    def _each(self, every: Sequence[str]) -> Iterator[Text]:
        for start in range(0, len(every), self.size):
            chunk = list(every[start : start + self.size])
            tokens = self.encoder.tokenize(chunk + [""] * (self.size - len(chunk)))
            text = jax.tree.map(np.asarray, self.apply(self.params, jax.device_put(tokens, self.place)))
            for row in range(len(chunk)):
                yield jax.tree.map(lambda array, row=row: array[row], text)


def _sums(moments: Iterator[np.ndarray], sample: Callable[[Array, Array], Array], key: Array) -> np.ndarray:
    """Draws latents, and returns for each channel the count, the sum and the sum of squares of their values, `[3, C]`.

    They are float64, and depend on the moments and the key alone.
    """
    sums = 0
    while chunk := list(itertools.islice(moments, MEASURED_AT_ONCE)):
        key, key_sample = jax.random.split(key)
        z = np.asarray(sample(np.stack(chunk), key_sample), np.float64)
        z = z.reshape(-1, z.shape[-1])
        sums += np.stack([np.full(z.shape[-1], len(z)), z.sum(axis=0), (z**2).sum(axis=0)])
    return sums


def _start(folder: str, plan: Mapping[str, Any], size: int, less: str) -> None:
    """Makes the folder for `size` bytes, or checks that an earlier call with the same plan has made it.

    Args:
      less: See `files.make_folder`.
    """
    path = os.path.join(folder, PLAN)
    if os.path.isdir(folder) and not all(name.endswith(".partial") for name in os.listdir(folder)):
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or found.keys() != plan.keys():
            raise InputError("--out", f"{folder} holds other files; remove it or give another folder")
        if problem := _difference(found, plan):
            raise InputError("--out", f"{folder} {problem}; change that back, or give another folder")
    multihost.wait_for_all("the folder is checked")
    if files.writes() and not os.path.exists(path):
        files.make_folder(folder, "--out", size, less)
        files.write_json(path, plan)
    multihost.wait_for_all("the folder is made")


def _difference(found: Mapping[str, Any], plan: Mapping[str, Any]) -> str | None:
    """Returns in words how the plan of what a folder holds differs from a plan, or None."""
    option = changed(found["data"], plan["data"])
    if option is not None:
        values = f"{plan['data'].get(option)!r}, was {found['data'].get(option)!r}"
        return f"holds latents of other data (data.{option} is {values})"
    encoders = [which["info"]["encoder"] for which in (found, plan)]
    if encoders[0] != encoders[1]:
        return f"holds latents of another autoencoder (SHA-256 {encoders[0][:12]}..., got {encoders[1][:12]}...)"
    encoders = [which["info"].get("text", {}).get("encoder", "") for which in (found, plan)]
    if encoders[0] != encoders[1]:
        return f"holds texts of another text encoder (SHA-256 {encoders[0][:12]}..., got {encoders[1][:12]}...)"
    for name in ("batch_size", "flip"):
        if found[name] != plan[name]:
            values = [json.dumps(which[name]) for which in (found, plan)]
            return f"was encoded with --{name}={values[0]}, got --{name}={values[1]}"
    if found["num"] != plan["num"]:
        return f"holds latents of other data ({found['num']:,} images, got {plan['num']:,})"
    if any(found[name] != plan[name] for name in ("info", "shard_size")):
        return "holds latents of other data (another shape, other classes, captions or shards)"
    return None
