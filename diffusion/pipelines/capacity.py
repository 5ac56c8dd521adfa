"""Estimates what the training of a config needs on given devices, which need not exist: memory, communication and time.

The train step is compiled for the devices and the compiled program is read; nothing runs. Of an autoencoder in a model
folder, `config.json` is enough. If the training does not fit into the devices' memory, `suggest_change` searches for
the cheapest change of the config after which it does.
"""

import contextlib
import importlib.util
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from diffusion.core.build import build, check, defaults, find
from diffusion.core.checks import at_most
from diffusion.core.types import ArraySpec, InputError, Source, Spec, class_labels, earlier_kind
from diffusion.data import captions
from diffusion.data.pipeline import decoded_spec, is_encoded
from diffusion.data.size_conditions import SPECS
from diffusion.distributed import sharding
from diffusion.pipelines.build_training import meta_of, program_of, training
from diffusion.pipelines.model import build_model, teacher_of
from diffusion.profiling import cost_model
from diffusion.profiling.chips import CHIPS, Chip
from diffusion.profiling.macs import encoder_macs, network_macs, text_encoder_macs
from diffusion.training.program import abstract_batch

MOST_DEVICES = 4096
NO_WORKDIR = os.path.join(os.devnull, "workdir")  # does not exist, so the run has not begun
USABLE_MEMORY = 0.98  # share of a chip's memory that a program may use, where the compiler does not report a limit


def tpu_devices(topology: str) -> tuple[Sequence[Any], Chip]:
    """Returns the devices of a TPU slice, which need not exist, and their chip.

    Args:
      topology: For example `v5e:16x16` or `v5p:8x8x8`.

    Raises:
      InputError: An unknown chip or topology, or libtpu is not installed; the field is `--topology`.
    """
    kind = topology.partition(":")[0]
    known = [name for name, chip in CHIPS.items() if chip.kind.startswith("TPU")]
    if kind not in known:
        raise InputError("--topology", f"no TPU {kind!r}; one of: {', '.join(known)}; as in v5e:2x2 or v5p:8x8x8")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology", "the compiler for TPUs, libtpu, is missing: pip install -r "
                         "requirements-tpu.txt; or plan on virtual devices, with --mesh_devices=N")  # fmt: skip
    jax.config.update("jax_platforms", "cpu")
    # libtpu must neither query the metadata server for a TPU nor lock one for this process.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    try:
        with _without_stderr():
            return topologies.get_topology_desc(topology, "tpu").devices, CHIPS[kind]
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        problem = str(error).partition("\n")[0].removeprefix("INVALID_ARGUMENT: ")
        raise InputError("--topology", f"no {topology!r}: {problem}") from None


def virtual_devices(count: int, chip: str | None) -> tuple[Sequence[Any], Chip | None]:
    """Returns `count` virtual CPU devices, and the chip of that name if one is given.

    Must be called before JAX initialises its CPU backend.
    """
    if count < 1:
        raise InputError("--mesh_devices", f"must be at least 1, got {count}")
    at_most(MOST_DEVICES, count, "--mesh_devices")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return jax.devices(), CHIPS[chip] if chip else None


class Described:
    """Stands for data that are not on this machine.

    Attributes:
      spec: What the data look like.
      encoder: "" for latents, which count as encoded in advance if the config has an autoencoder; otherwise None.
    """

    def __init__(self, spec: Spec):
        self.spec, self.encoder = spec, "" if spec.x.kind == "latent" else None


def data_source(config: Mapping[str, Any], shape: str | None = None, classes: int | None = None) -> Source | Described:
    """Returns a config's data, or what the flags `--shape` and `--classes` say of them.

    Args:
      config: The resolved config.
      shape: Shape of an example as text, for data that are not on this machine. Three axes with one or three channels
        are an image, and with another number, as in `32,32,4`, a latent.
      classes: Number of classes, used with `shape`; by default the option `num_classes` of the data, or 0. The options
        of the data also say whether there are captions and size conditions.

    Raises:
      InputError: The data cannot be read, or the shape or number of classes is invalid.
    """
    data = config["data"]
    if shape is None:
        try:
            return build("data", data, field="data")
        except InputError as error:
            problem = f"{error.problem}; to plan without the data, describe them with --shape=H,W,C [--classes=N]"
            raise InputError(error.field, problem) from None
    make = find("data", data.get("name"), field="data.name")
    check(make, {key: data[key] for key in data if key != "name"}, field="data")
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise InputError("--shape", f"must be positive sizes, as in 32,32,4, got {shape!r}")
    at_most(10**8, math.prod(sizes), "--shape")
    count = data.get("num_classes", 0) if classes is None else classes
    if count < 0:
        raise InputError("--classes", f"must be at least 0, got {count}")
    x = ArraySpec(sizes, earlier_kind(sizes, 0, 255))
    conditions = class_labels(at_most(10**7, count, "--classes")) | dict(SPECS.get(data.get("size_conditions"), {}))
    return Described(Spec(x, conditions, captions=bool(data.get("captions"))))


