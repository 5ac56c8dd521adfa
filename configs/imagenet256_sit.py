"""SiT on latents of ImageNet at 256x256, as in Ma et al. 2024 (arXiv 2401.08740): DiT's networks by flow matching.

Command:   python -m experiments.train --config=configs/imagenet256_sit.py:XL/2 --workdir=runs/imagenet256_sit
           the argument is SIZE/PATCH: S, B, L or XL, with patches of 2, 4 or 8 latent pixels per side; XL/2,images
           trains on the images, which every step encodes
Data:      data/imagenet256, or with XL/2,images data/imagenet and models/sd-vae-ft-ema: see configs/imagenet256_dit.py.
Hardware:  the paper's: a TPU v4-64, 6.8 steps per second for XL/2 (recalled).
Expected:  FID of 50,000 samples of the averaged parameters, 250 evaluations each: XL/2 after 7 M steps at guidance 1.5
           2.06 by this sampler and 2.15 by the ODE (heun, recalled). After 400,000 steps without guidance about: S/2
           57.6, B/2 33.0, L/2 18.8, XL/2 17.2 (recalled).
           Two things differ from the paper's code: its networks have a second output that is not used, which is left
           out here; and their input is t itself, from 0 to 1, here 1000 t.
"""

from configs import common


def get_config(variant: str = "XL/2"):
    # Even steps from noise to t = 0.04, then one to the mean.
    times = (*(1 - 0.96 * step / 249 for step in range(250)), 0.0)
    return common.imagenet256(
        variant,
        objective=dict(name="flow_matching", parameterization=dict(name="velocity", c_noise="time")),
        optimizer=dict(name="adamw", weight_decay=0.0),
        train=dict(steps=7_000_000 if variant.startswith("XL/2") else 400_000),
        sampler=dict(
            name="euler_maruyama",
            diffusion="sigma",
            scale=2.0,  # the paper's code has sqrt(2 sigma) dW where its text has sqrt(sigma) dW
            steps=250,
            grid=dict(name="given", times=times),
        ),
        guidance=dict(scale=1.5),
    )
