"""DiT on latents of ImageNet at 256x256, as in Peebles & Xie 2023 (arXiv 2212.09748).

Command:   python -m experiments.train --config=configs/imagenet256_dit.py:XL/2 --workdir=runs/imagenet256_dit
           the argument is SIZE/PATCH: S, B, L or XL, with patches of 2, 4 or 8 latent pixels a side
Data:      data/imagenet256/train/x.npy, float16 [2562334, 32, 32, 4], samples of the posterior of Stable Diffusion's
           VAE (ft-ema) times 0.18215, of each image's middle square and of its mirror image, and label.npy, integers
           [2562334] from 0 to 999; the same of the 50,000 in data/imagenet256/validation, which need no mirror images.
           The paper's code draws from the posterior anew whenever it sees an image.
Hardware:  the paper's: a TPU v3-256, 5.7 steps a second for XL/2 (recalled). In float32 as here; bfloat16 is faster.
Expected:  FID of 50,000 samples of the averaged parameters, 250 evaluations each: XL/2 after 7 M steps 2.27 at guidance
           1.5 (of three of the four channels; of all of them here) and 9.62 without (recalled). After 400,000 steps
           without guidance: S/2 68.4, B/2 43.5, L/2 23.3, XL/2 19.5 (recalled). S, B, L and XL have 33, 130, 458 and
           675 M parameters; XL/2 takes 118.6 G multiplications and additions a latent.
"""

import ml_collections


def get_config(model: str = "XL/2") -> ml_collections.ConfigDict:
    sizes = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    models = {f"{size}/{patch}": (*numbers, patch) for size, numbers in sizes.items() for patch in (2, 4, 8)}
    if model not in models:
        raise LookupError(f"no model {model!r}; one of: {', '.join(models)}")
    width, depth, heads, patch = models[model]
    return ml_collections.ConfigDict({
        "seed": 0,
        "data": {"name": "npy", "path": "data/imagenet256/train", "num_classes": 1000},
        "objective": {
            "name": "denoising",
            "schedule": {"name": "vp", "betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_steps": 1000},
            "parameterization": {"name": "eps", "c_noise": "index"},
            "time_sampler": {"name": "discrete"},
            "weighting": {"name": "simple"},
            "learned_variance": True,
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
            "freq_shift": False,  # True if it is to be converted for diffusers
            "remat": "dots_with_no_batch_dims_saveable",
            "outputs": 2,
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
        "sampler": {"name": "ancestral", "variance": "learned", "steps": 250, "grid": {"name": "linspace"}},
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
