"""DiT on latents of ImageNet at 256x256, as in Peebles & Xie 2023 (arXiv 2212.09748).

Command:   python -m experiments.encode --config=configs/imagenet256_dit.py:XL/2,images --flip \
               --out=data/imagenet256/train
           python -m experiments.encode --config=configs/imagenet256_dit.py:XL/2,images \
               --out=data/imagenet256/validation --config.data.path=data/imagenet/validation
           python -m experiments.train --config=configs/imagenet256_dit.py:XL/2 --workdir=runs/imagenet256_dit
           the argument is SIZE/PATCH: S, B, L or XL, with patches of 2, 4 or 8 latent pixels per side; XL/2,images
           trains on the images, which every step encodes, so that the first two commands are not needed
Data:      data/imagenet/train and data/imagenet/validation, 1,281,167 and 50,000 images in a folder per class, of which
           the central square is read, and models/sd-vae-ft-ema, Stable Diffusion's autoencoder in a folder of diffusers
           (stabilityai/sd-vae-ft-ema). The encoded images take 86 GB: the moments of the posterior, float32
           [32, 32, 8], of the images for training and their mirror images, and of the others. Every visit draws a
           sample of the posterior, as the paper's code does, and with XL/2,images flips half of the images.
Hardware:  the paper's: a TPU v3-256, 5.7 steps per second for XL/2 (recalled). In float32 as here; bfloat16 is faster.
Expected:  FID of 50,000 samples of the averaged parameters, 250 evaluations each: XL/2 after 7 M steps 2.27 at guidance
           1.5 (of three of the four channels; of all of them here) and 9.62 without (recalled). After 400,000 steps
           without guidance: S/2 68.4, B/2 43.5, L/2 23.3, XL/2 19.5 (recalled). S, B, L and XL have 33, 130, 458 and
           675 M parameters; XL/2 takes 118.6 G multiplications and additions per latent.
"""

from configs import common


def get_config(variant: str = "XL/2"):
    return common.imagenet256(
        variant,
        objective=dict(
            name="denoising",
            schedule=dict(name="vp", betas="linear", beta_start=1e-4, beta_end=0.02, num_steps=1000),
            parameterization=dict(name="eps", c_noise="index"),
            time_sampler=dict(name="discrete"),
            learned_variance=True,
        ),
        network=dict(outputs=2, freq_shift=0),  # freq_shift = 1 for a model that diffusers shall read
        optimizer=dict(name="adamw", weight_decay=0.0),
        train=dict(steps=7_000_000 if variant.startswith("XL/2") else 400_000),
        sampler=dict(name="ancestral", variance="learned", steps=250, grid=dict(name="linspace")),
        guidance=dict(scale=1.5),
    )
