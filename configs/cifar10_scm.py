"""Continuous-time consistency models on CIFAR-10 without classes, as in Lu & Song 2024 (arXiv 2410.11081).

Command:   python -m experiments.train --config=configs/cifar10_scm.py:teacher --workdir=runs/cifar10_trig
           python -m experiments.train --config=configs/cifar10_scm.py:VARIANT --workdir=runs/cifar10_VARIANT
           VARIANT is `sct`, consistency training that starts from the teacher's weights, or `scd`, distillation
Data:      python -m experiments.prepare_data --config=configs/cifar10_scm.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  eight GPUs of 80 GB; not stated in the paper.
Expected:  FID of 50,000 samples of the averaged parameters against the training set, in one step and in two, the second
           of them from theta = 1.1: 2.97 and 2.06 for sct, 3.66 and 2.52 for scd (recalled). Batch, learning rates,
           dropout, warmup and time distribution are the paper's (recalled). Its network has adaptive double
           normalization, which is not supported. 60.1 M parameters.
"""

from configs import common

VARIANTS = ("teacher", "sct", "scd")
DROPOUT = dict(teacher=0.13, sct=0.2, scd=0.0)
BATCH_SIZE = 512


def get_config(variant: str = "sct"):
    common.choose("variant", variant, dict.fromkeys(VARIANTS))
    is_teacher = variant == "teacher"
    return common.cifar10(
        **common.scm(variant, teacher="runs/cifar10_trig"),
        network=dict(common.DDPMPP, scale_shift=True, dropout=DROPOUT[variant]),
        optimizer=dict(
            name="adam",
            learning_rate=1e-3 if is_teacher else 1e-4,
            warmup=20_000 if is_teacher else 0,
            clip=None,
            b2=0.999 if is_teacher else 0.99,
        ),
        ema=dict(decays=(0.5 ** (BATCH_SIZE / 500_000),)),  # a half-life of 500,000 images
        train=dict(steps=400_000, batch_size=BATCH_SIZE, preview_every=5000),
        checkpoint=dict(every=5000),
    )
