"""Flow matching on scikit-learn's handwritten digits along the trigonometric path, with the parameterization and noise
label of continuous-time consistency models: the teacher of configs/digits_scm.py.

Command:   python -m experiments.train --config=configs/digits_trig.py --workdir=runs/digits_trig
Hardware:  two CPU cores, about five minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_trig
           as for configs/digits.py, which differs only in the objective and the time grid.
"""

from configs import common


def get_config():
    return common.digits(
        objective=dict(
            name="flow_matching",
            schedule=dict(name="trig", sigma_data=0.75),
            parameterization=dict(name="edm", sigma_data=0.75, c_noise="unit"),
            time_sampler=dict(name="stratified"),
        ),
        train=dict(steps=2500),
        guidance=dict(scale=1.5),
    )
