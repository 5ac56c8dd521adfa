"""EDM's preconditioning, noise levels and time grid on scikit-learn's handwritten digits.

Command:   python -m experiments.train --config=configs/digits_edm.py --workdir=runs/digits_edm
Hardware:  two CPU cores, about four minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_edm
           as for configs/digits.py, which differs only in the objective and the time grid.
"""

from configs import common


def get_config():
    return common.digits(
        objective=dict(
            name="denoising",
            schedule=dict(name="edm", sigma_min=0.002, sigma_max=80.0),
            parameterization=dict(name="edm", sigma_data=0.75),
            time_sampler=dict(name="log_normal", mean=-0.8, std=1.2),
            weighting=dict(name="edm", sigma_data=0.75),
        ),
        sampler=dict(grid=dict(name="karras", rho=7.0)),
        guidance=dict(scale=1.5),
    )
