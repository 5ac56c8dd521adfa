"""MeanFlow on latents of ImageNet at 256x256, as in Geng et al. 2025 (arXiv 2505.13447): DiT's networks in one step.

Command:   python -m experiments.train --config=configs/imagenet256_mean_flow.py:XL/2 --workdir=runs/imagenet256
           the argument is SIZE/PATCH: S, B, M, L or XL, with patches of 2, 4 or 8 latent pixels a side
Data:      data/imagenet256/train/x.npy, float16 [2562334, 32, 32, 4], and label.npy, and the same in
           data/imagenet256/validation: configs/imagenet256_dit.py says of what.
Hardware:  the paper does not say.
Expected:  FID of 50,000 samples of the averaged parameters in one step, after 240 epochs: B/4 11.4, B/2 6.17, M/2 5.01
           (recalled), L/2 3.84 (recalled), XL/2 3.43; XL/2 in two steps (--steps=2) 2.93. The guidance is a part of
           what is trained; sample at scale 1.
"""

import ml_collections


def get_config(model: str = "XL/2") -> ml_collections.ConfigDict:
    sizes = {"S": (384, 12, 6), "B": (768, 12, 12), "M": (1024, 16, 16), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    models = {f"{size}/{patch}": (*numbers, patch) for size, numbers in sizes.items() for patch in (2, 4, 8)}
    if model not in models:
        raise LookupError(f"no model {model!r}; one of: {', '.join(models)}")
    width, depth, heads, patch = models[model]
    # The paper's omega and kappa are 1.0 and 0.5 for the small models, and 0.2 and 0.92 for the large (recalled).
    large = model.partition("/")[0] in ("L", "XL")
    guidance, mixing = (2.5, 0.92) if large else (2.0, 0.5)
    interval = (0.0, 0.75 if width > 1024 else 0.8) if large else (0.0, 1.0)
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "npy", "path": "data/imagenet256/train", "num_classes": 1000},
        "objective": {
            "name": "mean_flow",
            "schedule": {"name": "flow", "shift": 1.0},
            "c_noise": "unit",
            "time_sampler": {"name": "logit_normal", "mean": -0.4, "std": 1.0},
            "ratio_r_neq_t": 0.25,
            "norm_p": 1.0,
            "norm_eps": 1e-3,
            "guidance": guidance,
            "kappa": mixing,
            "interval": interval,
            "tangent": "conditional",
        },
        "network": {
            "name": "dit",
            "scalar_conditions": ("step_size",),
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
            "name": "adam",
            "learning_rate": 1e-4,
            "schedule": "constant",
            "warmup": 0,
            "clip": None,
            "b2": 0.95,
        },
        "ema": {"decays": (0.9999,), "warmup": False},
        "train": {
            "steps": 240 * 1_281_167 // 256,
            "batch_size": 256,
            "accumulate": 1,
            "cond_drop_rate": 0.1,
            "log_every": 100,
            "preview_every": 10_000,
            "prefetch": 8,
            "workers": 0,
        },
        "checkpoint": {"every": 10_000, "keep": 3},
        "sampler": {"name": "flow_map", "steps": 1, "grid": {"name": "trailing"}},
        "guidance": {"name": "cfg", "scale": 1.0},
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
