"""Converts between the workdirs of runs and the folders of diffusers or single files of Stable Diffusion; the direction
follows from --from.

python -m experiments.convert --from=DIR --to=runs/NAME     a UNet2DModel, a UNet2DConditionModel, a
                                                            DiTTransformer2DModel, a PixArtTransformer2DModel, or a
                                                            pipeline of one, with its autoencoder and text encoders
python -m experiments.convert --from=DIR --dry_run          says what a folder contains
python -m experiments.convert --from=runs/NAME --to=DIR     a run to a pipeline (or a model, if no scheduler fits)
python -m experiments.convert --from=runs/NAME --to=DIR     a run that trains an autoencoder to an AutoencoderKL,
                                                            VQModel or AutoencoderTiny
python -m experiments.convert --from=FILE.safetensors --tokenizer=DIR --to=runs/NAME
                                                            a single file in the original layout
python -m experiments.convert --from=runs/NAME --to=FILE.safetensors

The resulting run can be sampled, and another run can start from it (`init_from`). docs/interop.md says what is read,
written and refused.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from configs.common import CAPTIONED
from diffusion.core import single_file
from diffusion.core.types import InputError
from diffusion.interop import text_pipelines
from diffusion.pipelines.config import read_config
from diffusion.pipelines.conversion import describe_folder, export_file, export_run, import_folder
from experiments import cli

FROM = cli.define_path(
    "from", None, "The workdir of a run, a folder of diffusers, or a single file of Stable Diffusion."
)
TO = cli.define_path("to", None, "The folder to write, which must be empty or not exist, or a file NAME.safetensors.")
CONFIG = cli.define_config()
NULL_CLASS = flags.DEFINE_bool(
    "null_class", False, "To a run: the last class of a U-Net is the one for unconditional samples."
)
VARIANT = flags.DEFINE_string(
    "variant", None, "To a run: the variant of the weights, such as fp16. Default: the plain ones, or the only ones."
)
EMA = flags.DEFINE_string(
    "ema", None, "From a run: the average of the parameters, or none for the raw ones. Default: the config's last."
)
STEP = flags.DEFINE_integer("step", None, "From a run: the step of the checkpoint. Default: the newest.")
SHIFT = flags.DEFINE_bool(
    "shift", False, "From a run that trains an autoencoder: write the mean of the latents as shift_factor."
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "From a folder of diffusers: print what it contains and how it would be sampled; write nothing."
)
TOKENIZER = cli.define_path(
    "tokenizer", None, "From a single file, which has no tokenizer: a folder with that of CLIP, or of a pipeline."
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float16", ["float16", "bfloat16", "float32"], "To a single file: the dtype of its tensors."
)
flags.mark_flags_as_required(["from"])

# For runs made without --config: the configs that complete an imported network, by its name.
DEFAULTS = {"unet": "cifar10_ddpm.py", "dit": "imagenet256_dit.py:XL/2"}
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def main() -> None:
    source, to = FROM.value, TO.value
    is_run = os.path.isdir(os.path.join(source, "checkpoints"))
    if not (os.path.isdir(source) or single_file.split(source)):
        raise InputError("--from", f"{source} is neither a folder nor a file NAME{single_file.SUFFIX}")
    if DRY_RUN.value:
        if is_run:
            raise InputError("--dry_run", "is for folders of diffusers, and --from is a run; leave it out")
        print(describe_folder(source, base_config, null_class=NULL_CLASS.value, variant=VARIANT.value))
        return
    if to is None:
        raise InputError("--to", "is missing; give the folder to write, or --dry_run")
    if os.path.isdir(to) and os.listdir(to):
        raise InputError("--to", f"{to} is not empty; use an empty folder")
    if is_run and to.endswith(single_file.SUFFIX):
        written = export_file(source, to, ema=EMA.value, step=STEP.value, dtype=DTYPE.value)
    elif is_run:
        written = export_run(source, to, ema=EMA.value, step=STEP.value, shift=SHIFT.value)
    else:
        written = import_folder(source, to, base_config, null_class=NULL_CLASS.value, variant=VARIANT.value,
                                tokenizer=TOKENIZER.value)  # fmt: skip
    print(f"{to}: {written}")


def base_config(network: str, pipeline: str | None) -> Mapping[str, Any]:
    """Returns the config given by --config, or else the default one for a network in a class of pipelines."""
    if CONFIG.path.value is not None:
        return CONFIG.value
    if network == "unet_text" or pipeline in text_pipelines.CLASSES:
        return CAPTIONED
    return read_config(str(CONFIGS / DEFAULTS[network]))


if __name__ == "__main__":
    cli.run(main)