def train_program(config: Mapping[str, Any], source: Source | Described, devices: Sequence[Any]) -> dict[str, Any]:
    """Returns the train step of a config on a mesh of the devices, and the parts that it is made of.

    The step encodes the examples unless they were encoded in advance.

    Returns:
      A dict of the `program` (`training.program.Program`), an abstract `batch`, the `mesh`, the `model`, the `options`
      of the section `train`, and the `spec` of what the network models.
    """
    spec, encoded = decoded_spec(source), is_encoded(source)
    meta, teacher = meta_of(config, spec, NO_WORKDIR)
    described = isinstance(source, Described)
    if encoded and described:  # nothing says what the latents are decoded to
        config = {**config, "autoencoder": None}
    model = build_model(config, spec, teacher_of(meta), weights=False, source=None if described else source)
    keywords = training(config, devices)
    mesh, options = keywords["mesh"], keywords["options"]
    text_encoded = captions.is_text_encoded(source)
    program = program_of(model, teacher, encoded=encoded, text_encoded=text_encoded, **keywords)
    batch = abstract_batch(source.spec, options.batch_size, program.batch, model.text_encoder, text_encoded)
    return dict(program=program, batch=batch, mesh=mesh, model=model, options=options,
                spec=model.spec(spec))  # fmt: skip


def estimate(
    config: Mapping[str, Any], source: Source | Described, devices: Sequence[Any], chip: Chip | None,
    effort: float = 0.0,
) -> tuple[dict[str, Any], cost_model.TooLarge | None]:  # fmt: skip
    """Compiles the train step of a config for the devices and returns its figures.

    Args:
      config: The resolved config.
      source: From `data_source`.
      devices: From `tpu_devices` or `virtual_devices`.
      chip: The chip whose memory and speed the program is compared with; None for no prediction.
      effort: The compiler's optimisation effort; see `cost_model.compiled`.

    Returns:
      The figures, and by how much the program exceeds the memory, or None if it fits. If the compiler rejects the
      program as too large, the figures that are read from the compiled program are missing.
    """
    parts = train_program(config, source, devices)
    program, batch, mesh, options, model = (parts[name] for name in ("program", "batch", "mesh", "options", "model"))
    forward = 2 * network_macs(model.network, parts["spec"])
    encoding = 2 * encoder_macs(model.autoencoder, source.spec) if "autoencoder" in program.frozen else 0
    text = 2 * text_encoder_macs(model.text_encoder) if "text_encoder" in program.frozen else 0
    dtype = network_option(config, "dtype") or "float32"
    modules = cost_model.parameters(program.state.params)
    found = {
        "devices": {"kind": devices[0].device_kind, "count": mesh.size, "mesh": dict(mesh.shape)},
        "batch_size": options.batch_size,
        "parameters": {
            "count": sum(module["count"] for module in modules),
            "modules": modules,
            "frozen": cost_model.parameters(program.frozen),
        },
        "flops": {
            "forward_of_an_image": forward,
            "encoding_of_an_image": encoding,
            "encoding_of_a_text": text,
            "training": (encoding + text + 3 * forward) * options.batch_size,
            "as_traced": cost_model.products(program, batch),
        },
        "bytes_per_device": cost_model.state_memory(program, mesh) | cost_model.frozen_memory(program),
        "arrays": cost_model.arrays(program.state),
    }
    began = time.monotonic()
    try:
        with _without_stderr():
            step = cost_model.compiled(program, batch, effort)
    except cost_model.TooLarge as error:
        found["bytes_per_device"] |= {"total": error.used, "limit": error.limit}
        return found, error
    found["compile_seconds"] = time.monotonic() - began
    memory = found["bytes_per_device"] | cost_model.step_memory(step, batch)
    cost = step.cost_analysis()
    # XLA counts the body of a loop once, so these figures compare programs and do not give the cost of a step.
    found["xla"] = {"flops": cost.get("flops"), "bytes_accessed": cost.get("bytes accessed")}
    found["collectives"] = cost_model.traffic(step, mesh)
    found["collectives"]["ideal"] = cost_model.ideal_traffic(program, model.objective, mesh, dtype, options.accumulate)
    excess = None
    if chip:
        memory["limit"] = chip.memory
        flops = found["flops"]["as_traced"] or found["flops"]["training"]
        sent = found["collectives"]["total"]
        found["prediction"] = cost_model.prediction(chip, mesh.size, options.batch_size, flops, memory, sent)
        if memory["total"] > USABLE_MEMORY * chip.memory:
            excess = cost_model.TooLarge(memory["total"], USABLE_MEMORY * chip.memory)
    found["bytes_per_device"] = memory
    return found, excess


