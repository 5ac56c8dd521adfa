"""Tells what a training will need, and about how fast it will be, with no accelerator there: it compiles the train step
for a TPU topology or for virtual devices, and reads the program.

python -m experiments.plan --config=configs/imagenet256_dit.py:XL/2 --shape=32,32,4 --config.network.dtype=bfloat16 \\
    --config.mesh.fsdp=4 --config.train.batch_size=64 --topology=v5e:2x2 [--json=plan.json]
python -m experiments.plan --config=configs/digits.py --mesh_devices=8 [--chip=H100]
"""

import json

from absl import flags

from diffusion.core import files
from diffusion.core.types import InputError
from diffusion.pipelines import capacity
from diffusion.pipelines.config import check_sections
from diffusion.profiling.chips import CHIPS
from experiments import cli

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "Chips of a TPU slice to compile for, as in v5e:16x16 or v5p:8x8x8.")
DEVICES = flags.DEFINE_integer("mesh_devices", None, "Virtual devices of this CPU to compile for instead.")
CHIP = flags.DEFINE_enum("chip", None, list(CHIPS), "With --mesh_devices: the chip to hold the plan against.")
SHAPE = flags.DEFINE_string("shape", None, "Of an example, as in 32,32,4, where the config's data are not here.")
CLASSES = flags.DEFINE_integer("classes", None, "With --shape: number of classes; the data's num_classes by default.")
EFFORT = flags.DEFINE_float(
    "effort", 0.0, "Of the compiler for speed: 0 as in training; -1 is the least, for large U-Nets.", -1.0, 0.0
)
JSON = flags.DEFINE_string("json", None, "File for all of it.")
TOP = flags.DEFINE_integer("top", 12, "Arrays to list, the largest first; all are in --json.", lower_bound=0)


def main() -> None:
    if CONFIG.value is None:
        raise InputError("--config", "is missing")
    if (TOPOLOGY.value is None) == (DEVICES.value is None):
        raise InputError("--topology", "is missing; give it, as v5e:2x2, or --mesh_devices=N for virtual devices")
    if TOPOLOGY.value and CHIP.value:
        raise InputError("--chip", "follows from --topology; leave it out")
    devices, chip = capacity.tpu(TOPOLOGY.value) if TOPOLOGY.value else capacity.virtual(DEVICES.value, CHIP.value)
    config = CONFIG.value.to_dict()
    check_sections(config)
    spec = capacity.spec_of(config, SHAPE.value, CLASSES.value)
    found, short = capacity.planned(config, spec, devices, chip, EFFORT.value)
    print(capacity.text(found, TOP.value))
    if JSON.value:
        with files.replace(JSON.value) as file:
            json.dump(found, file, indent=2)
    if short:
        raise InputError(
            "config", f"does not fit: {short}; {capacity.change(config, spec, devices, chip, EFFORT.value, short)}"
        )


if __name__ == "__main__":
    cli.run(main)
