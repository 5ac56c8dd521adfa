"""A cost model of a compiled train step: memory per device, communication between devices, and time per step."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion.core.trees import path_name
from diffusion.core.types import Batch, Objective
from diffusion.distributed import sharding
from diffusion.profiling.chips import Chip
from diffusion.profiling.hlo import collectives
from diffusion.profiling.macs import macs
from diffusion.training.program import Program
from diffusion.training.state import trainable

FLAGGED = 2**20  # size in bytes above which a replicated array is reported
UTILISATION = 0.5  # fraction of peak FLOP/s of a compute-bound step: MaxText reaches 0.52 to 0.71 on v5p
# The TPU compiler has two such messages: for arrays that it cannot place, and for a program that is too large anyway.
NO_ROOM = re.compile(
    r"Used [\d.]+[KMGT]? of [\d.]+[KMGT]? hbm|\([\d.]+[KMGT]?\) exceeds available HBM \([\d.]+[KMGT]?\)"
)
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLarge(Exception):
    """Raised if a program does not fit into the memory of a device.

    Attributes:
      used: Bytes that a device would need.
      limit: Bytes that a device has available for programs.
    """

    def __init__(self, used: float, limit: float):
        super().__init__(f"{used / 2**30:.2f} GiB of {limit / 2**30:.2f}")
        self.used, self.limit = used, limit


def compiled(program: Program, batch: Batch, effort: float = 0.0) -> jax.stages.Compiled:
    """Returns the train step, compiled for the devices of its mesh, which need not exist.

    Args:
      program: The training program.
      batch: An abstract batch.
      effort: 0 optimizes as for training; at -1 the TPU compiler spends the least time on optimization.

    Raises:
      TooLarge: The program does not fit into the memory of a device.
    """
    options = {"exec_time_optimization_effort": effort} if effort else None
    try:
        return program.step.lower(program.state, batch, program.frozen).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        found = NO_ROOM.search(str(error))
        if not found:
            raise
        used, limit = (float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([KMGT]?)\b", found[0]))
        raise TooLarge(used, limit) from None


def parameters(params: Any) -> list[dict[str, Any]]:
    """Returns the parameter count and bytes of each network's top-level modules, the largest first."""
    found = collections.defaultdict(lambda: [0, 0])
    for path, leaf in jax.tree.leaves_with_path(params):
        module = found["/".join(path_name(path).split("/")[:2])]
        module[0] += math.prod(leaf.shape)
        module[1] += _bytes(leaf)
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    return [{"module": name, "count": count, "bytes": size} for name, (count, size) in ranked]


def arrays(state: Any) -> list[dict[str, Any]]:
    """Returns every array of an abstract state with its sharding, sorted by decreasing bytes per device."""
    found = [
        {
            "name": path_name(path),
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "bytes": _bytes(leaf),
            "bytes_per_device": _bytes_per_device(leaf),
            "spec": str(tuple(leaf.sharding.spec)),
            "replicated": leaf.sharding.is_fully_replicated and leaf.sharding.num_devices > 1,
        }
        for path, leaf in jax.tree.leaves_with_path(state)
    ]
    return sorted(found, key=lambda one: (-one["bytes_per_device"], one["name"]))


def state_memory(program: Program, mesh: Mesh) -> dict[str, float]:
    """Returns the bytes per device of the state and its parts, and the ideal: evenly split over all axes but `data`."""
    state = program.state
    parts = {"parameters": state.params, "optimizer": state.opt_state, "ema": state.ema}
    found = {name: sum(map(_bytes_per_device, jax.tree.leaves(part))) for name, part in parts.items()}
    found["state"] = sum(map(_bytes_per_device, jax.tree.leaves(state)))
    found["state_ideal"] = sum(map(_bytes, jax.tree.leaves(state))) * mesh.shape["data"] / mesh.size
    return found


