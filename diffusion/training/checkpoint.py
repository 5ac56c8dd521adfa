"""Checkpoints of the train state; the only module that imports Orbax.

The checkpoint of step n is the folder `<workdir>/checkpoints/<n>`. It has four items: `params`, `ema` and
`optimizer`, which together are the train state, and `about`, JSON: the format, the run's `meta` (the resolved config
and the data's spec), the position in the data, the shape, dtype and digest of every array, and a SHA-256 of all this.
Items without arrays are left out. So a read returns what was written, or reports that the checkpoint is corrupt.
Sampling reads `about` and the parameters or one of their averages.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from diffusion.core import files
from diffusion.core.trees import path_name
from diffusion.core.types import Array, InputError
from diffusion.distributed import multihost
from diffusion.training.resilience.guards import continued
from diffusion.training.state import TrainState

FORMAT = 2
REFERENCE = "weights"  # section of `meta`: which files have the arrays of a converted model; the checkpoint has none
QUARANTINE = "quarantine"  # folder next to `checkpoints` for those that are corrupt
# What Orbax and TensorStore raise while they save, and while they read files that are missing or invalid.
UNWRITABLE = (OSError, ValueError)
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
MAX_HOST_SIZE = 2**20  # elements of arrays whose digest a CPU computes without compiling
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Corrupt(InputError):
    """A checkpoint does not hold what was saved."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep; a checkpoint stays if any of the rules selects it.

    Attributes:
      newest: Number of the newest checkpoints.
      every: Keep the steps divisible by this number; None for no such rule.
      best: Keep the checkpoint with the best value of this metric; None for no such rule.
      best_mode: Whether the lowest (`min`) or the highest (`max`) value is the best.
    """

    newest: int = 3
    every: int | None = None
    best: str | None = None
    best_mode: Literal["min", "max"] = "min"

    def value(self, metrics: Mapping[str, float]) -> float:
        """Returns the metric `best`; the worst possible value if it is absent or was not measured at a step."""
        return metrics.get(self.best, math.inf if self.best_mode == "min" else -math.inf)


class Checkpoints:
    """The checkpoints of one workdir, a local path or one such as `gs://bucket/run`.

    Args:
      workdir: The run's folder.
      retention: Which checkpoints to keep.
      read_only: Whether to create and remove nothing, for jobs that only read.

    Raises:
      InputError: The folder cannot be read, or the metadata of a checkpoint is corrupt.
    """

    def __init__(self, workdir: str, *, retention: Retention = Retention(), read_only: bool = False):
        self.workdir = epath.Path(workdir)
        self.retention, self.manager = retention, None
        folder = self.workdir / "checkpoints"
        if read_only and not multihost.broadcast_from_first(files.is_folder(folder, "workdir")):
            return
        policies = [preservation.LatestN(retention.newest)]
        if retention.every:
            policies.append(preservation.EveryNSteps(retention.every))
        if retention.best:
            lowest_last = retention.best_mode == "min"  # the last one in the order is kept
            policies.append(preservation.BestN(get_metric_fn=retention.value, reverse=lowest_last, n=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else preservation.AnyPreservationPolicy(policies),
            best_fn=retention.value if retention.best else None, best_mode=retention.best_mode,
            create=not read_only, read_only=read_only, save_interval_steps=0 if read_only else 1,
        )  # fmt: skip
        handlers = {name: ocp.PyTreeCheckpointHandler() for name in ("params", "ema", "optimizer")}
        handlers["about"] = ocp.JsonCheckpointHandler()
        try:
            self.manager = ocp.CheckpointManager(_absolute(folder), options=options, item_handlers=handlers)
        except (ValueError, TypeError, KeyError) as error:  # it reads the _CHECKPOINT_METADATA of each checkpoint
            problem = f"{folder} has a checkpoint with corrupt metadata ({_reason(error)}); move it away"
            raise InputError("workdir", problem) from error

    def latest(self) -> int | None:
        """Returns the newest committed step, or None if there is none."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Returns all committed steps in rising order."""
        return [] if self.manager is None else sorted(self.manager.all_steps())

    def save(
        self, step: int, state: TrainState, position: Mapping, meta: Mapping, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts to save a step and returns once the state is copied, so that it may be donated.

        A step that has a checkpoint is not saved again.

        Args:
          step: The step of the state.
          state: The train state.
          position: The position in the data, JSON-serializable.
          meta: JSON-serializable; see the module's docstring.
          metrics: The metrics of the step, for `Retention.best`; without it, the checkpoint counts as the worst.

        Raises:
          InputError: The previous save failed, or this one cannot start.
        """
        self.wait()
        if step in self.steps():
            return
        trees = _split(state)
        about = files.plain({"format": FORMAT, "meta": meta, "position": position, "arrays": _described(trees)})
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
        items["about"] = ocp.args.JsonSave({**about, "sha256": _hash(about)})
        best = self.retention.best
        folder = str(self.manager.directory)
        if not files.is_remote(folder) and not os.path.isdir(folder):  # Orbax would create it again
            raise InputError("workdir", f"{folder} was removed while the run was writing to it")
        args = ocp.args.Composite(**items)
        with self._saving():
            self.manager.save(step, args=args, metrics={best: self.retention.value(metrics or {})} if best else None)

    def check(self) -> None:
        """Raises the error of the save in progress, if it has failed by now."""
        with self._saving():
            self.manager.check_for_errors()

    def wait(self) -> None:
        """Waits until the last save is committed, and raises its error if it failed."""
        with self._saving():
            self.manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the `meta` of a checkpoint, which can be read before its arrays.

        Raises:
          Corrupt: It is not what was saved.
          InputError: The checkpoint has another format.
        """
        return self._about(step)["meta"]

    def digest(self, step: int) -> str:
        """Returns a SHA-256 that changes with any array of a checkpoint, or of its `meta`."""
        return _hash(self._about(step))

    def check_fits(self, step: int, abstract: TrainState) -> dict[str, Any]:
        """Returns the position in the data, after checking that a checkpoint has arrays as in `abstract`.

        No array is read.

        Raises:
          Corrupt, InputError: As `restore`.
        """
        about = self._about(step)
        self._compare(step, about, _stored(about, abstract), partial=False)
        return about["position"]

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state with the shapes, dtypes and shardings of `abstract`, and the position in the data.

        Raises:
          Corrupt: The checkpoint is not what was saved.
          InputError: The checkpoint holds other arrays.
        """
        about = self._about(step)
        read = self._read(step, about, _stored(about, abstract))
        optimizer = read["optimizer"]
        objective_state = optimizer.get("objective_state", abstract.objective_state)
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract.guard)
        state = TrainState(
            step=optimizer["step"], params=read["params"], ema=read["ema"], opt_state=optimizer["opt_state"],
            objective_state=objective_state, guard=jax.device_put(continued(optimizer["guard"]), places),
        )  # fmt: skip
        return state, about["position"]

    def restore_params(self, step: int, learned: Mapping, ema: str | None) -> dict[str, Any]:
        """Returns the dict of networks for sampling.

        Args:
          step: The step of the checkpoint.
          learned: The trainable networks, abstract, with the shardings that they will have.
          ema: The average to read them from, or None for the parameters themselves.

        Raises:
          Corrupt, InputError: As `restore`.
        """
        name, tree = ("params", dict(learned)) if ema is None else ("ema", {ema: learned})
        read = self._read(step, self._about(step), {name: tree}, partial=True)[name]
        return read if ema is None else read[ema]

    def newest_valid(self, read: Callable[[int], T]) -> tuple[int | None, T | None, list[int]]:
        """Finds the newest checkpoint that can be read, and logs a warning for each newer one, which is corrupt.

        Args:
          read: Reads what is needed of a step; raises `Corrupt` if it is not what was saved.

        Returns:
          Its step, what `read` returned, and the steps of the corrupt checkpoints. The first two are None if there is
          no checkpoint.

        Raises:
          InputError: There are checkpoints, and all are corrupt.
        """
        corrupt = {}
        for step in reversed(self.steps()):
            try:
                found = read(step)
            except Corrupt as error:
                corrupt[step] = error.problem
                continue
            for problem in corrupt.values():
                logger.warning("%s", problem)
            return step, found, list(corrupt)
        if corrupt:
            newest = next(iter(corrupt.values()))
            folder = self.workdir / "checkpoints"
            raise InputError("workdir", f"{newest}, and no other is valid; move {folder} away to start from scratch")
        return None, None, []

    def quarantine(self, step: int) -> str:
        """Moves a checkpoint to the folder `quarantine`, and returns its new path."""
        folder = self.workdir / QUARANTINE
        names = (f"{step}_{number}" if number else f"{step}" for number in itertools.count())
        target = next(folder / name for name in names if not (folder / name).exists())
        multihost.wait_for_all("quarantine: all have chosen the path")
        if files.writes():
            folder.mkdir(parents=True, exist_ok=True)
            (self.workdir / "checkpoints" / str(step)).rename(target)
        multihost.wait_for_all("quarantine: moved")
        if self.manager is not None:
            self.manager.reload()
        return str(target)

    def close(self) -> None:
        """Waits for the last save, and raises its error if it failed."""
        if self.manager is not None:
            with self._saving():
                self.manager.close()

    def _path(self, step: int) -> str:
        return str(self.workdir / "checkpoints" / str(step))

    def _about(self, step: int) -> dict[str, Any]:
        """Returns the verified JSON of a checkpoint."""
        about = self._restored(step, {"about": ocp.args.JsonRestore()})["about"]
        if not isinstance(about, dict) or about.pop("sha256", None) != _hash(about):
            raise self._corrupt(step, "its description is not the one that was saved")
        if about.get("format") != FORMAT:
            raise InputError("workdir", f"{self._path(step)} has format {about.get('format')}; expected {FORMAT}")
        invalid = _invalid_part(about)
        if invalid:
            raise self._corrupt(step, f"its description has no valid {invalid!r}")
        return about

    def _read(self, step: int, about: Mapping, trees: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
        """Returns the arrays that `trees` describes, after comparing them with the description."""
        expected = self._compare(step, about, trees, partial)
        full = {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
        read = {**trees, **self._restored(step, {name: _restore_args(tree) for name, tree in full.items()})}
        # Where its own metadata is corrupt, Orbax leaves arrays abstract or returns others.
        kinds = {name: _kind(leaf) if isinstance(leaf, jax.Array) else None for name, leaf in _leaves(read)}
        if kinds != expected:
            raise self._corrupt(step, "its arrays are not those that were saved")
        for name, digest in _digests(read).items():
            if digest != about["arrays"][name][2]:
                raise self._corrupt(step, f"{name} is not what was saved")
        return read

    def _compare(self, step: int, about: Mapping, trees: Mapping[str, Any], partial: bool) -> dict[str, tuple]:
        """Compares the shapes and dtypes of arrays with the description, and returns them by name.

        Orbax would cast and crop arrays of another dtype or shape silently.
        """
        expected = {name: _kind(leaf) for name, leaf in _leaves(trees)}
        stored = {name: (tuple(shape), dtype) for name, (shape, dtype, _) in about["arrays"].items()}
        for name in sorted(expected.keys() | (set() if partial else stored.keys())):
            ours, theirs = expected.get(name), stored.get(name)
            if ours != theirs:
                raise InputError(
                    "workdir",
                    f"{self._path(step)} was trained with another network or optimizer: {name} is {_spell(theirs)} "
                    f"there and {_spell(ours)} in the config; use the run's config, or another workdir",
                )
        return expected

    def _restored(self, step: int, args: Mapping[str, ocp.args.CheckpointArgs]) -> dict[str, Any]:
        """Returns items of a checkpoint as Orbax reads them; only its errors count as a corrupt checkpoint."""
        composite = ocp.args.Composite(**args)
        try:
            read = self.manager.restore(step, args=composite)
            return {name: read[name] for name in args}
        except UNREADABLE as error:
            if multihost.is_loss(error):
                raise
            raise self._corrupt(step, _reason(error)) from error

    def _corrupt(self, step: int, reason: str) -> Corrupt:
        return Corrupt("workdir", f"{self._path(step)} is corrupt ({reason})")

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except UNWRITABLE as error:
            if multihost.is_loss(error):
                raise
            earlier = "earlier ones are unchanged" if self.steps() else "there is none yet"
            problem = f"{self.workdir}: cannot save a checkpoint ({_reason(error)}); {earlier}"
            raise InputError("workdir", problem) from error


def _absolute(folder: epath.Path) -> epath.Path:
    return folder if files.is_remote(folder) else folder.resolve()


def _split(state: TrainState) -> dict[str, Any]:
    """Returns the items of a checkpoint that hold arrays."""
    optimizer = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
    if state.objective_state:
        optimizer["objective_state"] = state.objective_state
    return {"params": state.params, "ema": state.ema, "optimizer": optimizer}


def _stored(about: Mapping, abstract: TrainState) -> dict[str, Any]:
    """Returns the items of a checkpoint, without the counter that checkpoints of older versions do not have."""
    trees = _split(abstract)
    if "optimizer/guard/deviation" not in about["arrays"]:
        trees["optimizer"]["guard"] = {name: leaf for name, leaf in abstract.guard.items() if name != "deviation"}
    return trees


def _restore_args(tree: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )


def _invalid_part(about: Mapping) -> str | None:
    """Returns the first part of a description that has another type than the saved ones, or None.

    The hash does not rule this out, because an edited description can be hashed again.
    """

    def is_array(kind: Any) -> bool:
        match kind:
            case [list(shape), str(), int()]:
                return all(isinstance(size, int) for size in shape)
        return False

    def is_count(number: Any) -> bool:
        return isinstance(number, int) and number >= 0

    def is_sum(pair: Any) -> bool:
        return isinstance(pair, list) and len(pair) == 2 and all(isinstance(number, (int, float)) for number in pair)

    def is_section(value: Any) -> bool:
        return isinstance(value, dict)

    def holds(part: Any, check: Callable[[Any], bool]) -> bool:
        return is_section(part) and all(map(check, part.values()))

    meta, position, arrays = (about.get(name) for name in ("meta", "position", "arrays"))
    if not holds(meta, is_section):
        return "meta"
    values = {name: value for name, value in meta.get("config", {}).items() if name not in ("version", "seed")}
    if not all(value is None or is_section(value) for name, value in values.items() if name != "init_from"):
        return "meta"
    if not holds(arrays, is_array):
        return "arrays"
    if not is_section(position) or (position and "examples" not in position):
        return "position"
    counts = {name: value for name, value in position.items() if name != "window"}
    # The window holds sums of metrics that are not logged yet.
    return None if holds(counts, is_count) and holds(position.get("window", {}), is_sum) else "position"


def _hash(about: Mapping) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _described(trees: Any) -> dict[str, tuple]:
    """Returns the shape, dtype and digest of each array by its name."""
    digests = _digests(trees)
    return {name: (*_kind(leaf), digests[name]) for name, leaf in _leaves(trees)}


def _leaves(trees: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(trees)]


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), jnp.dtype(leaf.dtype).name


def _digests(trees: Any) -> dict[str, int]:
    """Returns a number for each array that changes with any of its bits, and with the positions of its elements.

    The device computes all digests before the host reads them. `_digest` is compiled once per shape: one program of
    all arrays compiles four times as long, because networks have many arrays of few shapes.
    """
    # On CPU devices, collective programs that run at the same time can block each other forever.
    on_cpu = jax.default_backend() == "cpu"
    digests = {}
    for name, leaf in _leaves(trees):
        if on_cpu and leaf.is_fully_addressable and leaf.size <= MAX_HOST_SIZE:
            digests[name] = _host_digest(np.asarray(leaf))
        else:
            digests[name] = _digest(leaf).block_until_ready() if on_cpu else _digest(leaf)
    return {name: int(digest) for name, digest in jax.device_get(digests).items()}


def _host_digest(x: np.ndarray) -> np.uint32:
    """Returns `_digest` of a small array on a CPU, where compiling a program per shape takes far longer."""
    size = 1 if x.dtype == bool else min(x.dtype.itemsize, 4)
    words = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * size}").astype(np.uint32)
    return np.sum(words * (2 * np.arange(words.size, dtype=np.uint32) + 1), dtype=np.uint32)


@jax.jit
def _digest(x: Array) -> Array:
    """Returns the sum of all words times odd numbers, modulo 2^32.

    It is computed where the array is stored, and is the same on every mesh.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    x = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        position = position + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(x * (2 * position + 1), dtype=jnp.uint32)


def _reason(error: Exception) -> str:
    """Returns the first line of a message, shortened in the middle, since the cause stands at either end."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 240 else f"{text[:80]} ... {text[-150:]}"


def _spell(kind: tuple | None) -> str:
    return "absent" if kind is None else f"{kind[1]}{list(kind[0])}"
