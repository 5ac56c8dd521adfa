"""Consistency models on ImageNet at 64x64 with classes: VARIANT is `ct` or `cd` (Song et al. 2023, arXiv 2303.01469),
`ict` (Song & Dhariwal 2023, arXiv 2310.14189) or `ect` (Geng et al. 2024, arXiv 2406.14548), all on ADM's network.

Command:   python -m experiments.train --config=configs/imagenet64_consistency.py:ict --workdir=runs/imagenet64_ict
           cd and ect begin with a model of this network on EDM's path, in runs/imagenet64_edm: imagenet64_adm.py
           with the objective of configs/cifar10_edm.py and network.outputs = 1
Data:      python -m experiments.prepare_data --config=configs/imagenet64_consistency.py
           1,281,167 and 50,000 images, as in configs/imagenet64_adm.py.
Hardware:  the papers': 64 A100 for ct and cd (recalled).
Expected:  FID of 50,000 samples of the averaged parameters against the training set, in one step and in two: ct 13.0
           and 11.1, cd 6.20 and 4.70, ict 4.02 and 3.20 (all recalled). ect's figures are for EDM2's networks: 4.05 and
           2.79 for the smallest at 280 M parameters (recalled). The figures of ct and cd are with LPIPS as the metric,
           a network that is not here.
"""

import ml_collections

STEPS = {"ct": 800_000, "cd": 600_000, "ict": 800_000, "ect": 100_000}
VARIANTS = {
    "ct": {
        "objective": {
            "discretization": {"name": "square_root", "steps": STEPS["ct"], "start": 2, "end": 200, "decay": 0.95},
            "time_sampler": {"name": "karras"},
            "weighting": "one",
            "metric": "l2",
            "target": "average",
        },
        "learning_rate": 8e-6,
        "batch_size": 2048,
        "dropout": 0.0,
        "decay": 0.999943,
    },
    "cd": {
        "objective": {
            "discretization": {"name": "fixed", "points": 40, "decay": 0.95},
            "time_sampler": {"name": "karras"},
            "weighting": "one",
            "metric": "l2",
            "target": "average",
            "solver": "heun",
            "teacher": "runs/imagenet64_edm",
        },
        "learning_rate": 8e-6,
        "batch_size": 2048,
        "dropout": 0.0,
        "decay": 0.999943,
    },
    "ict": {
        "objective": {
            "discretization": {"name": "doubling", "steps": STEPS["ict"], "start": 10, "end": 1280},
            "time_sampler": {"name": "log_normal", "mean": -1.1, "std": 2.0, "sigma_min": 0.002, "sigma_max": 80.0},
        },
        "learning_rate": 1e-4,
        "batch_size": 4096,
        "dropout": 0.2,
        "decay": 0.99997,
    },
    "ect": {
        "objective": {
            "parameterization": {"name": "edm", "sigma_data": 0.5},
            "discretization": {"name": "ratio", "every": 12_500, "q": 2.0, "k": 8.0, "b": 1.0},
            "time_sampler": {"name": "log_normal", "mean": -1.1, "std": 2.0},
            "sigma_min": 0.0,
            "teacher": "runs/imagenet64_edm",
        },
        "learning_rate": 1e-4,
        "batch_size": 1024,
        "dropout": 0.2,
        "decay": 0.9999,
    },
}


def get_config(variant: str = "ict") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise LookupError(f"no variant {variant!r}; one of: {', '.join(VARIANTS)}")
    chosen = VARIANTS[variant]
    folder = ml_collections.config_dict.placeholder(str)  # given by --config.data.data_dir; otherwise TFDS' own
    data = {"name": "tfds", "dataset": "imagenet_resized/64x64", "data_dir": folder}
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {**data, "split": "train", "flip": True},
        "objective": {
            "name": "consistency",
            "schedule": {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0},
            "parameterization": {"name": "consistency", "sigma_data": 0.5, "sigma_min": 0.002},
            **chosen["objective"],
        },
        "network": {
            "name": "unet",
            "width": 192,
            "channel_mult": (1, 2, 3, 4),
            "num_res_blocks": 3,
            "attention_resolutions": (32, 16, 8),
            "head_dim": 64,
            "scale_shift": True,
            "resample": "residual",
            "null_class": False,
            "dropout": chosen["dropout"],
            "dtype": "bfloat16",
        },
        "optimizer": {
            "name": "radam",
            "learning_rate": chosen["learning_rate"],
            "schedule": "constant",
            "warmup": 0,
            "clip": None,
        },
        "ema": {"decays": (chosen["decay"],), "warmup": False},
        "train": {
            "steps": STEPS[variant],
            "batch_size": chosen["batch_size"],
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 100,
            "preview_every": 10_000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 5000, "keep": 3},
        "sampler": {
            "name": "consistency",
            "sigma_min": 0.002,
            "steps": 2,
            "grid": {"name": "exponential", "sigma_min": 0.8},
        },
        "guidance": {"name": "cfg", "scale": 1.0},
        "eval": {
            "data": {**data, "split": "validation"},
            "metrics": {},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        # Megatron's split (Shoeybi et al. 2019, arXiv 1909.08053): a block's inner width over `model`; no effect at 1.
        "sharding": {
            "rules": (
                (r"conv1/kernel$", (None, None, None, "model")),
                (r"conv2/kernel$", (None, None, "model")),
                (r"qkv/kernel$", (None, "model")),
                (r"attention/out/kernel$", ("model",)),
            ),
        },
    })  # fmt: skip
