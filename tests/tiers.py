"""Assigns the cases of a test to `make test` or `make slow`."""

from collections.abc import Callable, Container, Iterable, Iterator

import pytest


def slow_except(default: Container | Callable[..., bool], cases: Iterable) -> Iterator:
    """Yields the cases of a matrix for `pytest.mark.parametrize`. All are marked slow but those of the default tier.

    Args:
      default: The cases that `make test` runs, or a function that returns whether it runs a case.
      cases: All cases. A tuple has one value per parameter of the test.
    """
    is_default = default if callable(default) else default.__contains__
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        yield pytest.param(*values, marks=() if is_default(case) else pytest.mark.slow)


def first_of_each(key: Callable, cases: Iterable) -> list:
    """Returns the first case of each value of `key(case)`."""
    found: dict = {}
    for case in cases:
        found.setdefault(key(case), case)
    return list(found.values())
