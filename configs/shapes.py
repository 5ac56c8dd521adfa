"""Flow matching on 32x32 pictures of coloured shapes, drawn as they are needed: a U-Net without any condition.

Command:   python -m experiments.train --config=configs/shapes.py --workdir=runs/shapes
Hardware:  two CPU cores, about fifteen minutes.
Expected:  python -m experiments.evaluate --workdir=runs/shapes
           readable_shapes 0.39, the share of 1,000 samples close to a picture that the data may have; shapes_off 0.21
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "shapes", "split": "train", "size": 32, "captions": False},
        "objective": {
            "name": "flow_matching",
            "schedule": {"name": "flow", "shift": 1.0},
            "parameterization": {"name": "velocity"},
            "time_sampler": {"name": "stratified"},
            "weighting": {"name": "simple"},
            "coupling": "independent",
        },
        "network": {
            "name": "unet",
            "width": 16,
            "channel_mult": (1, 2, 4),
            "num_res_blocks": 1,
            "attention_resolutions": (8,),
            "head_dim": 32,
            "dropout": 0.0,
            "dtype": "float32",
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "warmup": 100,
            "clip": 1.0,
            "b2": 0.99,
            "weight_decay": 1e-4,
        },
        "ema": {"decays": (0.99, 0.998), "warmup": True},
        "train": {
            "steps": 1500,
            "batch_size": 64,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 50,
            "preview_every": 500,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 500, "keep": 2},
        "sampler": {"name": "ddim", "eta": 0.0, "steps": 50, "grid": {"name": "trailing"}},
        "guidance": {"name": "cfg", "scale": 1.0},
        "eval": {
            "data": {"name": "shapes", "split": "test", "size": 32},
            "metrics": {"readable_shapes": {"num": 1000, "guidance": 1.0}},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
