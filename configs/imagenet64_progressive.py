"""Progressive distillation on ImageNet at 64x64 with classes, as in Salimans & Ho 2022 (arXiv 2202.00512): from 2,048
DDIM steps to a few.

Command:   python -m experiments.train --config=configs/imagenet64_progressive.py:teacher --workdir=runs/imagenet64_v
           python -m experiments.train --config=configs/imagenet64_progressive.py:4 --workdir=runs/imagenet64_prog_4
           the argument is `teacher`, the model that is distilled, or the number of steps to end with: 8, 4, 2 or 1
Data:      python -m experiments.prepare_data --config=configs/imagenet64_progressive.py
           1,281,167 and 50,000 images, as in configs/imagenet64_adm.py.
Hardware:  the paper's: 64 TPU chips (recalled). bfloat16 is ours.
Expected:  FID of 50,000 samples of the averaged parameters against the training set, without guidance: 6.77 in 4 steps,
           8.95 in 2 and 15.39 in one (recalled, as Song et al. 2023, arXiv 2303.01469, table 2, quotes them). The paper
           gives the rounds of 2 and of one step twice as many training steps as the others (recalled); here each has
           50,000. Settings not in the paper's text are those of its published code, as far as recalled. The schedule is
           the paper's cosine as a table of 1,024 betas.
"""

import ml_collections

RUNS = ("teacher", "8", "4", "2", "1")


def get_config(run: str = "4") -> ml_collections.ConfigDict:
    if run not in RUNS:
        raise LookupError(f"no run {run!r}; one of: {', '.join(RUNS)}")
    trains_teacher = run == "teacher"
    # A power of two, so that the steps of every round are points of the table.
    schedule = {"name": "vp", "betas": "cosine", "num_steps": 1024}
    start_steps, end_steps, round_steps = 1024, 1 if trains_teacher else int(run), 50_000
    sampling_steps = 256 if trains_teacher else end_steps
    rounds = (start_steps // end_steps).bit_length()
    teacher = {
        "name": "denoising",
        "schedule": schedule,
        "parameterization": {"name": "v"},
        "time_sampler": {"name": "uniform"},
        "weighting": {"name": "truncated_snr"},
    }
    student = {
        "name": "progressive_distillation",
        "schedule": schedule,
        "parameterization": {"name": "v"},
        "weighting": {"name": "truncated_snr"},
        "start_steps": start_steps,
        "end_steps": end_steps,
        "round_steps": round_steps,
        "continuous": False,
        "teacher": "runs/imagenet64_v",
    }
    folder = ml_collections.config_dict.placeholder(str)  # given by --config.data.data_dir; otherwise TFDS' own
    data = {"name": "tfds", "dataset": "imagenet_resized/64x64", "data_dir": folder}
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {**data, "split": "train", "flip": True},
        "objective": teacher if trains_teacher else student,
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
            "dropout": 0.0,
            "dtype": "bfloat16",
        },
        "optimizer": {
            "name": "adam",
            "learning_rate": 3e-4 if trains_teacher else 1e-4,
            "schedule": "constant" if trains_teacher else "linear",
            "warmup": 1000 if trains_teacher else 0,
            "cycles": 1 if trains_teacher else rounds,
            "clip": 1.0,
        },
        "ema": {"decays": (0.9999,), "warmup": True},
        "train": {
            "steps": 550_000 if trains_teacher else rounds * round_steps,
            "batch_size": 2048,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 100,
            "preview_every": 10_000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 5000, "keep": 3},
        "sampler": {"name": "ddim", "eta": 0.0, "steps": sampling_steps, "grid": {"name": "trailing"}},
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
