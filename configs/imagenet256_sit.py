"""SiT on latents of ImageNet at 256x256, as in Ma et al. 2024 (arXiv 2401.08740): DiT's networks by flow matching.

Command:   python -m experiments.train --config=configs/imagenet256_sit.py:XL/2 --workdir=runs/imagenet256_sit
           the argument is SIZE/PATCH: S, B, L or XL, with patches of 2, 4 or 8 latent pixels a side
Data:      data/imagenet256/train/x.npy, float16 [2562334, 32, 32, 4], and label.npy, and the same in
           data/imagenet256/validation: configs/imagenet256_dit.py says of what.
Hardware:  the paper's: a TPU v4-64, 6.8 steps a second for XL/2 (recalled).
Expected:  FID of 50,000 samples of the averaged parameters, 250 evaluations each: XL/2 after 7 M steps at guidance 1.5
           2.06 by this sampler and 2.15 by the ODE (heun, recalled). After 400,000 steps without guidance about: S/2
           57.6, B/2 33.0, L/2 18.8, XL/2 17.2 (recalled).
           Two things differ from the paper's code: its networks have a second output, which is thrown away, and here
           it is left out; and they are told t itself, from 0 to 1, here 1000 t.
"""

import ml_collections


def get_config(model: str = "XL/2") -> ml_collections.ConfigDict:
    sizes = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    models = {f"{size}/{patch}": (*numbers, patch) for size, numbers in sizes.items() for patch in (2, 4, 8)}
    if model not in models:
        raise LookupError(f"no model {model!r}; one of: {', '.join(models)}")
    width, depth, heads, patch = models[model]
    # Even steps from noise to t = 0.04, then one to the mean.
    times = (*(1 - 0.96 * step / 249 for step in range(250)), 0.0)
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "npy", "path": "data/imagenet256/train", "num_classes": 1000},
        "objective": {
            "name": "flow_matching",
            "schedule": {"name": "flow", "shift": 1.0},
            "parameterization": {"name": "velocity", "c_noise": "time"},
            "time_sampler": {"name": "uniform"},
            "weighting": {"name": "simple"},
            "coupling": "independent",
        },
        "network": {
            "name": "dit",
            "patch_size": patch,
            "width": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": 4.0,
            "positions": "sincos",
            "norm": "layer",
            "qk_norm": False,
            "mlp": "gelu",
            "remat": "dots_with_no_batch_dims_saveable",
            "outputs": 1,
            "dtype": "float32",
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-4,
            "schedule": "constant",
            "warmup": 0,
            "clip": None,
            "weight_decay": 0.0,
        },
        "ema": {"decays": (0.9999,), "warmup": False},
        "train": {
            "steps": 7_000_000 if model == "XL/2" else 400_000,
            "batch_size": 256,
            "accumulate": 1,
            "cond_drop_rate": 0.1,
            "log_every": 100,
            "preview_every": 10_000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 10_000, "keep": 3},
        "sampler": {
            "name": "euler_maruyama",
            "diffusion": "sigma",
            "scale": 2.0,  # the paper's code has sqrt(2 sigma) dW where its text has sqrt(sigma) dW
            "steps": 250,
            "grid": {"name": "given", "times": times},
        },
        "guidance": {"name": "cfg", "scale": 1.5},
        "eval": {
            "data": {"name": "npy", "path": "data/imagenet256/validation", "num_classes": 1000},
            "metrics": {},
        },
        "mesh": {"data": -1, "fsdp": 1, "model": 1},
        # Megatron's split (Shoeybi et al. 2019, arXiv 1909.08053): a block's inner width over `model`; no effect at 1.
        "sharding": {
            "rules": (
                (r"blocks/(qkv|up)/kernel$", (None, None, "model")),
                (r"blocks/(qkv|up)/bias$", (None, "model")),
                (r"blocks/(out|down)/kernel$", (None, "model")),
            ),
        },
    })  # fmt: skip