def frozen_memory(program: Program) -> dict[str, float]:
    """Returns the bytes per device of the arrays that a step reads and never changes: `untrained` parameters of the
    networks, the `autoencoder`, and the `text_encoder` with its null text, as far as there are any."""
    names, found = {"params": "untrained", "null_text": "text_encoder"}, {}
    for name, part in program.frozen.items():
        name = names.get(name, name)
        found[name] = found.get(name, 0) + sum(map(_bytes_per_device, jax.tree.leaves(part)))
    return found


def step_memory(step: jax.stages.Compiled, batch: Batch) -> dict[str, float]:
    """Returns the bytes per device that a step needs in addition to the state, according to XLA.

    These are the `batch`, the `temporaries` (activations, gathered parameters, gradients) and the `program`. The
    `total` includes the frozen arrays and the state, whose buffers the results of the step reuse.
    """
    found = step.memory_analysis()
    temporaries, program = found.temp_size_in_bytes, found.generated_code_size_in_bytes
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "batch": sum(map(_bytes_per_device, jax.tree.leaves(batch))),
        "temporaries": temporaries,
        "program": program,
        "total": found.argument_size_in_bytes + results + temporaries + program,
    }


def traffic(step: jax.stages.Compiled, mesh: Mesh) -> dict[str, Any]:
    """Returns the bytes that each device sends per step, by kind of collective, and the ten largest collectives."""
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
    """Returns the least number of bytes that each device must send per step.

    For each trained parameter and micro-batch, in the network's compute dtype, these are two all-gathers (for the
    forward and the backward pass) and one reduce-scatter of the gradient over the devices that shard the parameter, and
    an all-reduce of the gradient's shard over the devices that hold the same shard. The communication of tensor
    parallelism is not included.

    Args:
      program: The training program.
      objective: The objective, which says what is trained.
      mesh: The mesh of the program.
      dtype: Compute dtype of the network.
      accumulate: Number of micro-batches per step.
    """
    batch_shards = sharding.batch_shards(mesh)
    total = 0.0
    for leaf in jax.tree.leaves(trainable(program.state.params, objective)):
        model = math.prod(mesh.shape[axis] for axis in _axes(leaf) if axis == "model")
        split = math.prod(mesh.shape[axis] for axis in _axes(leaf) if axis != "model")
        whole = math.prod(leaf.shape) * jnp.dtype(dtype).itemsize / model
        copies = batch_shards / split
        total += 3 * whole * (split - 1) / split + 2 * whole / split * (copies - 1) / copies
    return total * accumulate


def products(program: Program, batch: Batch) -> float | None:
    """Returns the FLOPs of the products of one step as traced, with recomputation; None if they cannot be counted."""
    try:
        return 2.0 * macs(program.step, program.state, batch, program.frozen)
    except ValueError:
        return None


def prediction(
    chip: Chip, devices: int, batch_size: int, flops: float, memory: Mapping[str, float], sent: float
) -> dict[str, Any]:
    """Predicts the time per step by a roofline model: the longest of computation, memory access and communication.

    Args:
      chip: The accelerator.
      devices: Number of devices.
      batch_size: Examples per step.
      flops: FLOPs per step, over all devices.
      memory: Bytes per device; see `state_memory` and `step_memory`.
      sent: Bytes that each device sends per step.
    """
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
            f"compute: {UTILISATION:.0%} of the bfloat16 peak of {chip.flops / 1e12:.0f} TFLOP/s, also for float32",
            f"memory: state and temporaries are written and read once, at {chip.bandwidth / 1e9:.0f} GB/s",
            f"interconnect: {chip.interconnect / 1e9:.0f} GB/s per chip, one way, with all links in use",
            "compute, memory access and communication overlap fully, and the input pipeline keeps up",
        ],
    }


def _axes(leaf: jax.ShapeDtypeStruct) -> list[str]:
    """Returns the mesh axes that an array is sharded over."""
    return [axis for axes in leaf.sharding.spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)]


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _bytes_per_device(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
