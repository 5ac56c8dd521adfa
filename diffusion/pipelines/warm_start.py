"""Warm starts: which arrays of a trained run another run starts with."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from diffusion.core import trees
from diffusion.core.types import InputError, Params

MOST_NAMED = 8  # arrays that a message names

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
            missing[path] = "new"
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
    named = ", ".join(f"{path} ({reason})" for path, reason in list(missing.items())[:MOST_NAMED])
    more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
    if not count:
        raise InputError("init_from", f"no array of the run fits: {named}{more}; use its network section")
    rest = f"; not taken over: {named}{more}" if missing else ""
    logger.info("%s of %s arrays start from %s%s", count, count + len(missing), config["init_from"], rest)
    for key in ("schedule", "parameterization"):
        ours, theirs = (section["objective"].get(key) for section in (config, source))
        if ours != theirs:
            logger.warning("objective.%s differs from that of the run to start from, so the network has to learn "
                           "another output: %s, not %s", key, ours, theirs)  # fmt: skip
