"""Progressive distillation on ImageNet at 64x64 with classes, as in Salimans & Ho 2022 (arXiv 2202.00512): from 2,048
DDIM steps to a few.

Command:   python -m experiments.train --config=configs/imagenet64_progressive.py:teacher --workdir=runs/imagenet64_v
           python -m experiments.train --config=configs/imagenet64_progressive.py:4 --workdir=runs/imagenet64_prog_4
           the argument is `teacher`, the model that is distilled, or the last student's number of steps: 8, 4, 2 or 1
Data:      python -m experiments.prepare_data --config=configs/imagenet64_progressive.py
           1,281,167 and 50,000 images, as in configs/imagenet64_adm.py.
Hardware:  the paper's: 64 TPU chips (recalled). The paper does not use bfloat16.
Expected:  FID of 50,000 samples of the averaged parameters against the training set, without guidance: 6.77 in 4 steps,
           8.95 in 2 and 15.39 in one (recalled, as Song et al. 2023, arXiv 2303.01469, table 2, quotes them). The paper
           gives the rounds of 2 and of one step twice as many training steps as the others (recalled); here each has
           50,000. Settings that the paper does not state are those of its published code, as far as recalled. The
           schedule is the paper's cosine as a table of 1,024 betas.
"""

from configs import common

RUNS = {"teacher": 1, "8": 8, "4": 4, "2": 2, "1": 1}  # the sampling steps of the last student
START_STEPS, ROUND_STEPS = 1024, 50_000
# What the teacher and its students share; num_steps is a power of two, so that every round's steps are in the table.
SHARED = dict(
    schedule=dict(name="vp", betas="cosine", num_steps=1024),
    parameterization=dict(name="v"),
    weighting=dict(name="truncated_snr"),
)


def get_config(run: str = "4"):
    end_steps = common.choose("run", run, RUNS)
    rounds = (START_STEPS // end_steps).bit_length()
    student = dict(
        name="progressive_distillation",
        **SHARED,
        start_steps=START_STEPS,
        end_steps=end_steps,
        round_steps=ROUND_STEPS,
        continuous=False,
        teacher="runs/imagenet64_v",
    )
    is_teacher = run == "teacher"
    return common.imagenet64(
        objective=dict(name="denoising", **SHARED) if is_teacher else student,
        network=common.ADM64,
        optimizer=dict(
            name="adam",
            learning_rate=3e-4 if is_teacher else 1e-4,
            schedule="constant" if is_teacher else "linear",
            warmup=1000 if is_teacher else 0,
            cycles=1 if is_teacher else rounds,
        ),
        ema=dict(decays=(0.9999,)),
        train=dict(steps=550_000 if is_teacher else rounds * ROUND_STEPS, batch_size=2048),
        checkpoint=dict(every=5000),
        sampler=dict(name="ddim", steps=256 if is_teacher else end_steps),
        sharding=dict(rules=common.UNET_RULES),
    )
