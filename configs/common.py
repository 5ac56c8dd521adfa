"""Pieces that several configs share. Options that a config leaves out have the defaults of the parts."""

from collections.abc import Mapping
from typing import Any

import ml_collections

DIGITS_UNET = dict(
    name="unet", width=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_dim=32
)
# DDPM++ as in EDM (Karras et al. 2022, arXiv 2206.00364, table 7); NCSN++ is `DDPMPP | NCSNPP`.
DDPMPP = dict(
    name="unet",
    width=128,
    channel_mult=(2, 2, 2),
    num_res_blocks=4,
    attention_resolutions=(16,),
    up_attention="last",
    head_dim=None,
    scale_shift=False,
    resample="projected",
    rescale=True,
    freq_shift=1,
    sin_first=True,
    epsilon=1e-6,
)
NCSNPP = dict(resample_filter=(1, 3, 3, 1), input_skip=True, embedding="fourier", freq_shift=0, sin_first=False)
# ADM for ImageNet 64x64 (Dhariwal & Nichol 2021, arXiv 2105.05233, table 4).
ADM64 = dict(
    name="unet",
    width=192,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_resolutions=(32, 16, 8),
    head_dim=64,
    scale_shift=True,
    resample="residual",
    null_class=False,
    dtype="bfloat16",
)
# A transformer that is fast on CPUs, for latents of 8x8 or images of 64x64 pixels, and its optimizer.
SMALL_DIT = dict(name="dit", patch_size=2, width=128, depth=6, num_heads=4, qk_norm=True, remat="none", unroll=6)
MUON = dict(name="muon", consistent_rms=0.2, learning_rate=3e-3, adam_b2=0.99, schedule="cosine", warmup=200)
# Stable Diffusion's autoencoder with the decoder that was trained further, by the name of its model on Hugging Face.
SD_VAE = dict(name="kl", path="models/sd-vae-ft-ema")
# The sections that complete a network that reads a text and has been read from other files.
CAPTIONED = {
    "data": {"name": "folder", "path": "data/images", "size": 512, "captions": True, "labels": False},
    "objective": {"name": "denoising", "parameterization": {"name": "eps", "c_noise": "index"}},
    "optimizer": {"name": "adamw", "learning_rate": 1e-5},
    "train": {"steps": 10_000, "batch_size": 8},
}
# Width, depth and heads of transformers, by the names of DiT (Peebles & Xie 2023, arXiv 2212.09748, table 1).
DIT_SIZES = dict(S=(384, 12, 6), B=(768, 12, 12), L=(1024, 24, 16), XL=(1152, 28, 16))
# Tensor parallelism as in Megatron (Shoeybi et al. 2019, arXiv 1909.08053): the inner width of a block is split over
# the mesh axis `model`. It has no effect if that axis has size 1.
DIT_RULES = (
    (r"blocks/(qkv|up)/kernel$", (None, None, "model")),
    (r"blocks/(qkv|up)/bias$", (None, "model")),
    (r"blocks/(out|down)/kernel$", (None, "model")),
)
UNET_RULES = (
    (r"conv1/kernel$", (None, None, None, "model")),
    (r"conv2/kernel$", (None, None, "model")),
    (r"qkv/kernel$", (None, "model")),
    (r"attention/out/kernel$", ("model",)),
)
# The same for the U-Nets of Stable Diffusion and SDXL: heads of attention and channels between two convolutions.
UNET_TEXT_RULES = (
    (r"residual/conv1/kernel$", (None, None, None, "model")),
    (r"residual/conv2/kernel$", (None, None, "model")),
    (r"(attention|cross)/[qkv]/kernel$", (None, None, "model")),
    (r"(attention|cross)/out/kernel$", (None, "model")),
)
# What Stable Diffusion is trained to predict, by the name of a variant. `v` has zero terminal SNR, where min-SNR has
# the weight 0, so it is not weighted.
SD_VARIANTS = dict(
    eps=dict(
        objective=dict(parameterization=dict(name="eps", c_noise="index"), weighting=dict(name="min_snr", gamma=5.0)),
        sampler=dict(name="dpm_solver_pp", steps=25),
    ),
    v=dict(
        objective=dict(
            schedule=dict(zero_terminal_snr=True),
            parameterization=dict(name="v", c_noise="index"),
            weighting=dict(name="simple"),
        ),
        sampler=dict(name="ddim", steps=50, grid=dict(name="trailing")),
        guidance=dict(rescale=dict(factor=0.7, output="v")),
    ),
)


