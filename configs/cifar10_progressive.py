"""Progressive distillation on CIFAR-10 without classes, as in Salimans & Ho 2022 (arXiv 2202.00512): from 8,192 DDIM
steps to a few.

Command:   python -m experiments.train --config=configs/cifar10_progressive.py:teacher --workdir=runs/cifar10_v
           python -m experiments.train --config=configs/cifar10_progressive.py:4 --workdir=runs/cifar10_progressive_4
           the argument is `teacher`, the model that is distilled, or the number of steps to end with: 8, 4, 2 or 1
Data:      python -m experiments.prepare_data --config=configs/cifar10_progressive.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  the paper's: 8 TPU chips (recalled).
Expected:  FID of 50,000 samples of the averaged parameters against the training set: 2.57 in 8 steps, 3.00 in 4, 4.51
           in 2 and 9.12 in one (recalled; table 2). The paper gives the rounds of 2 and of one step 100,000 training
           steps and the others 50,000 (recalled); here each has 50,000. Settings not in the paper's text are those of
           its published code, as far as recalled. The schedule is the paper's cosine as a table of 1,024 betas.
"""

import ml_collections

RUNS = ("teacher", "8", "4", "2", "1")


def get_config(run: str = "4") -> ml_collections.ConfigDict:
    if run not in RUNS:
        raise LookupError(f"no run {run!r}; one of: {', '.join(RUNS)}")
    trains_teacher = run == "teacher"
    # A power of two, so that the steps of every round are points of the table.
    schedule = {"name": "vp", "betas": "cosine", "num_steps": 1024}
    start_steps, end_steps, round_steps = 4096, 1 if trains_teacher else int(run), 50_000
    sampling_steps = 1024 if trains_teacher else end_steps
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
        "teacher": "runs/cifar10_v",
    }
    folder = ml_collections.config_dict.placeholder(str)  # given by --config.data.data_dir; otherwise TFDS' own
    data = {"name": "tfds", "dataset": "cifar10", "labels": False, "data_dir": folder}
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {**data, "split": "train", "flip": True},
        "objective": teacher if trains_teacher else student,
        "network": {
            "name": "unet",
            "width": 256,
            "channel_mult": (1, 1, 1),
            "num_res_blocks": 3,
            "attention_resolutions": (16, 8),
            "head_dim": None,
            "scale_shift": True,
            "resample": "residual",
            "dropout": 0.2 if trains_teacher else 0.0,
            "dtype": "float32",
        },
        "optimizer": {
            "name": "adam",
            "learning_rate": 2e-4 if trains_teacher else 1e-4,
            "schedule": "constant" if trains_teacher else "linear",
            "warmup": 1000 if trains_teacher else 0,
            "cycles": 1 if trains_teacher else rounds,
            "clip": 1.0,
        },
        "ema": {"decays": (0.9999,), "warmup": True},
        "train": {
            "steps": 800_000 if trains_teacher else rounds * round_steps,
            "batch_size": 128,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 100,
            "preview_every": 10_000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 10_000, "keep": 3},
        "sampler": {"name": "ddim", "eta": 0.0, "steps": sampling_steps, "grid": {"name": "trailing"}},
        "guidance": {"name": "cfg", "scale": 1.0},
        "eval": {
            "data": {**data, "split": "test"},
            "metrics": {},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
