"""Reflow on scikit-learn's handwritten digits: a flow retrained on its own pairs of noise and digits, until one
Euler step follows its paths. VARIANT is `reflow`, or `distill`, which continues with training that one step alone.

Command:   python -m experiments.train --config=configs/digits_flow.py --workdir=runs/digits_flow
           python -m experiments.train --config=configs/digits_reflow.py:VARIANT --workdir=runs/digits_VARIANT
           The first is the teacher; the student has the same schedule, parameterization and network.
Hardware:  two CPU cores, about five minutes for `reflow` and ten for `distill`.
Expected:  python -m experiments.evaluate --workdir=runs/digits_VARIANT
           docs/few_step.md has their figures and those of the other methods.
"""

from configs import common

VARIANTS = dict(reflow=1, distill=2)  # the number of rounds
ROUND_STEPS = 1000


def get_config(variant: str = "reflow"):
    rounds = common.choose("variant", variant, VARIANTS)
    return common.digits(
        objective=dict(
            name="reflow",
            time_sampler=dict(name="stratified"),
            rounds=1,
            round_steps=ROUND_STEPS,
            distill=variant == "distill",
            pool=8192,
            every=8,
            ode_steps=24,
            teacher="runs/digits_flow",
        ),
        optimizer=dict(learning_rate=1e-3, warmup=50, cycles=rounds),
        train=dict(steps=rounds * ROUND_STEPS),
        sampler=dict(name="euler", steps=1),
        eval=dict(metrics=dict(svc_accuracy=dict(guidance=1.0))),
    )
