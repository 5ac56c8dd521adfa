"""DiT on latents of ImageNet at 256x256, as in Peebles & Xie 2023 (arXiv 2212.09748).

Command:   python -m experiments.train --config=configs/imagenet256_dit.py:XL/2 --workdir=runs/imagenet256_dit
           the argument is SIZE/PATCH: S, B, L or XL, with patches of 2, 4 or 8 latent pixels per side
Data:      data/imagenet256/train/x.npy, float16 [2562334, 32, 32, 4], samples of the posterior of Stable Diffusion's
           VAE (ft-ema) times 0.18215, of each image's central square and of its horizontal flip, and label.npy,
           integers [2562334] from 0 to 999; the same of the 50,000 in data/imagenet256/validation, without flips.
           The paper's code samples the posterior again at every visit of an image.
Hardware:  the paper's: a TPU v3-256, 5.7 steps per second for XL/2 (recalled). In float32 as here; bfloat16 is faster.
Expected:  FID of 50,000 samples of the averaged parameters, 250 evaluations each: XL/2 after 7 M steps 2.27 at guidance
           1.5 (of three of the four channels; of all of them here) and 9.62 without (recalled). After 400,000 steps
           without guidance: S/2 68.4, B/2 43.5, L/2 23.3, XL/2 19.5 (recalled). S, B, L and XL have 33, 130, 458 and
           675 M parameters; XL/2 takes 118.6 G multiplications and additions per latent.
"""

from configs import common


def get_config(model: str = "XL/2"):
    return common.imagenet256(
        model,
        objective=dict(
            name="denoising",
            schedule=dict(name="vp", betas="linear", beta_start=1e-4, beta_end=0.02, num_steps=1000),
            parameterization=dict(name="eps", c_noise="index"),
            time_sampler=dict(name="discrete"),
            learned_variance=True,
        ),
        network=dict(outputs=2, freq_shift=0),  # freq_shift = 1 for a model that diffusers shall read
        optimizer=dict(name="adamw", weight_decay=0.0),
        train=dict(steps=7_000_000 if model == "XL/2" else 400_000),
        sampler=dict(name="ancestral", variance="learned", steps=250, grid=dict(name="linspace")),
        guidance=dict(scale=1.5),
    )
