"""A training that is small enough to be killed a hundred times, and that records what it does.

Use it as `--config=tests/chaos/config.py:NAME` with the name of a case below. It writes to the folder NOTES:
`batches.P`, a line with step and hash for each batch of process P; `doing.P`, its activities, the current one last; and
`state.npz`, all arrays of the last checkpoint.
"""

import hashlib
import itertools
import os
import runpy
import time

import jax
import ml_collections
import numpy as np

from diffusion.core.trees import path_name
from diffusion.data.sources.digits import Digits
from diffusion.distributed import sharding
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.resilience.watchdog import Watchdog

VP, TRIG, FLOW = {"name": "vp", "num_steps": 1000}, {"name": "trig"}, {"name": "flow"}
CURRICULUM = {"name": "square_root", "steps": 40, "start": 2, "end": 9}
TEACHERS = {
    "eps": {"name": "denoising", "schedule": VP, "parameterization": {"name": "eps"}},
    "v": {"name": "denoising", "schedule": TRIG, "parameterization": {"name": "v"}},
    "velocity": {"name": "denoising", "schedule": FLOW, "parameterization": {"name": "velocity"}},
}


def distilled(name, teacher, **options):
    like = {key: TEACHERS[teacher][key] for key in ("schedule", "parameterization")}
    return {"name": name, **like, "teacher": teacher, **options}


CASES = {
    "autoencoder": {"name": "autoencoder", "disc_weight": 0.5, "disc_start": 10, "disc_layers": 1, "disc_width": 4,
                    "codebook": "ema", "codebook_decay": 0.9},
    "denoising": {"name": "denoising", "time_sampler": {"name": "importance", "bins": 4, "history": 2}},
    "flow_matching": {"name": "flow_matching"},
    "vdm": {"name": "vdm"},
    "consistency": {"name": "consistency", "discretization": CURRICULUM, "target": "average", "sigma_min": 0.002},
    "continuous_consistency": {"name": "continuous_consistency", "warmup": 10},
    "latent_consistency": distilled("latent_consistency", "eps"),
    "mean_flow": {"name": "mean_flow"},
    "progressive_distillation": distilled("progressive_distillation", "v", start_steps=4, round_steps=15),
    "reflow": distilled("reflow", "velocity", round_steps=20, rounds=2, pool=32, every=4, ode_steps=2),
    "shortcut": {"name": "shortcut"},
}  # fmt: skip
STEPS, EVERY = 60, 6


def get_config(name: str) -> ml_collections.ConfigDict:
    config = runpy.run_path("configs/digits.py")["get_config"]()
    config.objective = {**CASES, **TEACHERS}[name]
    del config.sampler  # the default is that of the objective
    config.network = {"name": "mlp", "width": 8, "depth": 1}
    if name in ("mean_flow", "shortcut", "latent_consistency"):
        config.network.scalar_conditions = ("step_size", "guidance_scale")
    if name == "autoencoder":
        config.network = {"name": "autoencoder_vq", "block_out_channels": (4, 4), "layers_per_block": 1,
                          "norm_num_groups": 2, "num_vq_embeddings": 16}  # fmt: skip
    config.optimizer.warmup = 1
    config.train.update(
        steps=2 if name in TEACHERS else STEPS,
        batch_size=16,
        log_every=1,
        preview_every=0,
        prefetch=1,
        hang_timeout=10.0,
    )
    config.checkpoint.update(every=EVERY)
    if "NOTES" in os.environ:
        take_notes(os.environ["NOTES"])
    return config


def take_notes(folder: str) -> None:
    at, rank = {"step": 0}, os.environ["RANK"]

    def note(name: str, text: str) -> None:
        with open(os.path.join(folder, f"{name}.{rank}"), "a") as file:
            file.write(text + "\n")

    def before(owner, name, what) -> None:
        original = getattr(owner, name)

        def noted(*args, **keywords):
            what(*args)
            return original(*args, **keywords)

        setattr(owner, name, noted)

    def beat(watchdog, text, *_) -> None:
        if text.startswith("the data of step "):
            at["step"] = int(text.split()[-1])
        elif text.startswith("step "):
            time.sleep(PACE)
        note("doing", text)

    def to_global(batch, _) -> None:
        digest = hashlib.sha256(batch["x"].tobytes() + batch["cond"]["label"].tobytes())
        note("batches", f"{at['step']} {digest.hexdigest()}")

    def save(checkpoints, step, state, *_) -> None:
        if step == STEPS and rank == "0":
            leaves = jax.tree.leaves_with_path(state)
            np.savez(os.path.join(folder, "state.npz"), **{path_name(path): leaf for path, leaf in leaves})

    now, passed = time.time, itertools.count()
    if CLOCK:
        time.time = lambda: now() + CLOCK * next(passed)

    def read(*_) -> None:
        if at["step"] >= HANGS:
            time.sleep(3600)

    before(Digits, "__getitem__", read)
    before(Watchdog, "beat", beat)
    note("doing", "the start")
    before(sharding, "to_global", to_global)
    before(Checkpoints, "save", save)
    before(Checkpoints, "restore", lambda *_: note("doing", "the restore"))


HANGS = int(os.environ.get("HANGS", 10**9))  # first step for which reading the data hangs
CLOCK = float(os.environ.get("CLOCK", 0))  # seconds by which the wall clock jumps whenever it is read
PACE = float(os.environ.get("PACE", 0))  # additional seconds per step
