"""A diffusion transformer on scikit-learn's handwritten digits, by flow matching: 16 tokens of 2x2 pixels.

Command:   python -m experiments.train --config=configs/digits_dit.py --workdir=runs/digits_dit
Hardware:  two CPU cores, about six minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_dit
           100 % of 1,000 samples at guidance 1.5 are recognized by an SVC as the requested digit; the energy distance
           of 1,000 samples at guidance 1 is 1.3 times that of as many training images. 1.9 M parameters.
"""

from configs import common


def get_config():
    return common.digits(
        objective=dict(name="flow_matching", time_sampler=dict(name="stratified")),
        network=dict(
            name="dit",
            patch_size=2,
            width=128,
            depth=6,
            num_heads=4,
            positions="rope",
            norm="rms",
            qk_norm=True,
            mlp="swiglu",
        ),
        optimizer=dict(learning_rate=1e-3),
        guidance=dict(scale=1.5),
    )
