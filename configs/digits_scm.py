"""Continuous-time consistency models on scikit-learn's handwritten digits, in one or two evaluations: VARIANT is `sct`
(from scratch) or `scd` (from the flow of configs/digits_trig.py).

Command:   python -m experiments.train --config=configs/digits_trig.py --workdir=runs/digits_trig
           python -m experiments.train --config=configs/digits_scm.py:VARIANT --workdir=runs/digits_VARIANT
Hardware:  two CPU cores, about ten minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_VARIANT
           docs/few_step.md has the figures of both variants.
"""

from configs import common

VARIANTS = dict(sct=dict(teacher=None, warmup=1000), scd=dict(teacher="runs/digits_trig", warmup=300))


def get_config(variant: str = "scd"):
    return common.digits(
        objective=dict(name="continuous_consistency", sigma_data=0.75, mean=-1.0, std=1.4)
        | common.choose("variant", variant, VARIANTS),
        optimizer=dict(learning_rate=1e-3),
        train=dict(cond_drop_rate=0.0, preview_every=1000),
        checkpoint=dict(every=1000),
        sampler=dict(name="consistency", sigma_min=0.0, steps=2),
        eval=dict(metrics=dict(svc_accuracy=dict(guidance=1.0))),
    )
