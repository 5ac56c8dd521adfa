"""EDM's preconditioning, law of noise levels and grid on scikit-learn's handwritten digits.

Command:   python -m experiments.train --config=configs/digits_edm.py --workdir=runs/digits_edm
Hardware:  two CPU cores, about four minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_edm
           as for configs/digits.py, which differs in the objective and the sampler's grid alone.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "digits", "split": "train"},
        "objective": {
            "name": "denoising",
            "schedule": {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0},
            "parameterization": {"name": "edm", "sigma_data": 0.75},
            "time_sampler": {"name": "log_normal", "mean": -0.8, "std": 1.2},
            "weighting": {"name": "edm", "sigma_data": 0.75},
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
        "sampler": {"name": "ddim", "eta": 0.0, "steps": 50, "grid": {"name": "karras", "rho": 7.0}},
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