def network_option(config: Mapping[str, Any], name: str) -> Any:
    """Returns an option of a config's network: as the config spells it, or the default of the network's signature.

    None if the network has no such option.
    """
    section = config["network"]
    make = find("networks", section["name"], field="network.name")
    return {**defaults(make), **section}.get(name)


def suggest_change(
    config: Mapping[str, Any],
    source: Source | Described,
    devices: Sequence[Any],
    chip: Chip | None,
    effort: float,
    excess: cost_model.TooLarge,
) -> str:
    """Returns in words the cheapest change of a config after which its training fits.

    The candidates are compiled one after the other; see `candidate_changes`. The arguments are those of `estimate`, and
    the excess that it returned.
    """
    parts = train_program(config, source, devices)
    mesh = parts["mesh"]
    state = cost_model.state_memory(parts["program"], mesh)
    whole = state["state_ideal"] * mesh.size / mesh.shape["data"]  # bytes of all shards, if `model` splits none
    if whole / mesh.size >= excess.limit:
        needed = math.ceil(whole / excess.limit)
        return f"the state alone, {whole / 2**30:.1f} GiB, fills {needed} devices; use more devices"
    for change in candidate_changes(config, parts, excess):
        changed = {**config}
        for path, value in change.items():
            section, key = path.split(".")
            changed[section] = {**changed[section], key: value}
        _, still = estimate(changed, source, devices, chip, effort)
        if still is None:
            return "it fits with " + " ".join(f"--config.{path}={value}" for path, value in change.items())
    return "remat, accumulation and more fsdp do not suffice; use more devices or a smaller train.batch_size"


