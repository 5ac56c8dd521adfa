"""A shortcut model on scikit-learn's handwritten digits: steps of 1, 1/2, 1/4, ..., trained from scratch.

Command:   python -m experiments.train --config=configs/digits_shortcut.py --workdir=runs/digits_shortcut
Hardware:  two CPU cores, about ten minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_shortcut
           docs/few_step.md has the figures, at one evaluation and at more (--steps=2).
"""

from configs import common


def get_config():
    return common.digits(
        objective=dict(name="shortcut", time_sampler=dict(name="stratified")),
        network=dict(scalar_conditions=("step_size",)),
        train=dict(steps=2500),
        sampler=dict(name="flow_map", steps=1),
        eval=dict(metrics=dict(svc_accuracy=dict(guidance=1.0))),
    )
