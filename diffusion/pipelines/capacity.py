"""What `experiments.plan` computes: a config's train step on devices that need not exist, its figures, and the cheapest
change where it does not fit."""

import contextlib
import importlib.util
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from diffusion.core.build import build, check, find
from diffusion.core.checks import at_most
from diffusion.core.types import InputError, Spec
from diffusion.distributed import sharding
from diffusion.pipelines.build_training import meta_of, program_of, training
from diffusion.pipelines.model import network_and_objective, teacher_of
from diffusion.profiling import cost_model
from diffusion.profiling.chips import CHIPS, Chip
from diffusion.profiling.macs import network_macs
from diffusion.training import program as programs

MOST_DEVICES = 4096
NOWHERE = os.path.join(os.devnull, "workdir")  # of a run that has not begun
COMPILER_ROOM = 0.98  # of a chip's memory, where the compiler does not say itself what it has


def tpu(topology: str) -> tuple[Sequence[Any], Chip]:
    """The chips of a slice that need not exist."""
    kind = topology.partition(":")[0]
    known = [name for name, chip in CHIPS.items() if chip.kind.startswith("TPU")]
    if kind not in known:
        raise InputError("--topology", f"no TPU {kind!r}; one of: {', '.join(known)}; as in v5e:2x2 or v5p:8x8x8")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology", "the compiler for TPUs, libtpu, is missing: pip install -r "
                         "requirements-tpu.txt; or plan on virtual devices, with --mesh_devices=N")  # fmt: skip
    jax.config.update("jax_platforms", "cpu")
    # There is no TPU to ask what it is, or to have for oneself.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    try:
        with _silent():
            return topologies.get_topology_desc(topology, "tpu").devices, CHIPS[kind]
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        problem = str(error).partition("\n")[0].removeprefix("INVALID_ARGUMENT: ")
        raise InputError("--topology", f"no {topology!r}: {problem}") from None


def virtual(count: int, chip: str | None) -> tuple[Sequence[Any], Chip | None]:
    """So many devices of this CPU."""
    if count < 1:
        raise InputError("--mesh_devices", f"must be at least 1, got {count}")
    at_most(MOST_DEVICES, count, "--mesh_devices")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return jax.devices(), CHIPS[chip] if chip else None


def spec_of(config: Mapping[str, Any], shape: str | None = None, classes: int | None = None) -> Spec:
    """What the data are: as their source says, or where they are not here as the flags of these names do."""
    data = config["data"]
    if shape is None:
        try:
            return build("data", data, field="data").spec
        except InputError as error:
            problem = f"{error.problem}; to plan without the data, say what they are: --shape=H,W,C [--classes=N]"
            raise InputError(error.field, problem) from None
    make = find("data", data.get("name"), field="data.name")
    check(make, {key: data[key] for key in data if key != "name"}, field="data")
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise InputError("--shape", f"must be sizes such as 32,32,4, got {shape!r}")
    at_most(10**8, math.prod(sizes), "--shape")
    count = data.get("num_classes", 0) if classes is None else classes
    if count < 0:
        raise InputError("--classes", f"must be at least 0, got {count}")
    return Spec(sizes, at_most(10**7, count, "--classes"))


def program_for(config: Mapping[str, Any], spec: Spec, devices: Sequence[Any]) -> dict[str, Any]:
    """The config's train step on a mesh of the devices, and what it is made of."""
    meta, teacher = meta_of(config, spec, NOWHERE)
    network, objective = network_and_objective(config, spec, teacher_of(meta))
    keywords = training(config, devices)
    mesh, options = keywords["mesh"], keywords["options"]
    program = program_of(network, objective, teacher, **keywords)
    batch = programs.abstract_batch(spec, options.batch_size, program.batch)
    return dict(program=program, batch=batch, mesh=mesh, network=network, objective=objective, options=options)


