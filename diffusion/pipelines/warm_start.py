"""Warm starts: which arrays of a trained run another run starts with."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from diffusion.core import trees
from diffusion.core.types import InputError, Params

MOST_NAMED = 8  # arrays that a message names
NEW = "new"  # why an array has none to start from, other than by its shape

logger = logging.getLogger(__name__)


def parse(init_from: str) -> tuple[str, str | None, str]:
    """Returns the workdir, the average and the expression of `WORKDIR[:EMA[:EXPRESSION]]`.

    The average is None for the run's own choice, and the expression is empty for all arrays.
    """
    workdir, ema, expression = (*re.split(r":(?!//)", init_from, maxsplit=2), "", "")[:3]
    return workdir, ema or None, expression


def matching(
    params: Mapping[str, Params], source: Mapping[str, Params], expression: str = "", base: str | None = None
) -> tuple[dict[str, Params], dict[str, str]]:
    """Finds the arrays to start with.

    Args:
      params: The networks of the run that starts, arrays or shapes.
      source: The networks of the trained run.
      expression: A regular expression; arrays in whose paths it is not found are left out.
      base: See `Network.base`: where an adapted network has the parameters of the network itself.

    Returns:
      The arrays of `source` in nested dicts by their paths in `params`, and the paths in `params` that have none, each
      with the reason.
    """
    wanted, given = trees.matcher([expression], "init_from"), trees.by_path(dict(source))
    found, missing = {}, {}
    for path, leaf in trees.by_path(dict(params)).items():
        theirs = path
        if base and path.startswith(f"net/{base}/") and path not in given:
            theirs = "net/" + path.removeprefix(f"net/{base}/")
        if theirs not in given or not wanted(theirs):
            missing[path] = NEW
        elif given[theirs].shape != leaf.shape:
            missing[path] = f"{list(leaf.shape)}, not {list(given[theirs].shape)}"
        else:
            found[path] = given[theirs]
    return trees.nest(found), missing


def report(
    config: Mapping[str, Any], source: Mapping[str, Any], found: Mapping[str, Params], missing: Mapping[str, str]
) -> None:
    """Logs what a run starts with, and warns where the other run learned something else.

    Args:
      config, source: The configs of the run that starts and of the trained one.
      found, missing: From `matching`.

    Raises:
      InputError: No array fits.
    """
    count = len(trees.by_path(dict(found)))
    if not count:
        problem = _named([f"{path} ({reason})" for path, reason in missing.items()])
        raise InputError("init_from", f"no array of the run fits: {problem}; use its network section")
    new = [path for path, reason in missing.items() if reason == NEW]
    others = [f"{path} ({reason})" for path, reason in missing.items() if reason != NEW]
    rest = f"; not taken over: {_named(others)}" if others else ""
    rest += f"; new: {_named(new)}" if new else ""
    logger.info("%s of %s arrays start from %s%s", count, count + len(missing), config["init_from"], rest)
    for key in ("schedule", "parameterization"):
        ours, theirs = (section["objective"].get(key) for section in (config, source))
        if ours != theirs:
            logger.warning("objective.%s differs from that of the run to start from, so the network has to learn "
                           "another output: %s, not %s", key, ours, theirs)  # fmt: skip


def _named(arrays: list[str]) -> str:
    """Returns the first names of a list, and the number of the others."""
    more = f" and {len(arrays) - MOST_NAMED} more" if len(arrays) > MOST_NAMED else ""
    return ", ".join(arrays[:MOST_NAMED]) + more
