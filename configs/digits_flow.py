"""Flow matching on scikit-learn's handwritten digits: the straight path, its velocity, Euler steps.

Command:   python -m experiments.train --config=configs/digits_flow.py --workdir=runs/digits_flow
Hardware:  two CPU cores, about four minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_flow
           as for configs/digits.py, which differs in the objective and the sampler's grid alone.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "digits", "split": "train"},
        "objective": {
            "name": "flow_matching",
            "schedule": {"name": "flow", "shift": 1.0},
            "parameterization": {"name": "velocity"},
            "time_sampler": {"name": "stratified"},
            "weighting": {"name": "simple"},
            "coupling": "independent",
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
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "warmup": 100,
            "clip": 1.0,
            "b2": 0.99,
            "weight_decay": 1e-4,
        },
        "ema": {"decays": (0.99, 0.998), "warmup": True},
        "train": {
            "steps": 2000,
            "batch_size": 128,
            "accumulate": 1,
            "cond_drop_rate": 0.1,
            "log_every": 50,
            "preview_every": 500,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 500, "keep": 2},
        "sampler": {"name": "ddim", "eta": 0.0, "steps": 50, "grid": {"name": "trailing"}},
        "guidance": {"name": "cfg", "scale": 1.5},
        "eval": {
            "data": {"name": "digits", "split": "test"},
            "metrics": {
                "svc_accuracy": {"num": 1000, "guidance": 1.5},
                "energy_distance": {"num": 1000, "guidance": 1.0},
            },
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
