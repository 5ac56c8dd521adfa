"""A train step compiled and read: what lies on each device, what goes between them, and how long a step may take."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion.core.types import Batch, Objective
from diffusion.distributed import sharding
from diffusion.profiling.chips import Chip
from diffusion.profiling.hlo import collectives
from diffusion.profiling.macs import macs
from diffusion.training.program import Program
from diffusion.training.state import trainable

FLAGGED = 2**20  # bytes from which an array that every device has whole is told of
UTILISATION = 0.5  # of the peak that products reach, where a step is bound by them: MaxText has 0.52 to 0.71 on v5p
# A TPU's compiler says it in two ways: of arrays that it finds no place for, and of a program that is too large anyway.
NO_ROOM = re.compile(
    r"Used [\d.]+[KMGT]? of [\d.]+[KMGT]? hbm|\([\d.]+[KMGT]?\) exceeds available HBM \([\d.]+[KMGT]?\)"
)
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLarge(Exception):
    """The compiler found no room.

    Attributes:
      used: bytes that a device would need.
      limit: bytes that it has for programs.
    """

    def __init__(self, used: float, limit: float):
        super().__init__(f"{used / 2**30:.2f} GiB of {limit / 2**30:.2f}")
        self.used, self.limit = used, limit


def compiled(program: Program, batch: Batch, effort: float = 0.0) -> jax.stages.Compiled:
    """The step for the devices of its mesh, which need not exist.

    Args:
      effort: 0 as for training; -1 is the least that a TPU's compiler spends on speed.

    Raises:
      TooLarge: one has too little memory.
    """
    options = {"exec_time_optimization_effort": effort} if effort else None
    try:
        return program.step.lower(program.state, batch).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        found = NO_ROOM.search(str(error))
        if not found:
            raise
        used, limit = (float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([KMGT]?)\b", found[0]))
        raise TooLarge(used, limit) from None


def parameters(params: Any) -> list[dict[str, Any]]:
    """The modules at the top of each network: their numbers and bytes, the largest first."""
    found = collections.defaultdict(lambda: [0, 0])
    for path, leaf in jax.tree.leaves_with_path(params):
        module = found["/".join(sharding.path_name(path).split("/")[:2])]
        module[0] += math.prod(leaf.shape)
        module[1] += _bytes(leaf)
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    return [{"module": name, "count": count, "bytes": size} for name, (count, size) in ranked]


def arrays(state: Any) -> list[dict[str, Any]]:
    """Every array of an abstract state with its place, the largest on a device first."""
    found = [
        {"name": sharding.path_name(path), "shape": list(leaf.shape), "dtype": str(leaf.dtype), "bytes": _bytes(leaf),
         "bytes_per_device": _own_bytes(leaf), "spec": str(tuple(leaf.sharding.spec)),
         "replicated": leaf.sharding.is_fully_replicated and leaf.sharding.num_devices > 1}
        for path, leaf in jax.tree.leaves_with_path(state)
    ]  # fmt: skip
    return sorted(found, key=lambda one: (-one["bytes_per_device"], one["name"]))


def state_memory(program: Program, mesh: Mesh) -> dict[str, float]:
    """Bytes per device of the state, by what they are for; and the ideal, an even share on every part of the mesh but
    `data`."""
    state = program.state
    parts = {"parameters": state.params, "optimizer": state.opt_state, "ema": state.ema}
    found = {name: sum(map(_own_bytes, jax.tree.leaves(part))) for name, part in parts.items()}
    found["state"] = sum(map(_own_bytes, jax.tree.leaves(state)))
    found["state_ideal"] = sum(map(_bytes, jax.tree.leaves(state))) * mesh.shape["data"] / mesh.size
    return found


def step_memory(step: jax.stages.Compiled, batch: Batch) -> dict[str, float]:
    """Bytes per device beside the state, as XLA has them: the batch, `temporaries` (activations, gathered parameters,
    gradients) and the program; and the `total` with the state, of which the step's results take the place."""
    found = step.memory_analysis()
    own = sum(map(_own_bytes, jax.tree.leaves(batch)))
    beside = found.temp_size_in_bytes + found.generated_code_size_in_bytes
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return {"batch": own, "temporaries": found.temp_size_in_bytes, "program": found.generated_code_size_in_bytes,
            "total": found.argument_size_in_bytes + results + beside}  # fmt: skip


def traffic(step: jax.stages.Compiled, mesh: Mesh) -> dict[str, Any]:
    """Bytes that each device sends in a step, by kind of collective, and the largest of them."""
    found = collectives(step.as_text(), mesh.size)
    kinds = collections.defaultdict(lambda: {"runs": 0, "bytes": 0.0})
    for one in found:
        kinds[one.kind]["runs"] += one.runs
        kinds[one.kind]["bytes"] += one.sent * one.runs
    largest = sorted(found, key=lambda one: -one.sent * one.runs)[:10]
    return {
        "kinds": dict(kinds),
        "total": sum(kind["bytes"] for kind in kinds.values()),
        "largest": [{**dataclasses.asdict(one), "bytes": one.sent * one.runs} for one in largest],
    }


def ideal_traffic(program: Program, objective: Objective, mesh: Mesh, dtype: Any, accumulate: int) -> float:
    """Bytes that each device must send: of each trained parameter, in the dtype that the network computes in, two
    gathers (for the forward and the backward pass) and one reduce-scatter of its gradient over the devices that split
    it, and an all-reduce of what is left of the gradient over those that have the same part; each once for every
    micro-batch. What tensor parallelism sends is not in it."""
    rows = sharding.batch_shards(mesh)
    total = 0.0
    for leaf in jax.tree.leaves(trainable(program.state.params, objective)):
        model = math.prod(mesh.shape[axis] for axis in _axes(leaf) if axis == "model")
        split = math.prod(mesh.shape[axis] for axis in _axes(leaf) if axis != "model")
        whole = math.prod(leaf.shape) * jnp.dtype(dtype).itemsize / model
        copies = rows / split
        total += 3 * whole * (split - 1) / split + 2 * whole / split * (copies - 1) / copies
    return total * accumulate


def products(program: Program, batch: Batch) -> float | None:
    """FLOPs of the products of one step, as it is traced: all that it computes, also what it computes again. None if a
    loop hides how many there are."""
    try:
        return 2.0 * macs(program.step, program.state, batch)
    except ValueError:
        return None


def prediction(chip: Chip, devices: int, batch_size: int, flops: float, memory: Mapping[str, float], sent: float):
    """A roofline: a step takes as long as the slowest of the three would take alone."""
    moved = 2 * memory["state"] + 2 * memory["temporaries"]
    seconds = {
        "compute": flops / devices / (chip.flops * UTILISATION),
        "memory": moved / chip.bandwidth,
        "interconnect": sent / chip.interconnect,
    }
    bound = max(seconds, key=seconds.get)
    return {
        "seconds": seconds,
        "step_seconds": seconds[bound],
        "bound": bound,
        "images_per_second": batch_size / seconds[bound],
        "assumptions": [
            f"products, of float32 too, at {UTILISATION:.0%} of bfloat16's peak, {chip.flops / 1e12:.0f} TFLOP/s",
            f"memory: the state and the temporaries written and read once, at {chip.bandwidth / 1e9:.0f} GB/s",
            f"interconnect: {chip.interconnect / 1e9:.0f} GB/s a chip, all of its links in use, one way",
            "the three overlap wholly, and the data arrive in time",
        ],
    }


def _axes(leaf: jax.ShapeDtypeStruct) -> list[str]:
    """The mesh axes that split an array."""
    return [axis for axes in leaf.sharding.spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)]


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _own_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
