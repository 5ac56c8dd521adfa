"""Consistency models on scikit-learn's handwritten digits, in one to a few evaluations: VARIANT is `ct` or `ict` (from
scratch), `cd` or `ect` (from the diffusion model of configs/digits_edm.py), or `cd_joint` (with its teacher).

Command:   python -m experiments.train --config=configs/digits_edm.py --workdir=runs/digits_edm
           python -m experiments.train --config=configs/digits_consistency.py:VARIANT --workdir=runs/digits_VARIANT
Hardware:  two CPU cores, about six minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_VARIANT
           docs/few_step.md has the figures of all variants but cd_joint, which is not measured.
"""

from configs import common

STEPS = dict(ct=2000, ict=2500, ect=3000, cd=1200, cd_joint=2500)
TIMES = dict(name="log_normal", mean=-0.8, std=1.6)
DISTILLATION = dict(
    discretization=dict(name="fixed", points=18, decay=0.95),
    weighting="one",
    metric="l2",
    target="average",
    solver="heun",
)
VARIANTS = dict(
    ct=dict(
        discretization=dict(name="square_root", steps=STEPS["ct"], start=2, end=18, decay=0.5),
        weighting="one",
        metric="l2",
        target="average",
    ),
    ict=dict(
        discretization=dict(name="doubling", steps=STEPS["ict"], start=10, end=160),
        time_sampler=dict(TIMES, sigma_min=0.002, sigma_max=80.0),
    ),
    ect=dict(
        discretization=dict(name="ratio", every=500, q=2.0, k=8.0, b=1.0),
        time_sampler=TIMES,
        parameterization=dict(name="edm", sigma_data=0.75),
        sigma_min=0.0,
        teacher="runs/digits_edm",
    ),
    cd=dict(DISTILLATION, teacher="runs/digits_edm"),
    cd_joint=dict(
        DISTILLATION,
        joint_teacher=dict(
            name="denoising",
            parameterization=dict(name="edm", sigma_data=0.75),
            time_sampler=dict(name="log_normal", mean=-0.8, std=1.2),
            weighting=dict(name="edm", sigma_data=0.75),
        ),
    ),
)


def get_config(variant: str = "ect"):
    return common.digits(
        objective=dict(
            name="consistency",
            schedule=dict(name="edm", sigma_min=0.002, sigma_max=80.0),
            parameterization=dict(name="consistency", sigma_data=0.75, sigma_min=0.002),
        )
        | common.choose("variant", variant, VARIANTS),
        optimizer=dict(learning_rate=1e-3),
        train=dict(steps=STEPS[variant], cond_drop_rate=0.0, preview_every=1000),
        checkpoint=dict(every=1000),
        sampler=dict(name="consistency", sigma_min=0.002, steps=2, grid=dict(name="exponential", sigma_min=0.8)),
        eval=dict(metrics=dict(svc_accuracy=dict(guidance=1.0))),
    )
