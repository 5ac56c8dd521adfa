"""DDPM on scikit-learn's handwritten digits: a class-conditional U-Net on 1,500 real 8x8 images.

Command:   python -m experiments.train --config=configs/digits.py --workdir=runs/digits
Hardware:  two CPU cores, about four minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits
           99 % of 1,000 samples at guidance 1.5 are recognized by an SVC as the requested digit;
           the energy distance of 1,000 samples at guidance 1 is about 1.2 times that of as many training images.
"""

from configs import common


def get_config():
    return common.digits(
        objective=dict(
            name="denoising",
            schedule=dict(name="vp", betas="linear", num_steps=1000),
            parameterization=dict(name="eps"),
            time_sampler=dict(name="stratified"),
        ),
        sampler=dict(name="ddim", steps=50),
        guidance=dict(scale=1.5),
    )
