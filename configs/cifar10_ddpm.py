"""DDPM on CIFAR-10 without classes, as in Ho et al. 2020 (arXiv 2006.11239).

Command:   python -m experiments.train --config=configs/cifar10_ddpm.py --workdir=runs/cifar10_ddpm
Data:      python -m experiments.prepare_data --config=configs/cifar10_ddpm.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  the paper's: a TPU v3-8, 10.6 hours (recalled).
Expected:  FID 3.17 (recalled): 50,000 samples of the averaged parameters against the training set, 1,000 evaluations
           each; without the average a rerun gives 12 to 14. 35.7 M parameters.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    folder = ml_collections.config_dict.placeholder(str)  # given by --config.data.data_dir; otherwise TFDS' own
    data = {"name": "tfds", "dataset": "cifar10", "labels": False, "data_dir": folder}
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {**data, "split": "train", "flip": True},
        "objective": {
            "name": "denoising",
            "schedule": {"name": "vp", "betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_steps": 1000},
            "parameterization": {"name": "eps", "c_noise": "index"},
            "time_sampler": {"name": "discrete"},
            "weighting": {"name": "simple"},
        },
        "network": {
            "name": "unet",
            "width": 128,
            "channel_mult": (1, 2, 2, 2),
            "num_res_blocks": 2,
            "attention_resolutions": (16,),
            "head_dim": None,
            "scale_shift": False,
            "resample": "conv",
            "asymmetric_padding": True,
            "freq_shift": True,
            "sin_first": True,
            "epsilon": 1e-6,
            "dropout": 0.1,
            "dtype": "float32",
        },
        "optimizer": {
            "name": "adam",
            "learning_rate": 2e-4,
            "schedule": "constant",
            "warmup": 5000,
            "clip": 1.0,
        },
        "ema": {"decays": (0.9999,), "warmup": False},
        "train": {
            "steps": 800_000,
            "batch_size": 128,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 100,
            "preview_every": 10_000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 10_000, "keep": 3},
        "sampler": {"name": "ancestral", "variance": "beta", "steps": 1000, "grid": {"name": "trailing"}},
        "guidance": {"name": "cfg", "scale": 1.0, "threshold": {"limit": 1.0}},
        "eval": {
            "data": {**data, "split": "test"},
            "metrics": {},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
