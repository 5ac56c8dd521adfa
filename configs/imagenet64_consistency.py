"""Consistency models on ImageNet at 64x64 with classes: VARIANT is `ct` or `cd` (Song et al. 2023, arXiv 2303.01469),
`ict` (Song & Dhariwal 2023, arXiv 2310.14189) or `ect` (Geng et al. 2024, arXiv 2406.14548), all on ADM's network.

Command:   python -m experiments.train --config=configs/imagenet64_consistency.py:ict --workdir=runs/imagenet64_ict
           cd and ect start from a model of this network on EDM's path, in runs/imagenet64_edm: imagenet64_adm.py
           with the objective of configs/cifar10_edm.py and network.outputs = 1
Data:      python -m experiments.prepare_data --config=configs/imagenet64_consistency.py
           1,281,167 and 50,000 images, as in configs/imagenet64_adm.py.
Hardware:  the papers': 64 A100 for ct and cd (recalled).
Expected:  FID of 50,000 samples of the averaged parameters against the training set, in one step and in two: ct 13.0
           and 11.1, cd 6.20 and 4.70, ict 4.02 and 3.20 (all recalled). ect's figures are for EDM2's networks: 4.05 and
           2.79 for the smallest at 280 M parameters (recalled). The figures of ct and cd use LPIPS as the metric,
           which is not supported here.
"""

from configs import common

STEPS = dict(ct=800_000, cd=600_000, ict=800_000, ect=100_000)
TIMES = dict(name="log_normal", mean=-1.1, std=2.0)
OLD = dict(time_sampler=dict(name="karras"), weighting="one", metric="l2", target="average")
OBJECTIVES = dict(
    ct=dict(OLD, discretization=dict(name="square_root", steps=STEPS["ct"], start=2, end=200, decay=0.95)),
    cd=dict(
        OLD, discretization=dict(name="fixed", points=40, decay=0.95), solver="heun", teacher="runs/imagenet64_edm"
    ),
    ict=dict(
        discretization=dict(name="doubling", steps=STEPS["ict"], start=10, end=1280),
        time_sampler=dict(TIMES, sigma_min=0.002, sigma_max=80.0),
    ),
    ect=dict(
        parameterization=dict(name="edm", sigma_data=0.5),
        discretization=dict(name="ratio", every=12_500, q=2.0, k=8.0, b=1.0),
        time_sampler=TIMES,
        weighting="inverse_c_out",
        huber=0.0,
        sigma_min=0.0,
        teacher="runs/imagenet64_edm",
    ),
)
VARIANTS = dict(  # learning rate, batch size, dropout, decay of the average
    ct=(8e-6, 2048, 0.0, 0.999943),
    cd=(8e-6, 2048, 0.0, 0.999943),
    ict=(1e-4, 4096, 0.2, 0.99997),
    ect=(1e-4, 1024, 0.2, 0.9999),
)


def get_config(variant: str = "ict"):
    learning_rate, batch_size, dropout, decay = common.choose("variant", variant, VARIANTS)
    return common.imagenet64(
        objective=dict(
            name="consistency",
            schedule=dict(name="edm", sigma_min=0.002, sigma_max=80.0),
            parameterization=dict(name="consistency", sigma_data=0.5, sigma_min=0.002),
        )
        | OBJECTIVES[variant],
        network=dict(common.ADM64, dropout=dropout),
        optimizer=dict(name="radam", learning_rate=learning_rate, clip=None),
        ema=dict(decays=(decay,), warmup=False),
        train=dict(steps=STEPS[variant], batch_size=batch_size),
        checkpoint=dict(every=5000),
        sampler=dict(name="consistency", sigma_min=0.002, steps=2, grid=dict(name="exponential", sigma_min=0.8)),
        sharding=dict(rules=common.UNET_RULES),
    )
