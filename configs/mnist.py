"""DDPM on MNIST: a class-conditional U-Net on 60,000 images of 28x28.

Command:   python -m experiments.train --config=configs/mnist.py --workdir=runs/mnist
Data:      python -m experiments.prepare_data --config=configs/mnist.py    (TFDS downloads it; 60,000 and 10,000 images)
Hardware:  not measured; meant for one GPU.
Expected:  not measured.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    folder = ml_collections.config_dict.placeholder(str)  # given by --config.data.data_dir; otherwise TFDS' own
    data = {"name": "tfds", "dataset": "mnist", "data_dir": folder}
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {**data, "split": "train"},
        "objective": {
            "name": "denoising",
            "schedule": {"name": "vp", "betas": "linear", "num_steps": 1000},
            "parameterization": {"name": "eps"},
            "time_sampler": {"name": "stratified"},
            "weighting": {"name": "simple"},
        },
        "network": {
            "name": "unet",
            "width": 64,
            "channel_mult": (1, 2, 2),  # 28, 14 and 7 pixels
            "num_res_blocks": 2,
            "attention_resolutions": (14, 7),
            "head_dim": 64,
            "dropout": 0.1,
            "dtype": "float32",
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup": 500,
            "clip": 1.0,
            "b2": 0.99,
            "weight_decay": 1e-4,
        },
        "ema": {"decays": (0.999,), "warmup": True},
        "train": {
            "steps": 20_000,
            "batch_size": 128,
            "accumulate": 1,
            "cond_drop_rate": 0.1,
            "log_every": 100,
            "preview_every": 2000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 2000, "keep": 2},
        "sampler": {"name": "ddim", "eta": 0.0, "steps": 50, "grid": {"name": "trailing"}},
        "guidance": {"name": "cfg", "scale": 1.5},
        "eval": {
            "data": {**data, "split": "test"},
            "metrics": {},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