def planned(
    config: Mapping[str, Any], spec: Spec, devices: Sequence[Any], chip: Chip | None, effort: float = 0.0
) -> tuple[dict[str, Any], cost_model.TooLarge | None]:
    """All figures of a plan, and by how much it does not fit, if so: then what only the program tells is not there.
    `effort` is the compiler's; see `cost_model.compiled`."""
    made = program_for(config, spec, devices)
    program, batch, mesh, options = (made[name] for name in ("program", "batch", "mesh", "options"))
    forward = 2 * network_macs(made["network"], spec.shape, spec.num_classes)
    dtype = config["network"].get("dtype", "float32")
    modules = cost_model.parameters(program.state.params)
    found = {
        "devices": {"kind": devices[0].device_kind, "count": mesh.size, "mesh": dict(mesh.shape)},
        "batch_size": options.batch_size,
        "parameters": {"count": sum(one["count"] for one in modules), "modules": modules},
        "flops": {
            "forward_of_an_image": forward,
            "training": 3 * forward * options.batch_size,
            "as_traced": cost_model.products(program, batch),
        },
        "bytes_per_device": cost_model.state_memory(program, mesh),
        "arrays": cost_model.arrays(program.state),
    }
    began = time.monotonic()
    try:
        with _silent():
            step = cost_model.compiled(program, batch, effort)
    except cost_model.TooLarge as error:
        found["bytes_per_device"] |= {"total": error.used, "limit": error.limit}
        return found, error
    found["compile_seconds"] = time.monotonic() - began
    memory = found["bytes_per_device"] | cost_model.step_memory(step, batch)
    cost = step.cost_analysis()
    # XLA counts the body of a loop once, so these are for comparing programs and not for what a step takes.
    found["xla"] = {"flops": cost.get("flops"), "bytes_accessed": cost.get("bytes accessed")}
    found["collectives"] = cost_model.traffic(step, mesh)
    found["collectives"]["ideal"] = cost_model.ideal_traffic(
        program, made["objective"], mesh, dtype, options.accumulate
    )
    short = None
    if chip:
        memory["limit"] = chip.memory
        flops = found["flops"]["as_traced"] or found["flops"]["training"]
        sent = found["collectives"]["total"]
        found["prediction"] = cost_model.prediction(chip, mesh.size, options.batch_size, flops, memory, sent)
        if memory["total"] > COMPILER_ROOM * chip.memory:
            short = cost_model.TooLarge(memory["total"], COMPILER_ROOM * chip.memory)
    found["bytes_per_device"] = memory
    return found, short


