"""Parts of parameter trees, selected by patterns on the paths of their leaves, and the digest of a tree."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion.core.types import InputError, Params

Matches = Callable[[str], bool]


def path_name(path: tuple) -> str:
    """Returns a path of a pytree as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Params) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts from values by path; the inverse of `by_path` for nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def matcher(patterns: Sequence[str], field: str) -> Matches:
    """Returns whether any of the regular expressions is found in a path.

    Raises:
      InputError: One of them is not a regular expression; the error names `field`.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise InputError(field, f"{pattern!r} is not a valid regular expression: {error}") from None
    return lambda path: any(pattern.search(path) for pattern in compiled)


def split(tree: Params, matches: Matches, parent: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the leaves of nested dicts whose paths match, and the others, each as nested dicts without empty ones."""
    selected, rest = {}, {}
    for name, value in tree.items():
        path = f"{parent}/{name}" if parent else name
        if isinstance(value, Mapping):
            for half, part in zip((selected, rest), split(value, matches, path), strict=True):
                if part:
                    half[name] = part
        else:
            (selected if matches(path) else rest)[name] = value
    return selected, rest


def merge(tree: Params, update: Params) -> dict[str, Any]:
    """Returns nested dicts with the leaves of both; where both have a leaf, it is that of `update`."""
    merged = dict(tree)
    for name, value in update.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def sha256(tree: Params, start: bytes = b"") -> str:
    """Returns the SHA-256 of `start` and of the paths, shapes and values of the leaves, in hexadecimal."""
    found = hashlib.sha256(start)
    for path, array in jax.tree.leaves_with_path(tree):
        found.update(f"{jax.tree_util.keystr(path)}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # bfloat16 has no buffer
    return found.hexdigest()
