"""Checkpoints: the only file that knows Orbax.

A checkpoint of step n lies in `<workdir>/checkpoints/<n>` and has four items: `params`, `ema` and `optimizer` (together
the train state) and `about`, JSON: the format, the run's `meta` (the resolved config, the data's spec), the position in
the data, the kind and a digest of every array, and a hash of all this. So whatever is read is what was written, or is
known not to be. Sampling reads `about` and the parameters or one of their averages.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from diffusion.core import files
from diffusion.core.types import Array, InputError
from diffusion.distributed import multihost
from diffusion.distributed.sharding import path_name
from diffusion.training.state import TrainState

FORMAT = 2
DAMAGED = "damaged"  # folder beside `checkpoints` that holds what is set aside
T = TypeVar("T")


class Damaged(InputError):
    """A checkpoint that does not hold what was saved."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept; those of any of the rules are.

    Attributes:
      newest: how many of the newest.
      every: those of steps divisible by it; None for none.
      best: name of a metric, of whose lowest value's checkpoint is kept; None for none.
    """

    newest: int = 3
    every: int | None = None
    best: str | None = None


class Checkpoints:
    """The checkpoints of one workdir, a local path or one such as `gs://bucket/run`.

    Args:
      workdir: the run's folder.
      retention: which are kept.
      read_only: for jobs that only read; nothing is created or removed.
    """

    def __init__(self, workdir: str, *, retention: Retention = Retention(), read_only: bool = False):
        self.workdir = epath.Path(workdir)
        self.retention, self.manager = retention, None
        folder = self.workdir / "checkpoints"
        if read_only and not multihost.agreed(files.is_folder(folder, "workdir")):
            return
        policies = [preservation.LatestN(retention.newest)]
        if retention.every:
            policies.append(preservation.EveryNSteps(retention.every))
        lowest = None
        if retention.best:
            lowest = operator.itemgetter(retention.best)
            policies.append(preservation.BestN(get_metric_fn=lowest, reverse=True, n=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else preservation.AnyPreservationPolicy(policies),
            best_fn=lowest, create=not read_only, read_only=read_only,
        )  # fmt: skip
        handlers = {name: ocp.PyTreeCheckpointHandler() for name in ("params", "ema", "optimizer")}
        handlers["about"] = ocp.JsonCheckpointHandler()
        try:
            self.manager = ocp.CheckpointManager(_absolute(folder), options=options, item_handlers=handlers)
        except (ValueError, TypeError, KeyError) as error:  # it reads each checkpoint's _CHECKPOINT_METADATA
            problem = f"{folder} has a checkpoint whose metadata is damaged ({_reason(error)}); move it away"
            raise InputError("workdir", problem) from error

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """All committed steps, rising."""
        return [] if self.manager is None else sorted(self.manager.all_steps())

    def save(
        self, step: int, state: TrainState, position: Mapping, meta: Mapping, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts saving and returns once the state is copied, so that it may be donated. A step is saved once.

        Args:
          step: the state's own.
          position: of the data, JSON-able.
          meta: JSON-able.
          metrics: of the step, for `Retention.best`.
        """
        self.wait()
        if step in self.steps():
            return
        trees = _split(state)
        about = {"format": FORMAT, "meta": meta, "position": position, "arrays": _described(trees)}
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        items["about"] = ocp.args.JsonSave({**about, "sha256": _hash(about)})
        best = self.retention.best
        if best and best not in (metrics or {}):
            raise InputError("checkpoint.best", f"the run has no metric {best!r}; one of: {', '.join(metrics or {})}")
        folder = str(self.manager.directory)
        if not files.is_remote(folder) and not os.path.isdir(folder):
            raise InputError("workdir", f"{folder} was removed while the run was writing to it")  # and comes not back
        with self._saving():
            self.manager.save(step, args=ocp.args.Composite(**items), metrics={best: metrics[best]} if best else None)

    def check(self) -> None:
        """Raises what went wrong with a save that was started, if it has by now."""
        with self._saving():
            self.manager.check_for_errors()

    def wait(self) -> None:
        """Until the last save is committed; raises what went wrong with it."""
        with self._saving():
            self.manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """A checkpoint's JSON, which can be read before its arrays.

        Raises:
          Damaged: it is not what was saved.
          InputError: it is of another format.
        """
        return self._about(step)["meta"]

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state in the shapes, dtypes and shardings of `abstract`, and the position in the data.

        Raises:
          Damaged: the checkpoint is not what was saved.
          InputError: it holds other arrays.
        """
        about, trees = self._about(step), _split(abstract)
        read = self._read(step, about, trees)
        optimizer = read["optimizer"]
        objective_state = optimizer.get("objective_state", abstract.objective_state)
        state = TrainState(
            step=optimizer["step"], params=read["params"], ema=read["ema"], opt_state=optimizer["opt_state"],
            objective_state=objective_state, guard=optimizer["guard"],
        )  # fmt: skip
        return state, about["position"]

    def restore_params(self, step: int, learned: Mapping, ema: str | None) -> dict[str, Any]:
        """The dict of networks for sampling.

        Args:
          learned: the trainable networks, abstract, with the shardings wanted.
          ema: the average that they are read from, or None for the parameters themselves.

        Raises: as `restore`.
        """
        name, tree = ("params", dict(learned)) if ema is None else ("ema", {ema: learned})
        read = self._read(step, self._about(step), {name: tree}, partial=True)[name]
        return read if ema is None else read[ema]

    def newest_valid(self, read: Callable[[int], T]) -> tuple[int | None, T | None, list[int]]:
        """The newest checkpoint that is what was saved, and those newer than it, which are told of on stderr.

        Args:
          read: what is to be read of a step, raising `Damaged` where it is not what was saved.

        Returns:
          Its step and what `read` returned, or twice None if there is no checkpoint; the steps of the damaged ones.

        Raises:
          InputError: there are checkpoints, and all are damaged.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                found = read(step)
            except Damaged as error:
                damaged[step] = error.problem
                continue
            for problem in damaged.values():
                print(f"warning: {problem}", file=sys.stderr)
            return step, found, list(damaged)
        if damaged:
            newest = next(iter(damaged.values()))
            folder = self.workdir / "checkpoints"
            raise InputError("workdir", f"{newest}, and no other is sound; move {folder} away to begin anew")
        return None, None, []

    def quarantine(self, step: int) -> str:
        """Moves a checkpoint out of the way, and returns where it is now."""
        aside = self.workdir / DAMAGED
        names = (f"{step}_{number}" if number else f"{step}" for number in itertools.count())
        target = next(aside / name for name in names if not (aside / name).exists())
        multihost.wait_for_all("setting aside")
        if files.writes():
            aside.mkdir(parents=True, exist_ok=True)
            (self.workdir / "checkpoints" / str(step)).rename(target)
        multihost.wait_for_all("set aside")
        if self.manager is not None:
            self.manager.reload()
        return str(target)

    def close(self) -> None:
        """Ends the last save, and raises what goes wrong with it."""
        if self.manager is not None:
            with self._saving():
                self.manager.close()

    def _at(self, step: int) -> str:
        return str(self.workdir / "checkpoints" / str(step))

    def _about(self, step: int) -> dict[str, Any]:
        folder = epath.Path(self._at(step))
        if (folder / "meta").exists() and not (folder / "about").exists():
            raise InputError(
                "workdir", f"{folder} has format 1; this code reads {FORMAT}; train anew in another workdir"
            )
        with self._damaging(step):
            about = dict(self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about)
            if about.pop("sha256", None) != _hash(about):
                raise ValueError("its description is not the one that was saved")
        if about.get("format") != FORMAT:
            raise InputError("workdir", f"{self._at(step)} has format {about.get('format')}; this code reads {FORMAT}")
        unsound = _unsound(about)
        if unsound:
            raise Damaged("workdir", f"{self._at(step)} is damaged (its description has no sound {unsound!r})")
        return about

    def _read(self, step: int, about: Mapping, trees: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
        """Arrays as `trees` describes them, held against what was saved: Orbax would cast and cut without a word."""
        wanted = {name: _kind(leaf) for name, leaf in _leaves(trees)}
        stored = {name: (tuple(shape), dtype) for name, (shape, dtype, _) in about["arrays"].items()}
        for name in sorted(wanted.keys() | (set() if partial else stored.keys())):
            ours, theirs = wanted.get(name), stored.get(name)
            if ours != theirs:
                raise InputError(
                    "workdir",
                    f"{self._at(step)} was trained with another network or optimizer: {name} is {_spell(theirs)} there "
                    f"and {_spell(ours)} in the config; give its config or another workdir",
                )
        with self._damaging(step):
            args = {name: _restore_args(tree) for name, tree in trees.items()}
            read = self.manager.restore(step, args=ocp.args.Composite(**args))
            trees = {name: read[name] for name in trees}
            for name, found in _digests(trees).items():
                if found != about["arrays"][name][2]:
                    raise ValueError(f"{name} is not what was saved")
        return trees

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax, TensorStore and the file system each raise their own
            if multihost.is_loss(error):
                raise
            problem = f"{self.workdir}: a checkpoint cannot be saved ({_reason(error)}); those before it are untouched"
            raise InputError("workdir", problem) from error

    @contextlib.contextmanager
    def _damaging(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own
            if multihost.is_loss(error):
                raise
            raise Damaged("workdir", f"{self._at(step)} is damaged ({_reason(error)})") from error


def _absolute(folder: epath.Path) -> epath.Path:
    return folder if files.is_remote(folder) else folder.resolve()


def _split(state: TrainState) -> dict[str, Any]:
    optimizer = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
    if state.objective_state:
        optimizer["objective_state"] = state.objective_state
    return {"params": state.params, "ema": state.ema, "optimizer": optimizer}


def _restore_args(tree: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )


def _unsound(about: Mapping) -> str | None:
    """The first part of a description that is not of the kind that is saved: whoever can write it can make its hash."""

    def is_array(kind: Any) -> bool:
        match kind:
            case [list(shape), str(), int()]:
                return all(isinstance(size, int) for size in shape)
        return False

    def is_count(number: Any) -> bool:
        return isinstance(number, int) and number >= 0

    def is_section(value: Any) -> bool:
        return isinstance(value, dict)

    for name, item in (("meta", is_section), ("position", is_count), ("arrays", is_array)):
        part = about.get(name)
        if not isinstance(part, dict) or not all(map(item, part.values())):
            return name
    config, position = about["meta"].get("config", {}), about["position"]
    if not all(map(is_section, (value for name, value in config.items() if name != "seed"))):
        return "meta"
    return None if not position or "examples" in position else "position"


def _hash(about: Mapping) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _described(trees: Any) -> dict[str, tuple]:
    digests = _digests(trees)
    return {name: (*_kind(leaf), digests[name]) for name, leaf in _leaves(trees)}


def _leaves(trees: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(trees)]


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), jnp.dtype(leaf.dtype).name


def _digests(trees: Any) -> dict[str, int]:
    """A number for each array that changes with any of its bits, and with the places of its elements."""
    # One after the other: on a CPU, programs that wait for all devices at once can wait for each other for ever.
    return {name: int(_digest(leaf)) for name, leaf in _leaves(trees)}


@jax.jit
def _digest(x: Array) -> Array:
    """The sum of all words times odd numbers, mod 2^32: computed where the array lies, the same on every mesh."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    x = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(x * (2 * place + 1), dtype=jnp.uint32)


def _reason(error: Exception) -> str:
    """The first line of what it says, without the middle if that is long: what is wrong stands at an end."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 240 else f"{text[:80]} ... {text[-150:]}"


def _spell(kind: tuple | None) -> str:
    return "absent" if kind is None else f"{kind[1]}{list(kind[0])}"
