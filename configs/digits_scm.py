"""Continuous-time consistency models on scikit-learn's handwritten digits, in one or two evaluations: VARIANT is `sct`
(from nothing) or `scd` (from the flow of configs/digits_trig.py).

Command:   python -m experiments.train --config=configs/digits_trig.py --workdir=runs/digits_trig
           python -m experiments.train --config=configs/digits_scm.py:VARIANT --workdir=runs/digits_VARIANT
Hardware:  two CPU cores, about ten minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_VARIANT
           docs/few_step.md has the figures of both variants.
"""

import ml_collections

VARIANTS = {
    "sct": {"teacher": None, "warmup": 1000},
    "scd": {"teacher": "runs/digits_trig", "warmup": 300},
}
STEPS = {"sct": 2000, "scd": 2000}


def get_config(variant: str = "scd") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise LookupError(f"no variant {variant!r}; one of: {', '.join(VARIANTS)}")
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "digits", "split": "train"},
        "objective": {
            "name": "continuous_consistency",
            "sigma_data": 0.75,
            "c_noise": "unit",
            "mean": -1.0,
            "std": 1.4,
            "normalize": "norm",
            "adaptive": True,
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
        "sampler": {"name": "consistency", "sigma_min": 0.0, "steps": 2, "grid": {"name": "trailing"}},
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
