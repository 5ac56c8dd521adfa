"""DDPM with the v parameterization and the cosine schedule on scikit-learn's handwritten digits.

Command:   python -m experiments.train --config=configs/digits_ddpm_v.py --workdir=runs/digits_ddpm_v
Hardware:  two CPU cores, about four minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_ddpm_v
           as for configs/digits.py, which differs only in the objective and the time grid.
"""

from configs import common


def get_config():
    return common.digits(
        objective=dict(
            name="denoising",
            schedule=dict(name="vp", betas="cosine", num_steps=1000),
            parameterization=dict(name="v"),
            time_sampler=dict(name="stratified"),
        ),
        guidance=dict(scale=1.5),
    )
