"""Rectified flow, reflow and distillation on CIFAR-10 without classes, as in Liu et al. 2023 (arXiv 2209.03003).

Command:   python -m experiments.train --config=configs/cifar10_reflow.py:flow --workdir=runs/cifar10_flow
           python -m experiments.train --config=configs/cifar10_reflow.py:reflow --workdir=runs/cifar10_reflow
           python -m experiments.train --config=configs/cifar10_reflow.py:distill --workdir=runs/cifar10_reflow_distill
           the argument is `flow`, trained on the data; `reflow`, on the pairs of the first; or `distill`, on those of
           the second in one step
Data:      python -m experiments.prepare_data --config=configs/cifar10_reflow.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  eight GPUs or a TPU v3-8; days for `flow` (not measured).
Expected:  FID of 50,000 samples of the averaged parameters against the training set (recalled): 2.58 for `flow` with
           the adaptive Runge-Kutta method, which takes 127 calls of the network; in one Euler step 12.21 for `reflow`
           and 4.85 for `distill`. The paper distils with LPIPS, and here it is the squared error. It draws its pairs
           beforehand and by Runge-Kutta, some four million (recalled); here 100 Euler steps renew a pool of them.
"""

import ml_collections

RUNS = ("flow", "reflow", "distill")


def get_config(run: str = "reflow") -> ml_collections.ConfigDict:
    if run not in RUNS:
        raise LookupError(f"no run {run!r}; one of: {', '.join(RUNS)}")
    steps = {"flow": 800_000, "reflow": 300_000, "distill": 300_000}[run]
    path = {
        "schedule": {"name": "flow", "shift": 1.0},
        "parameterization": {"name": "velocity"},
        "time_sampler": {"name": "uniform"},
        "weighting": {"name": "simple"},
    }
    flow = {"name": "flow_matching", **path, "coupling": "independent"}
    reflow = {
        "name": "reflow",
        **path,
        "rounds": 1 if run == "reflow" else 0,
        "round_steps": steps,
        "distill": run == "distill",
        "pool": 16_384,
        "every": 8,
        "ode_steps": 100,
        "guidance": 1.0,
        "teacher": "runs/cifar10_flow" if run == "reflow" else "runs/cifar10_reflow",
    }
    runge_kutta = {"name": "rk45", "rtol": 1e-5, "atol": 1e-5}
    sampler = runge_kutta if run == "flow" else {"name": "euler"}
    folder = ml_collections.config_dict.placeholder(str)  # given by --config.data.data_dir; otherwise TFDS' own
    data = {"name": "tfds", "dataset": "cifar10", "labels": False, "data_dir": folder}
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {**data, "split": "train", "flip": True},
        "objective": flow if run == "flow" else reflow,
        "network": {
            "name": "unet",
            "width": 128,
            "channel_mult": (1, 2, 2, 2),
            "num_res_blocks": 4,
            "attention_resolutions": (16,),
            "up_attention": "last",
            "head_dim": None,
            "scale_shift": False,
            "resample": "projected",
            "rescale": True,
            "freq_shift": True,
            "sin_first": True,
            "epsilon": 1e-6,
            "dropout": 0.15 if run == "flow" else 0.0,
            "dtype": "float32",
        },
        "optimizer": {
            "name": "adam",
            "learning_rate": 2e-4,
            "schedule": "constant",
            "warmup": 5000,
            "clip": 1.0,
        },
        "ema": {"decays": (0.999999,), "warmup": True},
        "train": {
            "steps": steps,
            "batch_size": 128,
            "accumulate": 1,
            "cond_drop_rate": 0.0,
            "log_every": 100,
            "preview_every": 10_000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 10_000, "keep": 3},
        "sampler": {**sampler, "steps": 1, "grid": {"name": "trailing"}},
        "guidance": {"name": "cfg", "scale": 1.0},
        "eval": {
            "data": {**data, "split": "test"},
            "metrics": {},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        "sharding": {"rules": ()},
    })  # fmt: skip
