"""Helpers shared by the tests of `shapes` and `moving_shapes`."""

import hashlib

import numpy as np


def examples(source, num):
    """Returns the first examples, `[num, ...]`, and the things in each."""
    x = np.stack([source[index]["x"] for index in range(num)])
    return x, [frozenset(source.things(index)) for index in range(num)]


def share_read(source, x, truth):
    """Returns the share of `x` whose things are all found."""
    found, _ = source.closest(x.astype(np.float32))
    return np.mean([things == other for things, other in zip(found, truth, strict=True)])


def digest(source):
    """Returns the SHA-256 of the first 100 examples and their captions."""
    total = hashlib.sha256()
    for index in range(100):
        example = source[index]
        total.update(example["x"].astype("<f4").tobytes() + example["caption"].encode())
    return total.hexdigest()


def parse(text, phrases):
    """Returns the things of a caption, given the thing of each phrase."""
    return frozenset(phrases[phrase] for phrase in text.replace(" and ", ", ").split(", "))