def digits(**sections: Any) -> ml_collections.ConfigDict:
    """Returns a config for scikit-learn's digits: 1,500 images of 8x8 pixels for training, 297 held out."""
    base = dict(
        data=dict(name="digits"),
        network=DIGITS_UNET,
        optimizer=dict(learning_rate=2e-3, schedule="cosine", warmup=100, b2=0.99),
        ema=dict(decays=(0.99, 0.998)),
        train=dict(steps=2000, preview_every=500),
        checkpoint=dict(every=500, keep=2),
        eval=dict(
            data=dict(name="digits", split="test"),
            metrics=dict(svc_accuracy=dict(guidance=1.5), energy_distance=dict()),
        ),
    )
    return config(base, **sections)


def toy(kind: str, **sections: Any) -> ml_collections.ConfigDict:
    """Returns a config for points in the plane."""
    base = dict(
        data=dict(name="toy", kind=kind),
        network=dict(name="mlp"),
        optimizer=dict(learning_rate=2e-3, schedule="cosine", warmup=100),
        train=dict(cond_drop_rate=0.0),
        eval=dict(data=dict(name="toy", kind=kind, split="test")),
    )
    return config(base, **sections)


def shapes64(**sections: Any) -> ml_collections.ConfigDict:
    """Returns a config for an autoencoder of 64x64 pictures of coloured shapes."""
    base = dict(
        data=dict(name="shapes", size=64),
        objective=dict(name="autoencoder", loss="l2"),
        network=dict(layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False),
        optimizer=dict(learning_rate=2e-3, schedule="cosine", warmup=100),
        ema=dict(decays=(0.99,)),
        train=dict(steps=2500, batch_size=8, cond_drop_rate=0.0, preview_every=500),
        checkpoint=dict(every=500, keep=2),
        eval=dict(data=dict(name="shapes", size=64, split="test"), metrics=dict(reconstruction=dict())),
    )
    return config(base, **sections)


def cifar10(**sections: Any) -> ml_collections.ConfigDict:
    """Returns a config for CIFAR-10 without classes: 50,000 images of 32x32 pixels, with random flips."""
    return config(_tfds("cifar10", "test", labels=False), **sections)


def imagenet64(**sections: Any) -> ml_collections.ConfigDict:
    """Returns a config for ImageNet 64x64 with classes: 1,281,167 images, with random flips."""
    return config(_tfds("imagenet_resized/64x64", "validation"), **sections)


def imagenet256(variant: str, sizes: Mapping[str, tuple[int, int, int]] = DIT_SIZES, **sections: Any):
    """Returns a config for a transformer on latents of ImageNet 256x256.

    Args:
      variant: `SIZE/PATCH` reads images that `experiments.encode` has encoded, and `SIZE/PATCH,images` reads images and
        encodes them in the train step.
      sizes: Width, depth and heads by the name of the size.
      **sections: See `config`.
    """
    models = {f"{size}/{patch}": (*numbers, patch) for size, numbers in sizes.items() for patch in (2, 4, 8)}
    sources = {"": imagenet_encoded, ",images": imagenet_images}
    variants = {model + source: (*models[model], sources[source]) for model in models for source in sources}
    width, depth, heads, patch, source = choose("model", variant, variants)
    base = dict(
        data=source("train"),
        autoencoder=SD_VAE,
        network=dict(name="dit", patch_size=patch, width=width, depth=depth, num_heads=heads),
        optimizer=dict(learning_rate=1e-4, clip=None),
        ema=dict(decays=(0.9999,), warmup=False),
        train=dict(batch_size=256, log_every=100, preview_every=10_000),
        checkpoint=dict(every=10_000),
        eval=dict(data=source("validation")),
        sharding=dict(rules=DIT_RULES),
    )
    return config(base, **sections)


