"""Writes the tables of docs/scaling.md: what two trainings need on TPU slices, and that the work per device stays the
same as devices are added. Takes twenty minutes on two cores and needs the compiler of requirements-tpu.txt.

python -m experiments.scaling_table [--out=docs/scaling.md]
"""

import functools
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.core.types import InputError
from diffusion.pipelines import capacity, tables
from diffusion.pipelines.config import read_config
from diffusion.profiling.cost_model import TooLarge
from experiments import cli

OUT = cli.define_path("out", "docs/scaling.md", "The file whose tables are replaced.")

SHAPES = {"DiT-XL/2": "32,32,4", "DiT-S/2": "32,32,4", "ADM-64": "64,64,3"}
CONFIGS = {"DiT-XL/2": "configs/imagenet256_dit.py:XL/2", "DiT-S/2": "configs/imagenet256_dit.py:S/2",
           "ADM-64": "configs/imagenet64_adm.py"}  # fmt: skip
EFFORT = {"DiT-XL/2": 0.0, "ADM-64": -1.0}  # at effort 0, ADM's hundreds of convolutions compile for ten minutes
# Model, topology, (data, fsdp), images per chip.
ROWS = (
    ("DiT-XL/2", "v5e:2x2", (1, 4), 16),
    ("DiT-XL/2", "v5e:16x16", (8, 32), 16),
    ("DiT-XL/2", "v5p:8x8x8", (16, 32), 16),
    ("ADM-64", "v5e:2x2", (1, 4), 8),
    ("ADM-64", "v5e:16x16", (32, 8), 8),
    ("ADM-64", "v5p:8x8x8", (64, 8), 8),
)
COLUMNS = ("model", "slice", "data x fsdp", "batch", "state per chip", "of an even share", "total", "of GiB",
           "sent per step", "of the ideal", "predicted step", "predicted images/s")  # fmt: skip
GROWING = (("v5p:2x2x2", (1, 8)), ("v5p:4x4x4", (2, 32)), ("v5p:8x8x8", (16, 32)))  # for DiT-XL/2, 16 images per chip
DEVICES = (1, 8, 64, 512)


def main() -> None:
    tables.surroundings(OUT.value, "--out")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--out", "the compiler for TPUs, libtpu, is missing: pip install -r requirements-tpu.txt")
    # Must come first: compiling for a TPU initialises the CPU backend, which fixes the number of its devices.
    virtual, _ = capacity.virtual_devices(max(DEVICES), None)
    made = [slices(), memory(), weak_scaling(virtual)]
    tables.insert(OUT.value, made, "--out")
    print(f"updated {OUT.value}", file=sys.stderr)


def slices() -> str:
    """Returns the first table: memory, communication and predicted speed of the trainings in `ROWS`."""
    rows = []
    for model, topology, mesh, images in ROWS:
        found = estimate(model, topology, mesh, images)
        start = [model, topology, "{} x {}".format(*mesh)]
        if isinstance(found, TooLarge):
            rows.append([*start, f"{images} per chip", f"does not fit: {found}"])
        else:
            held, sent, predicted = (found[name] for name in ("bytes_per_device", "collectives", "prediction"))
            rows.append([
                *start, f"{found['batch_size']:,}", f"{held['state'] / 2**20:,.0f} MiB",
                f"{held['state'] / held['state_ideal']:.3f}", f"{held['total'] / 2**30:.2f} GiB",
                f"{held['limit'] / 2**30:.0f}", f"{sent['total'] / 2**30:.2f} GiB",
                f"{sent['total'] / sent['ideal']:.3f}", f"{1e3 * predicted['step_seconds']:.0f} ms, "
                f"{predicted['bound']}", f"{predicted['images_per_second']:,.0f}",
            ])  # fmt: skip
        print(" | ".join(rows[-1]), flush=True)
    return tables.markdown(COLUMNS, rows)


@functools.cache
def estimate(model: str, topology: str, mesh: tuple[int, int], images: int) -> Mapping[str, Any] | TooLarge:
    """Returns the figures of a training with `images` per chip, or by how much it does not fit."""
    devices, chip = capacity.tpu_devices(topology)
    config = config_of(model, *mesh, images * len(devices))
    source = capacity.data_source(config, SHAPES[model], 1000)
    found, excess = capacity.estimate(config, source, devices, chip, EFFORT[model])
    return excess or found


def config_of(model: str, data: int, fsdp: int, batch_size: int) -> Mapping[str, Any]:
    """Returns the model's config in bfloat16 on a mesh."""
    options = {"network.dtype": "bfloat16", "mesh.data": data, "mesh.fsdp": fsdp, "train.batch_size": batch_size}
    return read_config(CONFIGS[model], options.items())


def memory() -> str:
    """Returns the second table: memory per chip for one training as the slice grows.

    The ideal is an even share of the state, of its gradients in float32 and of the parameters in bfloat16, plus the
    remaining memory measured on the smallest slice.
    """
    rows, rest = [], None
    for topology, mesh in GROWING:
        found = estimate("DiT-XL/2", topology, mesh, 16)
        held = found["bytes_per_device"]
        shared = held["state_ideal"] + 6 * found["parameters"]["count"] / mesh[1]
        rest = rest or held["total"] - shared
        rows.append([topology, "{} x {}".format(*mesh), f"{held['state'] / 2**20:,.0f} MiB",
                     f"{(held['total'] - held['state']) / 2**30:.2f} GiB", f"{held['total'] / 2**30:.2f} GiB",
                     f"{held['total'] / (shared + rest):.3f}"])  # fmt: skip
        print(" | ".join(rows[-1]), flush=True)
    return tables.markdown(["slice", "data x fsdp", "state per chip", "other", "total", "of the ideal"], rows)


def weak_scaling(devices: Sequence[Any]) -> str:
    """Returns the third table: DiT-S/2 with four images per device on more and more virtual devices."""
    rows = []
    for count in DEVICES:
        fsdp = min(count, 8)
        config = config_of("DiT-S/2", count // fsdp, fsdp, 4 * count)
        source = capacity.data_source(config, SHAPES["DiT-S/2"], 1000)
        found, _ = capacity.estimate(config, source, devices[:count], None)
        held, xla = found["bytes_per_device"], found["xla"]
        rows.append([str(count), str(fsdp), f"{xla['flops'] / 1e9:,.2f}", f"{xla['bytes_accessed'] / 2**20:,.0f}",
                     f"{held['temporaries'] / 2**20:,.0f}", f"{held['state'] / 2**20:,.1f}",
                     f"{found['collectives']['total'] / 2**20:,.0f}"])  # fmt: skip
        print(" | ".join(rows[-1]), flush=True)
    return tables.markdown(["devices", "fsdp", "GFLOP", "MiB moved", "MiB of temporaries", "MiB of state", "MiB sent"],
                           rows)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
