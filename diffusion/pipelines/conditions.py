"""What samples are conditioned on: labels and other conditions, given or taken from the data."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from diffusion.core.types import Cond, InputError, Source, Spec


def conditions_of(
    spec: Spec, num: int, source: Callable[[], Source], labels: Sequence[int] | None = None, cond: Cond | None = None
) -> dict[str, Any]:
    """Returns the conditions of `num` samples, `[num, ...]` each.

    Args:
      spec: What the samples look like.
      num: Number of samples.
      source: Returns the data, from whose examples, in turn, come the conditions that are not given.
      labels: Classes, repeated in turn; all classes by default.
      cond: Other conditions by name, arrays or a `Text` with any number of values, repeated in turn.

    Raises:
      InputError: The data has no such class or condition.
    """
    given = dict(cond or {})
    for name in given:
        if name not in spec.conditions or name == "label":
            known = ", ".join(spec.conditions.keys() - {"label"}) or "there are none; use labels"
            raise InputError("cond", f"the model has no condition {name!r} in addition to labels; one of: {known}")
    missing = spec.conditions.keys() - {"label", *given}
    found = examples_of(source(), missing, num) if missing else {}
    found |= {name: _in_turn(value, num) for name, value in given.items()}
    labels = labels_for(spec.num_classes, num, labels)
    return found if labels is None else {**found, "label": labels}


def examples_of(source: Source, names: Collection[str], num: int) -> dict[str, Any]:
    """Returns the named conditions of a source's first `num` examples, `[num, ...]` each, in turn if it has fewer."""
    each = [source[index]["cond"] for index in range(min(num, len(source)))]
    found = jax.tree.map(lambda *values: np.stack(values), *({name: cond[name] for name in names} for cond in each))
    return _in_turn(found, num)


def labels_for(num_classes: int, num: int, labels: Sequence[int] | None) -> np.ndarray | None:
    """Returns the label of each of `num` samples, int32 `[num]`; None where the data has no classes.

    Args:
      labels: Classes, repeated in turn; all classes if None.

    Raises:
      InputError: The data has no classes, or no such class.
    """
    if not num_classes:
        if labels is not None and len(labels):
            raise InputError("labels", "the run's data has no classes; leave them out")
        return None
    if labels is None:
        return np.arange(num, dtype=np.int32) % num_classes
    if not len(labels) or any(not 0 <= label < num_classes for label in labels):
        raise InputError("labels", f"must be numbers from 0 to {num_classes - 1}, got {list(labels)}")
    return np.resize(np.asarray(labels, np.int32), num)


def _in_turn(values: Any, num: int) -> Any:
    """Repeats the rows of arrays `[n, ...]` in turn up to `num`."""
    return jax.tree.map(lambda value: np.take(value, np.arange(num) % len(value), axis=0), values)
