"""Converts between the workdirs of runs and the folders of diffusers."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core import files
from diffusion.core.types import InputError
from diffusion.interop import diffusers_pipeline
from diffusion.interop.diffusers_models import Model
from diffusion.pipelines import autoencoder_training
from diffusion.pipelines.build_training import training
from diffusion.pipelines.config import check_config, resolve
from diffusion.pipelines.model import build_model
from diffusion.pipelines.run import open_run
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.state import init_state


def export_run(
    workdir: str, folder: str, *, ema: str | None = None, step: int | None = None, shift: bool = False
) -> str:
    """Writes a run as a diffusers pipeline, or as a model if diffusers has no scheduler for its objective.

    An autoencoder is written as a model with the scale of its latents.

    Args:
      workdir: The workdir of the run.
      folder: The folder to write.
      ema: The average of the parameters to write: the config's last if None, the raw parameters if "none".
      step: The step of the checkpoint; the newest if None.
      shift: For an autoencoder, write the mean of its latents as their shift.

    Returns:
      What was written, in words.

    Raises:
      InputError: The run cannot be read, or diffusers has no such model.
    """
    run = open_run(workdir, ema, step)
    if hasattr(run.objective, "reconstruct"):
        with files.new_folder(folder, "--to") as partial:
            return autoencoder_training.write_folder(run, partial, shift)
    if shift:
        raise InputError("--shift", "is for runs that train an autoencoder; leave it out")
    if run.params.keys() != {"net"}:
        raise InputError("--from", f"the run trains {', '.join(run.params)}; a diffusers model has a single network")
    spec = run.model.spec(run.spec)
    model = Model(run.config["network"], spec, jax.device_get(run.params["net"]))
    with files.new_folder(folder, "--to") as partial:
        return diffusers_pipeline.write(partial, model, run.config)


def _drop_rate(config: Mapping[str, Any], model: Model) -> float | Mapping[str, float]:
    """Returns `train.cond_drop_rate`, which is above 0 if the model has a null class, so that it can be guided."""
    if not model.spec.num_classes or not model.network.get("null_class", True):
        return 0.0
    return config.get("train", {}).get("cond_drop_rate") or 0.1


def import_folder(
    folder: str, workdir: str, base_config: Callable[[str], Mapping[str, Any]], *, null_class: bool = False,
    variant: str | None = None,
) -> str:  # fmt: skip
    """Writes a diffusers model or pipeline as a run at step 0.

    The run has no autoencoder, so that a model of latents samples latents. The folder does not say how often training
    dropped the class; a model with a null class counts as one that was trained with 10 % of it, unless the config says
    otherwise.

    Args:
      folder: The folder of the model or the pipeline.
      workdir: The workdir to write.
      base_config: Returns the config that completes a network of the given name, for the sections that the folder does
        not determine.
      null_class: Whether the last class of a U-Net is the one for unconditional samples.
      variant: The variant of the weights, such as `fp16`; None: the weights without one, or the only ones.

    Returns:
      What was written, in words.

    Raises:
      InputError: The folder cannot be read, or the workdir not be written.
    """
    try:
        model, sections = diffusers_pipeline.read(folder, null_class=null_class, variant=variant)
    except InputError as error:
        raise error.within("--from") from None
    name = model.network["name"]
    config = {**base_config(name), **(sections or {}), "network": dict(model.network), "autoencoder": None}
    config["train"] = {**config.get("train", {}), "cond_drop_rate": _drop_rate(config, model)}
    config = resolve(config)
    check_config(config)
    network, objective, *_ = build_model(config, model.spec)
    keywords = training(config)
    state = init_state(objective, network, keywords["optimizer"], keywords["ema"], jax.random.key(0))
    net = jax.tree.map(jnp.asarray, model.params)
    averages = {key: {**average, "net": jax.tree.map(jnp.array, net)} for key, average in state.ema.items()}
    state = dataclasses.replace(state, params={**state.params, "net": net}, ema=averages)
    with files.new_folder(workdir, "--to") as partial:
        checkpoints = Checkpoints(partial)
        checkpoints.save(0, state, {}, {"config": config, "spec": dataclasses.asdict(model.spec)})
        checkpoints.close()
        files.write_json(os.path.join(partial, "config.json"), config)
    count = sum(leaf.size for leaf in jax.tree.leaves(net))
    origin = "from its scheduler" if sections else "from the config, as there is no scheduler"
    return (
        f"{name}, {count:,} parameters; objective {origin}; data ({config['data']['name']}), optimizer and metrics "
        "from the config"
    )
