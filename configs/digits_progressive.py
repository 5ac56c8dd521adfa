"""Progressive distillation on scikit-learn's handwritten digits: from 32 DDIM steps to one, in five rounds.

Command:   python -m experiments.train --config=configs/digits_ddpm_v.py --workdir=runs/digits_ddpm_v
           python -m experiments.train --config=configs/digits_progressive.py --workdir=runs/digits_progressive
           The first is the teacher; the student has the same schedule, parameterization and network.
Hardware:  two CPU cores, about seven minutes for the second.
Expected:  python -m experiments.evaluate --workdir=runs/digits_progressive
           docs/few_step.md has its figures and those of the other methods.
"""

from configs import common


def get_config():
    return common.digits(
        objective=dict(
            name="progressive_distillation",
            start_steps=16,
            end_steps=1,
            round_steps=400,
            continuous=True,
            teacher="runs/digits_ddpm_v",
        ),
        optimizer=dict(learning_rate=1e-3, warmup=25, cycles=5),  # a cycle per round
        ema=dict(decays=(0.99,)),
        sampler=dict(steps=1),
        eval=dict(metrics=dict(svc_accuracy=dict(guidance=1.0))),
    )