def change(
    config: Mapping[str, Any],
    spec: Spec,
    devices: Sequence[Any],
    chip: Chip | None,
    effort: float,
    short: cost_model.TooLarge,
) -> str:
    """The cheapest change after which it fits, in words: what is computed again, smaller micro-batches, the state in
    more parts. Each that may help is compiled; those that its own bytes rule out are not."""
    made = program_for(config, spec, devices)
    mesh, options = made["mesh"], made["options"]
    state, room = cost_model.state_memory(made["program"], mesh), short.limit
    replicas = mesh.shape["data"]
    even = state["state_ideal"] * mesh.size / replicas  # all of it, where the mesh has no `model`
    if even / mesh.size >= room:
        return f"the state alone fills {math.ceil(even / room)} devices, with {even / 2**30:.1f} GiB; take more of them"
    rows = options.batch_size // sharding.batch_shards(mesh)
    beside = short.used - state["state"]
    remat = {"network.remat": "full"} if config["network"].get("remat", "full") != "full" else {}
    changes = []
    if state["state"] < room:
        finest = beside / (room - state["state"]) * options.accumulate
        enough = [k for k in range(options.accumulate + 1, rows + 1) if rows % k == 0 and k >= finest]
        micro = {"train.accumulate": enough[0]} if enough else {}
        changes += [remat, micro, remat | micro]
    fewer = [data for data in range(replicas - 1, 0, -1) if replicas % data == 0]
    split = [data for data in fewer if state["state"] * data / replicas < room / 2] or fewer[-1:]
    if split:
        more = {"mesh.data": split[0], "mesh.fsdp": config_fsdp(mesh) * replicas // split[0]}
        most = {"mesh.data": 1, "mesh.fsdp": config_fsdp(mesh) * replicas}
        changes += [more, most, most | remat | ({"train.accumulate": rows} if rows > options.accumulate else {})]
    tried = [{}]
    for one in changes:
        if one in tried:
            continue
        tried.append(one)
        changed = {**config}
        for name, value in one.items():
            section, key = name.split(".")
            changed[section] = {**changed[section], key: value}
        _, still = planned(changed, spec, devices, chip, effort)
        if still is None:
            return "it fits with " + " ".join(f"--config.{name}={value}" for name, value in one.items())
    return "neither remat, accumulation nor more fsdp suffices; take more devices, or a smaller train.batch_size"


def config_fsdp(mesh: Mesh) -> int:
    """The `fsdp` that a mesh was made with, whatever axes it has for it."""
    return mesh.size // mesh.shape["data"] // mesh.shape["model"]


def text(found: Mapping[str, Any], top: int) -> str:
    """The plan for a reader."""
    devices, memory = found["devices"], found["bytes_per_device"]
    axes = " x ".join(f"{name} {size}" for name, size in devices["mesh"].items())
    lines = [f"{devices['count']} x {devices['kind']}, {axes}, batch {found['batch_size']:,}", "", "parameters"]
    for one in found["parameters"]["modules"]:
        lines.append(f"  {one['module']:<28} {one['count']:>15,} {_size(one['bytes'])}")
    lines.append(f"  {'all':<28} {found['parameters']['count']:>15,}")
    flops = found["flops"]
    lines += ["", "FLOPs of products",
              f"  forward, of an image         {flops['forward_of_an_image']:>15.4g}",
              f"  a step: 3 x forward x batch  {flops['training']:>15.4g}"]  # fmt: skip
    if flops["as_traced"]:
        lines.append(f"  a step as traced             {flops['as_traced']:>15.4g}  with what is computed again")
    lines += ["", "bytes per device"]
    notes = {"state": f"{memory['state'] / memory['state_ideal']:.3f} of an even share",
             "temporaries": "activations, gathered parameters, gradients, as XLA places them"}  # fmt: skip
    for name in ("parameters", "optimizer", "ema", "state", "batch", "temporaries", "program", "total", "limit"):
        if name in memory:
            lines.append(f"  {name:<28} {_size(memory[name])}  {notes.get(name, '')}".rstrip())
    lines += ["", "arrays of the state, the largest on a device first"]
    for one in found["arrays"][:top]:
        shape = f"{one['dtype']}{one['shape']}".replace(" ", "")
        lines.append(f"  {_size(one['bytes_per_device'])}  {one['name']} {shape} {one['spec']}")
    whole = [one for one in found["arrays"] if one["replicated"] and one["bytes"] > cost_model.FLAGGED]
    lines += [f"  REPLICATED: {one['name']}, {_size(one['bytes']).strip()}" for one in whole]
    lines.append(f"  {len(whole)} of {len(found['arrays'])} arrays are replicated and over 1 MiB")
    if "collectives" in found:
        sent = found["collectives"]
        lines += ["", "bytes that each device sends in a step"]
        for kind, one in sorted(sent["kinds"].items()):
            lines.append(f"  {kind:<28} {_size(one['bytes'])}  in {one['runs']:,} runs")
        ratio = f"{sent['total'] / sent['ideal']:.3f} of the ideal" if sent["ideal"] else "one device"
        lines.append(f"  {'all':<28} {_size(sent['total'])}  {ratio}")
        lines.append(f"  {'ideal':<28} {_size(sent['ideal'])}  parameters gathered twice, gradients reduced once")
        if devices["kind"] == "cpu":
            lines.append("  a CPU's compiler makes no reduce-scatter, but all-reduces twice as large: see --topology")
    if "prediction" in found:
        told = found["prediction"]
        lines += ["", "prediction, not a measurement"]
        lines += [f"  {name:<28} {1e3 * seconds:>12.2f} ms" for name, seconds in told["seconds"].items()]
        lines.append(f"  a step, bound by {told['bound']:<11} {1e3 * told['step_seconds']:>12.2f} ms"
                     f"  {told['images_per_second']:,.0f} images/s")  # fmt: skip
        lines += [f"  if {one}" for one in told["assumptions"]]
    return "\n".join(lines)


def _size(count: float) -> str:
    return f"{count / 2**30:>10.3f} GiB" if count >= 2**30 else f"{count / 2**20:>10.3f} MiB"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing on stderr, where the TPU's compiler tells of the TPU that is not there."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
