"""ADM on ImageNet at 64x64 with classes, as in Dhariwal & Nichol 2021 (arXiv 2105.05233).

Command:   python -m experiments.train --config=configs/imagenet64_adm.py --workdir=runs/imagenet64_adm
Data:      python -m experiments.prepare_data --config=configs/imagenet64_adm.py
           TFDS downloads 14 GB from image-net.org (not tried): the images of Chrabaszcz et al. 2017 (arXiv 1707.08819),
           1,281,167 and 50,000, each scaled to a square as a whole, where the paper takes its middle (recalled).
Hardware:  the paper's: V100s, about 900 days of one in half precision (recalled). bfloat16 stands in for it here.
Expected:  FID 2.07: 50,000 samples of the averaged parameters against the training set, 250 evaluations each, without
           guidance. 295.9 M parameters.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    folder = ml_collections.config_dict.placeholder(str)  # given by --config.data.data_dir; otherwise TFDS' own
    data = {"name": "tfds", "dataset": "imagenet_resized/64x64", "data_dir": folder}
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {**data, "split": "train", "flip": True},
        "objective": {
            "name": "denoising",
            "schedule": {"name": "vp", "betas": "cosine", "num_steps": 1000},
            "parameterization": {"name": "eps", "c_noise": "index"},
            "time_sampler": {"name": "discrete"},
            "weighting": {"name": "simple"},
            "learned_variance": True,
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
            "dropout": 0.1,
            "outputs": 2,
            "dtype": "bfloat16",
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 3e-4,
            "schedule": "constant",
            "warmup": 0,
            "clip": None,
            "weight_decay": 0.0,
        },
        "ema": {"decays": (0.9999,), "warmup": False},
        "train": {
            "steps": 540_000,
            "batch_size": 2048,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 100,
            "preview_every": 10_000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 5000, "keep": 3},
        "sampler": {"name": "ancestral", "variance": "learned", "steps": 250, "grid": {"name": "linspace"}},
        "guidance": {"name": "cfg", "scale": 1.0, "threshold": {"limit": 1.0}},
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
