"""Reflow on scikit-learn's handwritten digits: a flow retrained on its own pairs of noise and digits, whose paths one
Euler step can follow. VARIANT is `reflow`, or `distill`, which goes on to train that one step alone.

Command:   python -m experiments.train --config=configs/digits_flow.py --workdir=runs/digits_flow
           python -m experiments.train --config=configs/digits_reflow.py:VARIANT --workdir=runs/digits_VARIANT
           The first is the teacher, whose schedule, parameterization and network the student has.
Hardware:  two CPU cores, about five minutes for `reflow` and ten for `distill`.
Expected:  python -m experiments.evaluate --workdir=runs/digits_VARIANT
           docs/few_step.md has their figures beside those of the other methods.
"""

import ml_collections


def get_config(variant: str = "reflow") -> ml_collections.ConfigDict:
    if variant not in ("reflow", "distill"):
        raise LookupError(f"no variant {variant!r}; one of: reflow, distill")
    distill, round_steps = variant == "distill", 1000
    cycles = 2 if distill else 1
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "digits", "split": "train"},
        "objective": {
            "name": "reflow",
            "schedule": {"name": "flow", "shift": 1.0},
            "parameterization": {"name": "velocity"},
            "time_sampler": {"name": "stratified"},
            "weighting": {"name": "simple"},
            "rounds": 1,
            "round_steps": round_steps,
            "distill": distill,
            "pool": 8192,
            "every": 8,
            "ode_steps": 24,
            "guidance": 1.0,
            "teacher": "runs/digits_flow",
        },
        "network": {
            "name": "unet",
            "width": 32,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (4,),
            "head_dim": 32,
            "dropout": 0.0,
            "dtype": "float32",
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup": 50,
            "cycles": cycles,
            "clip": 1.0,
            "b2": 0.99,
            "weight_decay": 1e-4,
        },
        "ema": {"decays": (0.99, 0.998), "warmup": True},
        "train": {
            "steps": cycles * round_steps,
            "batch_size": 128,
            "accumulate": 1,
            "cond_drop_rate": 0.1,
            "log_every": 50,
            "preview_every": 500,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 500, "keep": 2},
        "sampler": {"name": "euler", "steps": 1, "grid": {"name": "trailing"}},
        "guidance": {"name": "cfg", "scale": 1.0},
        "eval": {
            "data": {"name": "digits", "split": "test"},
            "metrics": {
                "svc_accuracy": {"num": 1000, "guidance": 1.0},
                "energy_distance": {"num": 1000, "guidance": 1.0},
            },
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
