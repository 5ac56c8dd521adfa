"""MeanFlow on CIFAR-10 without classes, as in Geng et al. 2025 (arXiv 2505.13447), but for its augmentation.

Command:   python -m experiments.train --config=configs/cifar10_mean_flow.py --workdir=runs/cifar10_mean_flow
Data:      python -m experiments.prepare_data --config=configs/cifar10_mean_flow.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  the paper does not say; one step costs about 1.25 times one of flow matching.
Expected:  FID 2.92: 50,000 samples of the averaged parameters against the training set, in one step. That is with the
           augmentation of EDM without its vertical mirror images and rotations, which is not here: with horizontal
           mirror images alone, as here, expect it to be higher. The network is EDM's ddpmpp (55.7 M parameters) and
           the embedding of the step's length; the warm-up and the average's decay are recalled.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    folder = ml_collections.config_dict.placeholder(str)  # given by --config.data.data_dir; otherwise TFDS' own
    data = {"name": "tfds", "dataset": "cifar10", "labels": False, "data_dir": folder}
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {**data, "split": "train", "flip": True},
        "objective": {
            "name": "mean_flow",
            "schedule": {"name": "flow", "shift": 1.0},
            "c_noise": "unit",
            "time_sampler": {"name": "logit_normal", "mean": -2.0, "std": 2.0},
            "ratio_r_neq_t": 0.75,
            "norm_p": 0.75,
            "norm_eps": 1e-3,
            "guidance": 1.0,
            "kappa": 0.0,
            "interval": (0.0, 1.0),
            "tangent": "conditional",
        },
        "network": {
            "name": "unet",
            "scalar_conditions": ("step_size",),
            "width": 128,
            "channel_mult": (2, 2, 2),
            "num_res_blocks": 4,
            "attention_resolutions": (16,),
            "up_attention": "last",
            "head_dim": None,
            "scale_shift": False,
            "resample": "projected",
            "rescale": True,
            "resample_filter": (1, 1),
            "input_skip": False,
            "embedding": "sinusoidal",
            "freq_shift": True,
            "sin_first": True,
            "epsilon": 1e-6,
            "dropout": 0.2,
            "dtype": "float32",
        },
        "optimizer": {
            "name": "adam",
            "learning_rate": 6e-4,
            "schedule": "constant",
            "warmup": 10_000,
            "clip": None,
        },
        "ema": {"decays": (0.99995,), "warmup": True},
        "train": {
            "steps": 800_000,
            "batch_size": 1024,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 100,
            "preview_every": 5000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 5000, "keep": 3},
        "sampler": {"name": "flow_map", "steps": 1, "grid": {"name": "trailing"}},
        "guidance": {"name": "cfg", "scale": 1.0},
        "eval": {
            "data": {**data, "split": "test"},
            "metrics": {},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
