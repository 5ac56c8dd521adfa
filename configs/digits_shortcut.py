"""A shortcut model on scikit-learn's handwritten digits: steps of 1, 1/2, 1/4, ..., trained from nothing.

Command:   python -m experiments.train --config=configs/digits_shortcut.py --workdir=runs/digits_shortcut
Hardware:  two CPU cores, about ten minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_shortcut
           docs/few_step.md has the figures, at one evaluation and at more (--steps=2).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "digits", "split": "train"},
        "objective": {
            "name": "shortcut",
            "schedule": {"name": "flow", "shift": 1.0},
            "c_noise": "unit",
            "time_sampler": {"name": "stratified"},
            "base_steps": 128,
            "bootstrap": 0.25,
            "guidance": 1.0,
        },
        "network": {
            "name": "unet",
            "scalar_conditions": ("step_size",),
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
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "warmup": 100,
            "clip": 1.0,
            "b2": 0.99,
            "weight_decay": 1e-4,
        },
        "ema": {"decays": (0.99, 0.998), "warmup": True},
        "train": {
            "steps": 2500,
            "batch_size": 128,
            "accumulate": 1,
            "cond_drop_rate": 0.1,
            "log_every": 50,
            "preview_every": 500,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 500, "keep": 2},
        "sampler": {"name": "flow_map", "steps": 1, "grid": {"name": "trailing"}},
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
