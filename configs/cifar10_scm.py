"""Continuous-time consistency models on CIFAR-10 without classes, as in Lu & Song 2024 (arXiv 2410.11081).

Command:   python -m experiments.train --config=configs/cifar10_scm.py:teacher --workdir=runs/cifar10_trig
           python -m experiments.train --config=configs/cifar10_scm.py:VARIANT --workdir=runs/cifar10_VARIANT
           VARIANT is `sct`, consistency training that begins with the teacher's weights, or `scd`, distillation
Data:      python -m experiments.prepare_data --config=configs/cifar10_scm.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  eight GPUs of 80 GB; the paper does not say.
Expected:  FID of 50,000 samples of the averaged parameters against the training set, in one step and in two, the second
           of them from theta = 1.1: 2.97 and 2.06 for sct, 3.66 and 2.52 for scd (recalled). Batch, learning rates,
           dropout, warm-up and the law of t are the paper's (recalled). Its network has adaptive double normalisation,
           which is not here. 60.1 M parameters.
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
        "teacher": "runs/cifar10_trig",
        "distill": variant == "scd",
    }
    heun = {"name": "heun", "steps": 18, "grid": {"name": "karras", "rho": 7.0}}
    # theta = 1.1 is t = 0.7003.
    two_steps = {"name": "consistency", "sigma_min": 0.0, "steps": 2}
    two_steps["grid"] = {"name": "given", "times": (1.0, 0.7003, 0.0)}
    batch_size = 512
    folder = ml_collections.config_dict.placeholder(str)  # given by --config.data.data_dir; otherwise TFDS' own
    data = {"name": "tfds", "dataset": "cifar10", "labels": False, "data_dir": folder}
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {**data, "split": "train", "flip": True},
        "objective": teacher if trains_teacher else student,
        "network": {
            "name": "unet",
            "width": 128,
            "channel_mult": (2, 2, 2),
            "num_res_blocks": 4,
            "attention_resolutions": (16,),
            "up_attention": "last",
            "head_dim": None,
            "scale_shift": True,
            "resample": "projected",
            "rescale": True,
            "resample_filter": (1, 1),
            "input_skip": False,
            "embedding": "sinusoidal",
            "freq_shift": True,
            "sin_first": True,
            "epsilon": 1e-6,
            "dropout": {"teacher": 0.13, "sct": 0.2, "scd": 0.0}[variant],
            "dtype": "float32",
        },
        "optimizer": {
            "name": "adam",
            "learning_rate": 1e-3 if trains_teacher else 1e-4,
            "schedule": "constant",
            "warmup": 20_000 if trains_teacher else 0,
            "clip": None,
            "b2": 0.999 if trains_teacher else 0.99,
        },
        "ema": {"decays": (0.5 ** (batch_size / 500_000),), "warmup": True},  # a half-life of 500,000 images
        "train": {
            "steps": 400_000,
            "batch_size": batch_size,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 100,
            "preview_every": 5000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 5000, "keep": 3},
        "sampler": heun if trains_teacher else two_steps,
        "guidance": {"name": "cfg", "scale": 1.0},
        "eval": {
            "data": {**data, "split": "test"},
            "metrics": {},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