def candidate_changes(
    config: Mapping[str, Any], parts: Mapping[str, Any], excess: cost_model.TooLarge
) -> list[dict[str, Any]]:
    """Returns changes of a config that may make its training fit, the cheapest first.

    They are encoding the images of a device one at a time, full rematerialisation, smaller micro-batches, sharding the
    state over more devices, and combinations of these. Changes that the size of the state rules out are left out.

    Args:
      config: The config.
      parts: What `train_program` returned for it.
      excess: What `estimate` returned for it.

    Returns:
      A dict per change, from the path of an option to its value.
    """
    mesh, options = parts["mesh"], parts["options"]
    state, limit = cost_model.state_memory(parts["program"], mesh)["state"], excess.limit
    replicas = mesh.shape["data"]
    local_batch = options.batch_size // sharding.batch_shards(mesh)
    remat = {} if network_option(config, "remat") in (None, "full") else {"network.remat": "full"}
    changes = []
    if state < limit:
        finest = (excess.used - state) / (limit - state) * options.accumulate
        enough = [k for k in range(options.accumulate + 1, local_batch + 1) if local_batch % k == 0 and k >= finest]
        micro = {"train.accumulate": enough[0]} if enough else {}
        changes += [remat, micro, remat | micro]
    fewer = [data for data in range(replicas - 1, 0, -1) if replicas % data == 0]
    fitting = [data for data in fewer if state * data / replicas < limit / 2] or fewer[-1:]
    if fitting:
        more = {"mesh.data": fitting[0], "mesh.fsdp": _fsdp_size(mesh) * replicas // fitting[0]}
        most = {"mesh.data": 1, "mesh.fsdp": _fsdp_size(mesh) * replicas}
        accumulate = {"train.accumulate": local_batch} if local_batch > options.accumulate else {}
        changes += [more, most, most | remat | accumulate]
    if "autoencoder" in parts["program"].frozen and config["autoencoder"].get("slices") is False:
        changes = [{"autoencoder.slices": True} | change for change in [{}, *changes]]
    return [change for index, change in enumerate(changes) if change and change not in changes[:index]]


def _fsdp_size(mesh: Mesh) -> int:
    """Returns the option `fsdp` that a mesh was made with, over however many axes it is split."""
    return mesh.size // mesh.shape["data"] // mesh.shape["model"]


def report(found: Mapping[str, Any], top: int) -> str:
    """Returns the figures of `estimate` as text, with the `top` largest arrays of the state."""
    devices, memory = found["devices"], found["bytes_per_device"]
    axes = " x ".join(f"{name} {size}" for name, size in devices["mesh"].items())
    lines = [f"{devices['count']} x {devices['kind']}, {axes}, batch {found['batch_size']:,}", "", "parameters"]
    for module in found["parameters"]["modules"]:
        lines.append(f"  {module['module']:<28} {module['count']:>15,} {_size(module['bytes'])}")
    lines.append(f"  {'all':<28} {found['parameters']['count']:>15,}")
    for module in found["parameters"]["frozen"]:
        lines.append(f"  {module['module']:<28} {module['count']:>15,} {_size(module['bytes'])}  frozen")
    flops = found["flops"]
    lines += ["", "FLOPs of matrix products and convolutions",
              f"  forward, per image           {flops['forward_of_an_image']:>15.4g}"]  # fmt: skip
    step = "step: 3 x forward x batch"
    for kind in ("an_image", "a_text"):
        if encoding := flops[f"encoding_of_{kind}"]:
            share = encoding * found["batch_size"] / (flops["as_traced"] or flops["training"])
            title = f"encoding, per {kind.partition('_')[2]}"
            lines.append(f"  {title:<28} {encoding:>15.4g}  {share:.1%} of the step")
            step = "step: encoding, 3 x forward"
    lines.append(f"  {step:<28} {flops['training']:>15.4g}")
    if flops["as_traced"]:
        lines.append(f"  step, as traced              {flops['as_traced']:>15.4g}  includes rematerialisation")
    lines += ["", "bytes per device"]
    notes = {"state": f"{memory['state'] / memory['state_ideal']:.3f} of an even share",
             "temporaries": "activations, gathered parameters and gradients, as allocated by XLA"}  # fmt: skip
    rows = ("parameters", "optimizer", "ema", "state", "untrained", "autoencoder", "text_encoder", "batch",
            "temporaries", "program", "total", "limit")  # fmt: skip
    for name in rows:
        if name in memory:
            lines.append(f"  {name:<28} {_size(memory[name])}  {notes.get(name, '')}".rstrip())
    lines += ["", "arrays of the state, the largest per device first"]
    for array in found["arrays"][:top]:
        shape = f"{array['dtype']}{array['shape']}".replace(" ", "")
        lines.append(f"  {_size(array['bytes_per_device'])}  {array['name']} {shape} {array['spec']}")
    replicated = [array for array in found["arrays"] if array["replicated"] and array["bytes"] > cost_model.FLAGGED]
    lines += [f"  REPLICATED: {array['name']}, {_size(array['bytes']).strip()}" for array in replicated]
    lines.append(f"  {len(replicated)} of {len(found['arrays'])} arrays are replicated and larger than 1 MiB")
    if "collectives" in found:
        sent = found["collectives"]
        lines += ["", "bytes sent by each device per step"]
        for name, kind in sorted(sent["kinds"].items()):
            lines.append(f"  {name:<28} {_size(kind['bytes'])}  in {kind['runs']:,} runs")
        ratio = f"{sent['total'] / sent['ideal']:.3f} of the ideal" if sent["ideal"] else "one device"
        lines.append(f"  {'all':<28} {_size(sent['total'])}  {ratio}")
        lines.append(f"  {'ideal':<28} {_size(sent['ideal'])}  parameters gathered twice, gradients reduced once")
        if devices["kind"] == "cpu":
            lines.append("  on a CPU, reduce-scatters are compiled to all-reduces of twice the size; see --topology")
    if "prediction" in found:
        predicted = found["prediction"]
        lines += ["", "prediction, not a measurement"]
        lines += [f"  {name:<28} {1e3 * seconds:>12.2f} ms" for name, seconds in predicted["seconds"].items()]
        lines.append(f"  step, bound by {predicted['bound']:<13} {1e3 * predicted['step_seconds']:>12.2f} ms"
                     f"  {predicted['images_per_second']:,.0f} images/s")  # fmt: skip
        lines += [f"  assuming {assumption}" for assumption in predicted["assumptions"]]
    return "\n".join(lines)


def _size(count: float) -> str:
    return f"{count / 2**30:>10.3f} GiB" if count >= 2**30 else f"{count / 2**20:>10.3f} MiB"


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discards what is written to stderr, to which the TPU's compiler reports that there is no TPU."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
