"""Checkpoints: the only file that knows Orbax.

A checkpoint of step n lies in `<workdir>/checkpoints/<n>` and has five items: `params`, `ema` and `optimizer` (together
the train state), `data` (the position in the data) and `meta` (JSON: the resolved config, the data's spec, the format).
Sampling reads `meta` and the parameters or one of their averages.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from diffusion.distributed.sharding import path_name
from diffusion.training.state import TrainState
from diffusion.types import InputError

FORMAT = 1


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder.
      keep: how many of the newest to keep.
      read_only: for jobs that only read; nothing is created or removed.
    """

    def __init__(self, workdir: str, *, keep: int = 3, read_only: bool = False):
        self.workdir = workdir
        self.manager = None
        folder = os.path.join(os.path.abspath(workdir), "checkpoints")
        if read_only and not os.path.isdir(folder):
            return
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, create=not read_only, read_only=read_only
        )
        handlers = {name: ocp.PyTreeCheckpointHandler() for name in ("params", "ema", "optimizer")}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in ("data", "meta")}
        self.manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return None if self.manager is None else self.manager.latest_step()

    def steps(self) -> list[int]:
        """All committed steps, rising."""
        return [] if self.manager is None else sorted(self.manager.all_steps())

    def save(self, step: int, state: TrainState, data: Mapping, meta: Mapping) -> None:
        """Starts saving and returns once the state is copied, so that it may be donated. A step is saved once.

        Args:
          step: the state's own.
          data: the data iterator's state.
          meta: JSON-able.
        """
        self.wait()
        if step == self.latest():
            return
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _split(state).items()}
        items["data"] = ocp.args.JsonSave(dict(data))
        items["meta"] = ocp.args.JsonSave({"format": FORMAT, **meta})
        self.manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Until the last save is committed; raises what went wrong with it."""
        self.manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """A checkpoint's JSON, which can be read before its arrays."""
        meta = self._read(step, meta=ocp.args.JsonRestore()).meta
        if meta.get("format") != FORMAT:
            raise InputError("workdir", f"{self._at(step)} has format {meta.get('format')}; this code reads {FORMAT}")
        return meta

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state in the shapes, dtypes and shardings of `abstract`, and the data iterator's state.

        Raises:
          InputError: the checkpoint holds other arrays, or cannot be read.
        """
        trees = _split(abstract)
        self._compare(step, trees)
        args = {name: _restore_args(tree) for name, tree in trees.items()}
        read = self._read(step, **args, data=ocp.args.JsonRestore())
        optimizer = read.optimizer
        memory = optimizer.get("memory", abstract.memory)
        return TrainState(optimizer["step"], read.params, read.ema, optimizer["opt_state"], memory), read.data

    def restore_params(self, step: int, learned: Mapping, ema: str | None) -> dict[str, Any]:
        """The dict of networks for sampling.

        Args:
          learned: the trainable networks, abstract, with the shardings wanted.
          ema: the average that they are read from, or None for the parameters themselves.
        """
        name, tree = ("params", dict(learned)) if ema is None else ("ema", {ema: learned})
        self._compare(step, {name: tree}, partial=True)
        read = self._read(step, **{name: _restore_args(tree)})[name]
        return read if ema is None else read[ema]

    def close(self) -> None:
        if self.manager is not None:
            self.manager.close()

    def _at(self, step: int) -> str:
        return os.path.join(self.workdir, "checkpoints", str(step))

    def _read(self, step: int, **args: ocp.args.CheckpointArgs) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> InputError:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return InputError(
            "workdir", f"{self._at(step)} cannot be read; move it away to use an older one ({reason[:160]})"
        )

    def _compare(self, step: int, trees: Mapping[str, Any], *, partial: bool = False) -> None:
        """Refuses a checkpoint with other arrays: Orbax itself would cast and cut without a word."""
        try:
            metadata = self.manager.item_metadata(step)
            stored = {name: _shapes(metadata[name].tree) for name in trees}
        except Exception as error:
            raise self._damaged(step, error) from error
        for name, tree in trees.items():
            wanted = _shapes(tree)
            for path in sorted(wanted.keys() | (set() if partial else stored[name].keys())):
                ours, theirs = wanted.get(path), stored[name].get(path)
                if ours != theirs:
                    raise InputError(
                        "workdir",
                        f"{self._at(step)} was trained with another network or optimizer: {name}/{path} is "
                        f"{_spell(theirs)} there and {_spell(ours)} in the config; give its config or another workdir",
                    )


def _split(state: TrainState) -> dict[str, Any]:
    optimizer = {"step": state.step, "opt_state": state.opt_state}
    if state.memory:
        optimizer["memory"] = state.memory
    return {"params": state.params, "ema": state.ema, "optimizer": optimizer}


def _restore_args(tree: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )


def _shapes(tree: Any) -> dict[str, tuple]:
    leaves = jax.tree.leaves_with_path(tree)
    return {path_name(path): (tuple(leaf.shape), jax.numpy.dtype(leaf.dtype).name) for path, leaf in leaves}


def _spell(array: tuple | None) -> str:
    return "absent" if array is None else f"{array[1]}{list(array[0])}"
