"""Continuous-time consistency models on ImageNet at 64x64 with classes, as in Lu & Song 2024 (arXiv 2410.11081), with
EDM2's network in the smallest of the paper's sizes, S.

Command:   python -m experiments.train --config=configs/imagenet64_scm.py:teacher --workdir=runs/imagenet64_trig
           python -m experiments.train --config=configs/imagenet64_scm.py:VARIANT --workdir=runs/imagenet64_VARIANT
           VARIANT is `sct`, consistency training that starts from the teacher's weights, or `scd`, distillation
Data:      python -m experiments.prepare_data --config=configs/imagenet64_scm.py
           1,281,167 and 50,000 images, as in configs/imagenet64_adm.py.
Hardware:  32 GPUs of 80 GB; not stated in the paper.
Expected:  FID of 50,000 samples of the averaged parameters against the training set, without guidance, in one step and
           in two, the second of them from theta = 1.1: 3.23 and 2.05 for sct, 2.97 and 2.07 for scd (recalled); the
           paper's largest, width 384, has 2.04 and 1.48 for sct, 2.44 and 1.66 for scd (recalled). Batch, steps,
           warmup and time distribution are the paper's (recalled). Learning rates follow EDM2, with a cosine schedule
           instead of an inverse square root. Its network has adaptive double normalization, which is not supported.
           280.2 M parameters.
"""

from configs import common

VARIANTS = ("teacher", "sct", "scd")


def get_config(variant: str = "sct"):
    common.choose("variant", variant, dict.fromkeys(VARIANTS))
    is_teacher = variant == "teacher"
    return common.imagenet64(
        **common.scm(variant, teacher="runs/imagenet64_trig"),
        network=dict(
            name="edm2",
            width=192,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            attention_resolutions=(16, 8),
            head_dim=64,
            dtype="bfloat16",
        ),
        optimizer=dict(
            name="adam", learning_rate=1e-2 if is_teacher else 1e-3, schedule="cosine", warmup=5000, clip=None, b2=0.99
        ),
        ema=dict(decays=(0.9999,)),
        train=dict(steps=400_000, batch_size=2048),
        checkpoint=dict(every=5000),
    )
