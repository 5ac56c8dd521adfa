"""Estimates what a training will need, and about how fast it will be, without the accelerators: compiles the train step
for a TPU topology or for virtual devices and reads the compiled program.

python -m experiments.plan --config=configs/imagenet256_dit.py:XL/2 --shape=32,32,4 --classes=1000 \\
    --config.network.dtype=bfloat16 --config.mesh.fsdp=4 --config.train.batch_size=64 --topology=v5e:2x2 [--json=FILE]
python -m experiments.plan --config=configs/digits.py --mesh_devices=8 [--chip=H100]
"""

import os

from absl import flags

from diffusion.core import files
from diffusion.core.types import InputError
from diffusion.pipelines import capacity
from diffusion.pipelines.config import check_config
from diffusion.profiling.chips import CHIPS
from experiments import cli

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice to compile for, as v5e:16x16 or v5p:8x8x8.")
DEVICES = flags.DEFINE_integer("mesh_devices", None, "Number of virtual CPU devices to compile for instead.")
CHIP = flags.DEFINE_enum("chip", None, list(CHIPS), "With --mesh_devices: the chip whose memory and speed to assume.")
SHAPE = flags.DEFINE_string(
    "shape", None, "If the config's data are not on this machine: the shape of an image, as 256,256,3, which the step "
    "encodes if the config has an autoencoder, or of a latent, as 32,32,4."
)  # fmt: skip
CLASSES = flags.DEFINE_integer("classes", None, "With --shape: number of classes. Default: num_classes of the data.")
EFFORT = flags.DEFINE_float(
    "effort", 0.0, "The compiler's optimisation effort: 0 as in training; -1 is the least, for large U-Nets.", -1.0, 0.0
)
JSON = cli.define_path("json", None, "File for all figures.")
TOP = flags.DEFINE_integer("top", 12, "Number of arrays to list, the largest first; --json has all.", lower_bound=0)


def main() -> None:
    if CONFIG.path.value is None:
        raise InputError("--config", "is missing")
    if (TOPOLOGY.value is None) == (DEVICES.value is None):
        raise InputError("--topology", "is missing; set either it, as v5e:2x2, or --mesh_devices=N for virtual devices")
    if TOPOLOGY.value and CHIP.value:
        raise InputError("--chip", "follows from --topology; leave it out")
    if TOPOLOGY.value:
        devices, chip = capacity.tpu_devices(TOPOLOGY.value)
    else:
        devices, chip = capacity.virtual_devices(DEVICES.value, CHIP.value)
    config = CONFIG.value
    check_config(config)
    if JSON.value:
        files.make_folder(os.path.dirname(JSON.value) or ".", "--json")
    source = capacity.data_source(config, SHAPE.value, CLASSES.value)
    found, excess = capacity.estimate(config, source, devices, chip, EFFORT.value)
    print(capacity.report(found, TOP.value))
    if JSON.value:
        files.write_json(JSON.value, found)
    if excess:
        change = capacity.suggest_change(config, source, devices, chip, EFFORT.value, excess)
        raise InputError("config", f"does not fit: {excess}; {change}")


if __name__ == "__main__":
    cli.run(main)
