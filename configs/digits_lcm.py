"""Latent consistency distillation on scikit-learn's handwritten digits, pixels in the latents' place: one or two
evaluations, guided by a scale that the network is told, from the model of configs/digits_ddpm_v.py.

Command:   python -m experiments.train --config=configs/digits_ddpm_v.py --workdir=runs/digits_ddpm_v
           python -m experiments.train --config=configs/digits_lcm.py --workdir=runs/digits_lcm
Hardware:  two CPU cores, about eight minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_lcm
           docs/few_step.md has the figures.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "digits", "split": "train"},
        "objective": {
            "name": "latent_consistency",
            "schedule": {"name": "vp", "betas": "cosine", "num_steps": 1000},
            "parameterization": {"name": "v"},
            "skip": 20,
            "ddim_steps": 50,
            "guidance": (1.0, 4.0),
            "target_decay": 0.95,
            "timestep_scaling": 10.0,
            "metric": "pseudo_huber",
            "huber": 0.001,
            "teacher": "runs/digits_ddpm_v",
        },
        "network": {
            "name": "unet",
            "scalar_conditions": ("guidance_scale",),
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
            "warmup": 100,
            "clip": 1.0,
            "b2": 0.99,
            "weight_decay": 1e-4,
        },
        "ema": {"decays": (0.99, 0.998), "warmup": True},
        "train": {
            "steps": 1500,
            "batch_size": 128,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 50,
            "preview_every": 1000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 1000, "keep": 2},
        "sampler": {"name": "lcm", "steps": 2, "grid": {"name": "trailing"}},
        "guidance": {"name": "guidance_embedding", "scale": 1.5},
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
