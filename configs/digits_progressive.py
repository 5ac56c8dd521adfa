"""Progressive distillation on scikit-learn's handwritten digits: from 32 DDIM steps to one, in five rounds.

Command:   python -m experiments.train --config=configs/digits_ddpm_v.py --workdir=runs/digits_ddpm_v
           python -m experiments.train --config=configs/digits_progressive.py --workdir=runs/digits_progressive
           The first is the teacher, whose schedule, parameterization and network the student has.
Hardware:  two CPU cores, about seven minutes for the second.
Expected:  python -m experiments.evaluate --workdir=runs/digits_progressive
           docs/few_step.md has its figures beside those of the other methods.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    start_steps, rounds, round_steps = 16, 5, 400
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "digits", "split": "train"},
        "objective": {
            "name": "progressive_distillation",
            "schedule": {"name": "vp", "betas": "cosine", "num_steps": 1000},
            "parameterization": {"name": "v"},
            "weighting": {"name": "truncated_snr"},
            "start_steps": start_steps,
            "end_steps": start_steps >> (rounds - 1),
            "round_steps": round_steps,
            "continuous": True,
            "teacher": "runs/digits_ddpm_v",
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
            "warmup": 25,
            "cycles": rounds,
            "clip": 1.0,
            "b2": 0.99,
            "weight_decay": 1e-4,
        },
        "ema": {"decays": (0.99,), "warmup": True},  # it forgets a round within the next
        "train": {
            "steps": rounds * round_steps,
            "batch_size": 128,
            "accumulate": 1,
            "cond_drop_rate": 0.1,
            "log_every": 50,
            "preview_every": 500,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 500, "keep": 2},
        "sampler": {"name": "ddim", "eta": 0.0, "steps": 1, "grid": {"name": "trailing"}},
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
