"""Flow matching on two moons in the plane, the noise of a batch coupled to its examples at random or by transport.

Command:   python -m experiments.train --config=configs/moons.py:exact --workdir=runs/moons
           the argument is the coupling: independent, exact or sinkhorn
Hardware:  two CPU cores, under a minute; a few minutes for exact, whose assignment is slow on a CPU.
Expected:  python -m experiments.evaluate --workdir=runs/moons
           `path_curvature` of exact and sinkhorn under a third of that of independent.
"""

import ml_collections


def get_config(coupling: str = "independent") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "toy", "kind": "moons", "split": "train"},
        "objective": {
            "name": "flow_matching",
            "schedule": {"name": "flow", "shift": 1.0},
            "parameterization": {"name": "velocity"},
            "time_sampler": {"name": "stratified"},
            "weighting": {"name": "simple"},
            "coupling": coupling,
            "entropy": 0.05,
        },
        "network": {"name": "mlp", "width": 128, "depth": 3},
        "optimizer": {"name": "adamw", "learning_rate": 2e-3, "schedule": "cosine", "warmup": 100, "clip": 1.0},
        "ema": {"decays": (0.999,), "warmup": True},
        "train": {"steps": 4000, "batch_size": 256, "cond_drop_rate": 0.0, "log_every": 200, "preview_every": 0},
        "checkpoint": {"every": 4000, "keep": 1},
        "sampler": {"name": "ddim", "eta": 0.0, "steps": 50, "grid": {"name": "trailing"}},
        "guidance": {"name": "cfg", "scale": 1.0},
        "eval": {
            "data": {"name": "toy", "kind": "moons", "split": "test"},
            "metrics": {"straightness": {"num": 2000, "steps": 200}},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
