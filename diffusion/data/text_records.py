"""Encoded texts as bytes, of which the vectors of padding are left out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  # so that NumPy knows bfloat16
import numpy as np

from diffusion.core.types import Text


def describe(text: Text) -> dict[str, Any]:
    """Returns what `unpacked` needs to know of texts like this one, `[N, ...]`, JSON-able."""
    pooled = 0 if text.pooled is None else text.pooled.shape[-1]
    return {"shape": list(text.tokens.shape[1:]), "pooled": pooled, "dtype": str(np.dtype(text.tokens.dtype))}


def packed(texts: Sequence[Text]) -> bytes:
    """Returns the texts of one example, each without a leading axis, as bytes."""
    parts = [len(texts).to_bytes(2, "little")]
    for text in texts:
        tokens, mask = np.asarray(text.tokens), np.asarray(text.mask)
        parts += [np.packbits(mask).tobytes(), tokens[mask].tobytes()]
        if text.pooled is not None:
            parts.append(np.asarray(text.pooled, tokens.dtype).tobytes())
    return b"".join(parts)


def unpacked(record: bytes, start: int, about: Mapping[str, Any]) -> tuple[list[Text], int]:
    """Returns the texts that begin at byte `start` of a record, and where they end. The vectors of padding are 0.

    Args:
      about: What `describe` returned.
    """
    (length, width), dtype, texts = about["shape"], np.dtype(about["dtype"]), []
    count, start = int.from_bytes(record[start : start + 2], "little"), start + 2

    def read(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nonlocal start
        array = np.frombuffer(record, dtype, math.prod(shape), start).reshape(shape)
        start += array.nbytes
        return array

    for _ in range(count):
        mask = np.unpackbits(read((-(-length // 8),), np.dtype(np.uint8)), count=length).astype(bool)
        tokens = np.zeros((length, width), dtype)
        tokens[mask] = read((int(mask.sum()), width), dtype)
        texts.append(Text(tokens, mask, read((about["pooled"],), dtype) if about["pooled"] else None))
    return texts, start
