"""Flow matching on scikit-learn's handwritten digits: the straight path, its velocity, Euler steps.

Command:   python -m experiments.train --config=configs/digits_flow.py --workdir=runs/digits_flow
Hardware:  two CPU cores, about four minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_flow
           as for configs/digits.py, which differs only in the objective and the time grid.
"""

from configs import common


def get_config():
    return common.digits(
        objective=dict(name="flow_matching", time_sampler=dict(name="stratified")), guidance=dict(scale=1.5)
    )
