"""Continuous-time consistency models on ImageNet at 64x64 with classes, as in Lu & Song 2024 (arXiv 2410.11081), on
EDM2's network of the smallest of the paper's sizes, S.

Command:   python -m experiments.train --config=configs/imagenet64_scm.py:teacher --workdir=runs/imagenet64_trig
           python -m experiments.train --config=configs/imagenet64_scm.py:VARIANT --workdir=runs/imagenet64_VARIANT
           VARIANT is `sct`, consistency training that begins with the teacher's weights, or `scd`, distillation
Data:      python -m experiments.prepare_data --config=configs/imagenet64_scm.py
           1,281,167 and 50,000 images, as in configs/imagenet64_adm.py.
Hardware:  32 GPUs of 80 GB; the paper does not say.
Expected:  FID of 50,000 samples of the averaged parameters against the training set, without guidance, in one step and
           in two, the second of them from theta = 1.1: 3.23 and 2.05 for sct, 2.97 and 2.07 for scd (recalled); the
           paper's largest, width 384, has 2.04 and 1.48 for sct, 2.44 and 1.66 for scd (recalled). Batch, steps,
           warm-up and the law of t are the paper's (recalled); learning rates go by EDM2's, which turn the weights,
           and fall along a cosine in place of an inverse square root. Its network has adaptive double normalisation,
           which is not here. 280.2 M parameters.
"""

import ml_collections

VARIANTS = ("teacher", "sct", "scd")


def get_config(variant: str = "sct") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise LookupError(f"no variant {variant!r}; one of: {', '.join(VARIANTS)}")
    trains_teacher = variant == "teacher"
    teacher = {
        "name": "flow_matching",
        "schedule": {"name": "trig", "sigma_data": 0.5},
        "parameterization": {"name": "edm", "sigma_data": 0.5, "c_noise": "unit"},
        "time_sampler": {"name": "log_normal", "mean": -1.0, "std": 1.4},
        "weighting": {"name": "simple"},
        "coupling": "independent",
    }
    student = {
        "name": "continuous_consistency",
        "sigma_data": 0.5,
        "c_noise": "unit",
        "mean": -1.0,
        "std": 1.4,
        "warmup": 10_000,
        "normalize": "norm",
        "adaptive": True,
        "teacher": "runs/imagenet64_trig",
        "distill": variant == "scd",
    }
    heun = {"name": "heun", "steps": 18, "grid": {"name": "karras", "rho": 7.0}}
    # theta = 1.1 is t = 0.7003.
    two_steps = {"name": "consistency", "sigma_min": 0.0, "steps": 2}
    two_steps["grid"] = {"name": "given", "times": (1.0, 0.7003, 0.0)}
    folder = ml_collections.config_dict.placeholder(str)  # given by --config.data.data_dir; otherwise TFDS' own
    data = {"name": "tfds", "dataset": "imagenet_resized/64x64", "data_dir": folder}
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {**data, "split": "train", "flip": True},
        "objective": teacher if trains_teacher else student,
        "network": {
            "name": "edm2",
            "width": 192,
            "channel_mult": (1, 2, 3, 4),
            "num_res_blocks": 3,
            "attention_resolutions": (16, 8),
            "head_dim": 64,
            "bandwidth": 1.0,
            "dropout": 0.0,
            "dtype": "bfloat16",
        },
        "optimizer": {
            "name": "adam",
            "learning_rate": 1e-2 if trains_teacher else 1e-3,
            "schedule": "cosine",
            "warmup": 5000,
            "clip": None,
            "b2": 0.99,
        },
        "ema": {"decays": (0.9999,), "warmup": True},
        "train": {
            "steps": 400_000,
            "batch_size": 2048,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 100,
            "preview_every": 10_000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 5000, "keep": 3},
        "sampler": heun if trains_teacher else two_steps,
        "guidance": {"name": "cfg", "scale": 1.0},
        "eval": {
            "data": {**data, "split": "validation"},
            "metrics": {},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
