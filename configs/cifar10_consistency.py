"""Consistency models on CIFAR-10 without classes: VARIANT is `ct` or `cd` (Song et al. 2023, arXiv 2303.01469), `ict`
(Song & Dhariwal 2023, arXiv 2310.14189) or `ect` (Geng et al. 2024, arXiv 2406.14548).

Command:   python -m experiments.train --config=configs/cifar10_consistency.py:ict --workdir=runs/cifar10_ict
           cd and ect start from the model of configs/cifar10_edm.py:ncsnpp in runs/cifar10_edm
Data:      python -m experiments.prepare_data --config=configs/cifar10_consistency.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  the papers': 8 A100 for ct and cd; one GPU for ect (recalled).
Expected:  FID of 50,000 samples of the averaged parameters against the training set, in one step and in two: ct 8.70
           and 5.83 (recalled), cd 3.55 and 2.93, ict 2.83 and 2.46 (recalled; a deeper network 2.51 and 2.24), ect 3.60
           and 2.11. The figures of ct and cd use LPIPS as the metric, which is not supported here; with the mean
           square, as here, they are higher. Settings are the papers' unless stated otherwise; those of ect are
           recalled, and its paper uses EDM's DDPM++.
"""

from configs import common

STEPS = dict(ct=800_000, cd=800_000, ict=400_000, ect=400_000)
TIMES = dict(name="log_normal", mean=-1.1, std=2.0)
OLD = dict(time_sampler=dict(name="karras"), weighting="one", metric="l2", target="average")
OBJECTIVES = dict(
    ct=dict(OLD, discretization=dict(name="square_root", steps=STEPS["ct"], start=2, end=150, decay=0.9)),
    cd=dict(OLD, discretization=dict(name="fixed", points=18, decay=0.95), solver="heun", teacher="runs/cifar10_edm"),
    ict=dict(
        discretization=dict(name="doubling", steps=STEPS["ict"], start=10, end=1280),
        time_sampler=dict(TIMES, sigma_min=0.002, sigma_max=80.0),
    ),
    ect=dict(
        parameterization=dict(name="edm", sigma_data=0.5),
        discretization=dict(name="ratio", every=50_000, q=2.0, k=8.0, b=1.0),
        time_sampler=TIMES,
        weighting="inverse_c_out",
        huber=0.0,
        sigma_min=0.0,
        teacher="runs/cifar10_edm",
    ),
)
VARIANTS = dict(  # learning rate, batch size, dropout, decay of the average
    ct=(4e-4, 512, 0.0, 0.9999),
    cd=(4e-4, 512, 0.0, 0.9999),
    ict=(1e-4, 1024, 0.3, 0.99993),
    ect=(1e-4, 128, 0.2, 0.9999),
)


def get_config(variant: str = "ict"):
    learning_rate, batch_size, dropout, decay = common.choose("variant", variant, VARIANTS)
    return common.cifar10(
        objective=dict(
            name="consistency",
            schedule=dict(name="edm", sigma_min=0.002, sigma_max=80.0),
            parameterization=dict(name="consistency", sigma_data=0.5, sigma_min=0.002),
        )
        | OBJECTIVES[variant],
        network=dict(
            common.DDPMPP | common.NCSNPP, dropout=dropout, embedding_scale=0.02 if variant == "ict" else 16.0
        ),
        optimizer=dict(name="radam", learning_rate=learning_rate, clip=None),
        ema=dict(decays=(decay,), warmup=False),
        train=dict(steps=STEPS[variant], batch_size=batch_size),
        checkpoint=dict(every=5000),
        sampler=dict(name="consistency", sigma_min=0.002, steps=2, grid=dict(name="exponential", sigma_min=0.8)),
    )
