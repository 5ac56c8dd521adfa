"""MeanFlow on latents of ImageNet at 256x256, as in Geng et al. 2025 (arXiv 2505.13447): DiT's networks in one step.

Command:   python -m experiments.train --config=configs/imagenet256_mean_flow.py:XL/2 --workdir=runs/imagenet256
           the argument is SIZE/PATCH: S, B, M, L or XL, with patches of 2, 4 or 8 latent pixels per side; XL/2,images
           trains on the images, which every step encodes
Data:      data/imagenet256, or with XL/2,images data/imagenet and models/sd-vae-ft-ema: see configs/imagenet256_dit.py.
Hardware:  not stated in the paper.
Expected:  FID of 50,000 samples of the averaged parameters in one step, after 240 epochs: B/4 11.4, B/2 6.17, M/2 5.01
           (recalled), L/2 3.84 (recalled), XL/2 3.43; XL/2 in two steps (--steps=2) 2.93. Guidance is
           part of the training; sample with scale 1.
"""

from configs import common

SIZES = dict(common.DIT_SIZES, M=(1024, 16, 16))


def get_config(variant: str = "XL/2"):
    # The paper's omega and kappa are 1.0 and 0.5 for the small models, and 0.2 and 0.92 for the large (recalled).
    size = variant.partition("/")[0]
    large = size in ("L", "XL")
    guidance, kappa = (2.5, 0.92) if large else (2.0, 0.5)
    return common.imagenet256(
        variant,
        SIZES,
        objective=dict(
            name="mean_flow",
            time_sampler=dict(name="logit_normal", mean=-0.4, std=1.0),
            guidance=guidance,
            norm_eps=0.01,  # that of the authors' code; the paper's example is 1e-3
            kappa=kappa,
            interval=(0.0, dict(L=0.8, XL=0.75)[size] if large else 1.0),
        ),
        network=dict(scalar_conditions=("step_size",)),
        optimizer=dict(name="adam", b2=0.95),
        train=dict(steps=240 * 1_281_167 // 256),
        sampler=dict(name="flow_map", steps=1),
    )
