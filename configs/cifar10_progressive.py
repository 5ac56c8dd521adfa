"""Progressive distillation on CIFAR-10 without classes, as in Salimans & Ho 2022 (arXiv 2202.00512): from 8,192 DDIM
steps to a few.

Command:   python -m experiments.train --config=configs/cifar10_progressive.py:teacher --workdir=runs/cifar10_v
           python -m experiments.train --config=configs/cifar10_progressive.py:4 --workdir=runs/cifar10_progressive_4
           the argument is `teacher`, the model that is distilled, or the last student's number of steps: 8, 4, 2 or 1
Data:      python -m experiments.prepare_data --config=configs/cifar10_progressive.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  the paper's: 8 TPU chips (recalled).
Expected:  FID of 50,000 samples of the averaged parameters against the training set: 2.57 in 8 steps, 3.00 in 4, 4.51
           in 2 and 9.12 in one (recalled; table 2). The paper gives the rounds of 2 and of one step 100,000 training
           steps and the others 50,000 (recalled); here each has 50,000. Settings that the paper does not state are
           those of its published code, as far as recalled. The schedule is its cosine as a table of 1,024 betas.
"""

from configs import common

RUNS = {"teacher": 1, "8": 8, "4": 4, "2": 2, "1": 1}  # the sampling steps of the last student
START_STEPS, ROUND_STEPS = 4096, 50_000
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
        teacher="runs/cifar10_v",
    )
    is_teacher = run == "teacher"
    return common.cifar10(
        objective=dict(name="denoising", **SHARED) if is_teacher else student,
        network=dict(
            name="unet",
            width=256,
            channel_mult=(1, 1, 1),
            num_res_blocks=3,
            attention_resolutions=(16, 8),
            head_dim=None,
            resample="residual",
            dropout=0.2 if is_teacher else 0.0,
        ),
        optimizer=dict(
            name="adam",
            learning_rate=2e-4 if is_teacher else 1e-4,
            schedule="constant" if is_teacher else "linear",
            warmup=1000 if is_teacher else 0,
            cycles=1 if is_teacher else rounds,
        ),
        ema=dict(decays=(0.9999,)),
        train=dict(steps=800_000 if is_teacher else rounds * ROUND_STEPS, batch_size=128),
        sampler=dict(name="ddim", steps=1024 if is_teacher else end_steps),
    )
