"""Consistency models on scikit-learn's handwritten digits, in one to a few evaluations: VARIANT is `ct` or `ict` (from
nothing), `cd` or `ect` (from the diffusion model of configs/digits_edm.py), or `cd_joint` (both in one run).

Command:   python -m experiments.train --config=configs/digits_edm.py --workdir=runs/digits_edm
           python -m experiments.train --config=configs/digits_consistency.py:VARIANT --workdir=runs/digits_VARIANT
Hardware:  two CPU cores, about six minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_VARIANT
           docs/few_step.md has the figures of all variants but cd_joint, which is not measured.
"""

import ml_collections

STEPS = {"ct": 2000, "ict": 2500, "ect": 3000, "cd": 1200, "cd_joint": 2500}
VARIANTS = {
    "ct": {
        "discretization": {"name": "square_root", "steps": STEPS["ct"], "start": 2, "end": 18, "decay": 0.5},
        "time_sampler": {"name": "karras"},
        "weighting": "one",
        "metric": "l2",
        "target": "average",
    },
    "ict": {
        "discretization": {"name": "doubling", "steps": STEPS["ict"], "start": 10, "end": 160},
        "time_sampler": {"name": "log_normal", "mean": -0.8, "std": 1.6, "sigma_min": 0.002, "sigma_max": 80.0},
    },
    "ect": {
        "discretization": {"name": "ratio", "every": 500, "q": 2.0, "k": 8.0, "b": 1.0},
        "time_sampler": {"name": "log_normal", "mean": -0.8, "std": 1.6},
        "parameterization": {"name": "edm", "sigma_data": 0.75},
        "sigma_min": 0.0,
        "teacher": "runs/digits_edm",
    },
    "cd": {
        "discretization": {"name": "fixed", "points": 18, "decay": 0.95},
        "time_sampler": {"name": "karras"},
        "weighting": "one",
        "metric": "l2",
        "target": "average",
        "solver": "heun",
        "teacher": "runs/digits_edm",
    },
    "cd_joint": {
        "discretization": {"name": "fixed", "points": 18, "decay": 0.95},
        "time_sampler": {"name": "karras"},
        "weighting": "one",
        "metric": "l2",
        "target": "average",
        "solver": "heun",
        "joint_teacher": {
            "name": "denoising",
            "parameterization": {"name": "edm", "sigma_data": 0.75},
            "time_sampler": {"name": "log_normal", "mean": -0.8, "std": 1.2},
            "weighting": {"name": "edm", "sigma_data": 0.75},
        },
    },
}


def get_config(variant: str = "ect") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise LookupError(f"no variant {variant!r}; one of: {', '.join(VARIANTS)}")
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "digits", "split": "train"},
        "objective": {
            "name": "consistency",
            "schedule": {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0},
            "parameterization": {"name": "consistency", "sigma_data": 0.75, "sigma_min": 0.002},
            **VARIANTS[variant],
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
            "warmup": 100,
            "clip": 1.0,
            "b2": 0.99,
            "weight_decay": 1e-4,
        },
        "ema": {"decays": (0.99, 0.998), "warmup": True},
        "train": {
            "steps": STEPS[variant],
            "batch_size": 128,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 50,
            "preview_every": 1000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 1000, "keep": 2},
        "sampler": {
            "name": "consistency",
            "sigma_min": 0.002,
            "steps": 2,
            "grid": {"name": "exponential", "sigma_min": 0.8},
        },
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
