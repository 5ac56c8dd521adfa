"""MeanFlow on scikit-learn's handwritten digits: from noise to data in one step, trained from nothing.

Command:   python -m experiments.train --config=configs/digits_mean_flow.py --workdir=runs/digits_mean_flow
Hardware:  two CPU cores, about ten minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_mean_flow
           docs/few_step.md has the figures, at one evaluation and at more (--steps=2).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "digits", "split": "train"},
        "objective": {
            "name": "mean_flow",
            "schedule": {"name": "flow", "shift": 1.0},
            "c_noise": "unit",
            "time_sampler": {"name": "logit_normal", "mean": -0.4, "std": 1.0},
            "ratio_r_neq_t": 0.25,
            "norm_p": 1.0,
            "norm_eps": 1e-3,
            "guidance": 1.0,
            "kappa": 0.0,
            "interval": (0.0, 1.0),
            "tangent": "conditional",
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
