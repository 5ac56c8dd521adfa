"""Writes the tables of docs/scaling.md: what two trainings need on TPU slices, and that the work of a device stays the
same with more of them. Twenty minutes on two cores; the first table takes the compiler of requirements-tpu.txt.

python -m experiments.scaling_table [--out=docs/scaling.md]
"""

import functools
import importlib.util
import runpy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from diffusion.core.types import InputError
from diffusion.pipelines import capacity, tables
from diffusion.profiling import cost_model
from experiments import cli

OUT = flags.DEFINE_string("out", "docs/scaling.md", "The file; its tables are replaced.")

SHAPES = {"DiT-XL/2": "32,32,4", "ADM-64": "64,64,3"}
EFFORT = {"DiT-XL/2": 0.0, "ADM-64": -1.0}  # whose hundreds of convolutions take the compiler ten minutes at 0
# A model, a topology, data x fsdp, images a chip.
ROWS = (
    ("DiT-XL/2", "v5e:2x2", (1, 4), 16),
    ("DiT-XL/2", "v5e:16x16", (8, 32), 16),
    ("DiT-XL/2", "v5p:8x8x8", (16, 32), 16),
    ("ADM-64", "v5e:2x2", (1, 4), 8),
    ("ADM-64", "v5e:16x16", (32, 8), 8),
    ("ADM-64", "v5p:8x8x8", (64, 8), 8),
)
COLUMNS = ("model", "slice", "data x fsdp", "batch", "state a chip", "of an even share", "in all", "of GiB",
           "sent a step", "of the ideal", "step, predicted", "images/s, predicted")  # fmt: skip
GROWING = (("v5p:2x2x2", (1, 8)), ("v5p:4x4x4", (2, 32)), ("v5p:8x8x8", (16, 32)))  # of DiT-XL/2, 16 images a chip
DEVICES = (1, 8, 64, 512)


def main() -> None:
    tables.around(OUT.value, "--out")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--out", "the compiler for TPUs, libtpu, is missing: pip install -r requirements-tpu.txt")
    virtual, _ = capacity.virtual(max(DEVICES), None)  # first: the compiler for TPUs wakes the CPU up, with its devices
    rows = []
    for row in ROWS:
        rows.append(cells(*row))
        print(" | ".join(rows[-1]), flush=True)
    tables.insert(OUT.value, [tables.markdown(COLUMNS, rows), memory(), weak_scaling(virtual)], "--out")
    print(f"written to {OUT.value}", file=sys.stderr)


def cells(model: str, topology: str, mesh: tuple[int, int], images: int) -> list[str]:
    """One row of the first table."""
    found = planned(model, topology, mesh, images)
    if isinstance(found, cost_model.TooLarge):
        return [model, topology, "{} x {}".format(*mesh), f"{images} a chip", f"does not fit: {found}"]
    return row(model, topology, mesh, found)


@functools.cache
def planned(model: str, topology: str, mesh: tuple[int, int], images: int) -> Mapping[str, Any] | cost_model.TooLarge:
    """The plan of a row."""
    devices, chip = capacity.tpu(topology)
    config = config_of(model, *mesh, images * len(devices))
    found, short = capacity.planned(config, capacity.spec_of(config, SHAPES[model], 1000), devices, chip, EFFORT[model])
    return short or found


def row(model: str, topology: str, mesh: tuple[int, int], found: Mapping[str, Any]) -> list[str]:
    """The cells of a plan that fits."""
    memory, sent, told = (found[name] for name in ("bytes_per_device", "collectives", "prediction"))
    return [
        model, topology, f"{mesh[0]} x {mesh[1]}", f"{found['batch_size']:,}", f"{memory['state'] / 2**20:,.0f} MiB",
        f"{memory['state'] / memory['state_ideal']:.3f}", f"{memory['total'] / 2**30:.2f} GiB",
        f"{memory['limit'] / 2**30:.0f}", f"{sent['total'] / 2**30:.2f} GiB", f"{sent['total'] / sent['ideal']:.3f}",
        f"{1e3 * told['step_seconds']:.0f} ms, {told['bound']}", f"{told['images_per_second']:,.0f}",
    ]  # fmt: skip


def config_of(model: str, data: int, fsdp: int, batch: int) -> Mapping[str, Any]:
    """The model's config in bfloat16 on a mesh."""
    name, argument = ("imagenet64_adm", ()) if model == "ADM-64" else ("imagenet256_dit", (model.partition("-")[2],))
    config = runpy.run_path(f"configs/{name}.py")["get_config"](*argument)
    config.network.dtype = "bfloat16"
    config.mesh.data, config.mesh.fsdp, config.train.batch_size = data, fsdp, batch
    return config.to_dict()


def memory() -> str:
    """The second table: what a chip holds of one training as the slice grows. The ideal is an even share of the state,
    of its gradients in float32 and of the parameters in bfloat16, beside what the smallest slice has beside those."""
    rows, beside = [], None
    for topology, mesh in GROWING:
        found = planned("DiT-XL/2", topology, mesh, 16)
        held = found["bytes_per_device"]
        split = held["state_ideal"] + 6 * found["parameters"]["count"] / mesh[1]
        beside = beside or held["total"] - split
        ideal = split + beside
        rows.append([topology, "{} x {}".format(*mesh), f"{held['state'] / 2**20:,.0f} MiB",
                     f"{(held['total'] - held['state']) / 2**30:.2f} GiB", f"{held['total'] / 2**30:.2f} GiB",
                     f"{held['total'] / ideal:.3f}"])  # fmt: skip
        print(" | ".join(rows[-1]), flush=True)
    return tables.markdown(["slice", "data x fsdp", "state a chip", "beside it", "in all", "of the ideal"], rows)


def weak_scaling(devices: Sequence[Any]) -> str:
    """The third table: DiT-S/2 with four images to each of more and more virtual devices."""
    rows = []
    for count in DEVICES:
        fsdp = min(count, 8)
        config = config_of("DiT-S/2", count // fsdp, fsdp, 4 * count)
        found, _ = capacity.planned(config, capacity.spec_of(config, SHAPES["DiT-XL/2"], 1000), devices[:count], None)
        memory, xla = found["bytes_per_device"], found["xla"]
        rows.append([str(count), str(fsdp), f"{xla['flops'] / 1e9:,.2f}", f"{xla['bytes_accessed'] / 2**20:,.0f}",
                     f"{memory['temporaries'] / 2**20:,.0f}", f"{memory['state'] / 2**20:,.1f}",
                     f"{found['collectives']['total'] / 2**20:,.0f}"])  # fmt: skip
        print(" | ".join(rows[-1]), flush=True)
    return tables.markdown(["devices", "fsdp", "GFLOP", "MiB moved", "MiB of temporaries", "MiB of state", "MiB sent"],
                           rows)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
