"""Converts between runs of ours and the folders of diffusers, by what it finds in --from.

python -m experiments.convert --from=DIR --to=runs/NAME     a UNet2DModel, a DiTTransformer2DModel or a pipeline of one
python -m experiments.convert --from=runs/NAME --to=DIR     a run, to its pipeline (or to its model, if there is none)

A run that comes of it can be sampled, and trained further by any config whose network has the same arrays.
"""

import dataclasses
import json
import os
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from diffusion.core import files
from diffusion.core.types import InputError
from diffusion.interop import diffusers_pipeline
from diffusion.interop.diffusers_models import Model
from diffusion.pipelines.build_training import training
from diffusion.pipelines.config import check_sections
from diffusion.pipelines.model import network_and_objective
from diffusion.pipelines.run import open_run
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.state import init_state
from experiments import cli

FROM = flags.DEFINE_string("from", None, "A run of ours, or a folder of diffusers.")
TO = flags.DEFINE_string("to", None, "The folder to write; it must not exist, or be empty.")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "To ours: what config.json does not tell (optimizer, data, ...). Default: by the network.",
    lock_config=True,
)  # fmt: skip
NULL_CLASS = flags.DEFINE_bool("null_class", False, "To ours: the last class of a U-Net is the one for no class.")
EMA = flags.DEFINE_string(
    "ema", None, "From ours: which average of the parameters, or none. Default: the config's last."
)
STEP = flags.DEFINE_integer("step", None, "From ours: the checkpoint of which step. Default: the newest.")
flags.mark_flags_as_required(["from", "to"])

# The configs that complete an imported network, and their arguments.
DEFAULTS = {"unet": ("cifar10_ddpm.py",), "dit": ("imagenet256_dit.py", "XL/2")}
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def main() -> None:
    source, to = FROM.value, TO.value
    if os.path.isdir(to) and os.listdir(to):
        raise InputError("--to", f"{to} is not empty; give a folder that is")
    if os.path.isdir(os.path.join(source, "checkpoints")):
        write(source, to)
    elif os.path.isdir(source):
        read(source, to)
    else:
        raise InputError("--from", f"{source} is no folder")


def write(source: str, to: str) -> None:
    """From a run to a folder of diffusers."""
    run = open_run(source, EMA.value, STEP.value)
    if run.params.keys() != {"net"}:
        raise InputError("--from", f"the run trains {', '.join(run.params)}; diffusers has one network")
    model = Model(run.config["network"], run.spec, jax.device_get(run.params["net"]))
    print(f"{to}: {diffusers_pipeline.write(to, model, run.config['objective'])}")


def read(source: str, to: str) -> None:
    """From a folder of diffusers to a run at step 0."""
    try:
        model, sections = diffusers_pipeline.read(source, null_class=NULL_CLASS.value)
    except InputError as error:
        raise error.within("--from") from None
    config = {**base(model.network["name"]), **(sections or {}), "network": dict(model.network)}
    check_sections(config)
    network, objective = network_and_objective(config, model.spec)
    keywords = training(config)
    state = init_state(objective, network, keywords["optimizer"].transform, keywords["ema"], jax.random.key(0))
    net = jax.tree.map(jnp.asarray, model.params)
    averages = {name: {**average, "net": jax.tree.map(jnp.array, net)} for name, average in state.ema.items()}
    state = dataclasses.replace(state, params={**state.params, "net": net}, ema=averages)
    files.make_folder(to, "--to")
    checkpoints = Checkpoints(to)
    meta = {"config": config, "spec": dataclasses.asdict(model.spec)}
    checkpoints.save(0, state, {}, meta)
    checkpoints.wait()
    checkpoints.close()
    with files.replace(os.path.join(to, "config.json")) as file:
        json.dump(config, file, indent=2)
    count = sum(leaf.size for leaf in jax.tree.leaves(net))
    origin = "read from its scheduler" if sections else "the config's: there was no scheduler to read"
    print(f"{to}: {model.network['name']}, {count:,} parameters; objective {origin}")


def base(name: str) -> Mapping[str, Any]:
    """The config that --config gives, or the classical one of the network."""
    if CONFIG.value is not None:
        return CONFIG.value.to_dict()
    file, *arguments = DEFAULTS[name]
    return runpy.run_path(str(CONFIGS / file))["get_config"](*arguments).to_dict()


if __name__ == "__main__":
    cli.run(main)
