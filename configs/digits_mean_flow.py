"""MeanFlow on scikit-learn's handwritten digits: from noise to data in one step, trained from scratch.

Command:   python -m experiments.train --config=configs/digits_mean_flow.py --workdir=runs/digits_mean_flow
Hardware:  two CPU cores, about ten minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_mean_flow
           docs/few_step.md has the figures, at one evaluation and at more (--steps=2).
"""

from configs import common


def get_config():
    return common.digits(
        objective=dict(name="mean_flow", time_sampler=dict(name="logit_normal", mean=-0.4, std=1.0)),
        network=dict(scalar_conditions=("step_size",)),
        train=dict(steps=2500),
        sampler=dict(name="flow_map", steps=1),
        eval=dict(metrics=dict(svc_accuracy=dict(guidance=1.0))),
    )