def sd_finetune(variant: str, path: str, size: int, **sections: Any) -> ml_collections.ConfigDict:
    """Returns a config for fine-tuning a model of Stable Diffusion on images with captions.

    Args:
      variant: What the network predicts, a name in `SD_VARIANTS`.
      path: The folder of the pipeline, for its autoencoder and its text encoders.
      size: The side of a square image; the other sizes have about as many pixels.
      **sections: See `config`.
    """
    base = dict(
        data=dict(name="folder", path="data/captioned", size=size, buckets=64, captions=True, labels=False),
        autoencoder=dict(name="kl", path=path, dtype="bfloat16", slices=True),
        objective=dict(
            name="denoising",
            schedule=dict(name="vp", betas="scaled_linear", beta_start=0.00085, beta_end=0.012, num_steps=1000),
            time_sampler=dict(name="discrete"),
            offset_noise=0.0,
        ),
        network=dict(name="unet_text", dtype="bfloat16", remat="full"),
        optimizer=dict(name="adamw", learning_rate=1e-5, warmup=500, weight_decay=0.01),
        ema=dict(decays=(0.9999,)),
        train=dict(steps=20_000, batch_size=64, cond_drop_rate=0.1, workers=8),
        checkpoint=dict(every=1000, keep=2),
        guidance=dict(scale=7.5),
        sharding=dict(rules=UNET_TEXT_RULES),
    )
    return config(_merge(base, choose("variant", variant, SD_VARIANTS)), **sections)


def imagenet256_autoencoder(**sections: Any):
    """Returns a config for an autoencoder of images of ImageNet 256x256."""
    batch_size = 24
    base = dict(
        data=dict(imagenet_images("train"), crop="random", labels=False),
        objective=dict(
            name="autoencoder",
            perceptual_weight=1.0,
            perceptual_path=("weights/vgg16-397923af.pth", "weights/vgg.pth"),  # see docs/latents.md
        ),
        optimizer=dict(name="adam", learning_rate=4.5e-6 * batch_size, b1=0.5, b2=0.9, clip=None),
        train=dict(batch_size=batch_size, cond_drop_rate=0.0, log_every=100, preview_every=10_000),
        checkpoint=dict(every=10_000),
        eval=dict(
            data=dict(imagenet_images("validation"), labels=False), metrics=dict(reconstruction=dict(num=50_000))
        ),
    )
    return config(base, **sections)


def imagenet_images(split: str) -> dict[str, Any]:
    """Returns images of ImageNet with their classes: the central square at 256x256, and random flips in training."""
    return dict(name="folder", path=f"data/imagenet/{split}", size=256, flip=split == "train")


def imagenet_encoded(split: str) -> dict[str, Any]:
    """Returns the same images, as encoded by `experiments.encode`, those for training with `--flip`."""
    return dict(name="array_record", path=f"data/imagenet256/{split}")


def scm(variant: str, teacher: str) -> dict[str, Any]:
    """Returns the objective and the sampler of sCM (Lu & Song 2024, arXiv 2410.11081), or those of its teacher."""
    if variant == "teacher":
        objective = dict(
            name="flow_matching",
            schedule=dict(name="trig", sigma_data=0.5),
            parameterization=dict(name="edm", sigma_data=0.5, c_noise="unit"),
            time_sampler=dict(name="log_normal", mean=-1.0, std=1.4),
        )
        return dict(objective=objective, sampler=dict(name="heun", steps=18, grid=dict(name="karras", rho=7.0)))
    return dict(
        objective=dict(
            name="continuous_consistency",
            sigma_data=0.5,
            mean=-1.0,
            std=1.4,
            warmup=10_000,
            teacher=teacher,
            distill=variant == "scd",
        ),
        sampler=dict(
            name="consistency",
            sigma_min=0.0,
            steps=2,
            grid=dict(name="given", times=(1.0, 0.7003, 0.0)),  # t = 0.7003 is theta = 1.1
        ),
    )


def choose(what: str, name: str, choices: Mapping[str, Any]) -> Any:
    """Returns one of the choices of a config's argument, or raises an error that lists them."""
    if name not in choices:
        raise LookupError(f"no {what} {name!r}; one of: {', '.join(choices)}")
    return choices[name]


def config(base: Mapping[str, Any], **sections: Any) -> ml_collections.ConfigDict:
    """Returns a config of `base` and sections. Options of a section replace those of the base, one by one; a part of
    another name replaces the whole part."""
    return ml_collections.ConfigDict(_merge(base, sections))


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, new in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(new, Mapping)
        renamed = both and "name" in old and new.get("name", old["name"]) != old["name"]
        merged[key] = _merge(old, new) if both and not renamed else new
    return merged


def _tfds(dataset: str, held_out: str, **options: Any) -> dict[str, Any]:
    data = dict(name="tfds", dataset=dataset, **options)
    return dict(
        data=dict(**data, flip=True),
        train=dict(cond_drop_rate=0.0, log_every=100, preview_every=10_000),
        checkpoint=dict(every=10_000),
        eval=dict(data=dict(**data, split=held_out)),
    )
