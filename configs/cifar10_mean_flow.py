"""MeanFlow on CIFAR-10 without classes, as in Geng et al. 2025 (arXiv 2505.13447), except for its augmentation.

Command:   python -m experiments.train --config=configs/cifar10_mean_flow.py --workdir=runs/cifar10_mean_flow
Data:      python -m experiments.prepare_data --config=configs/cifar10_mean_flow.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  not stated in the paper; a step costs about 1.25 times one of flow matching.
Expected:  FID 2.92: 50,000 samples of the averaged parameters against the training set, in one step. This is with
           EDM's augmentation without its vertical flips and rotations, which is not supported: with horizontal flips
           alone, as here, expect a higher FID. The network is EDM's ddpmpp (55.7 M parameters) with an embedding of
           the step size; the warmup and the decay of the average are recalled.
"""

from configs import common


def get_config():
    return common.cifar10(
        objective=dict(
            name="mean_flow",
            time_sampler=dict(name="logit_normal", mean=-2.0, std=2.0),
            ratio_r_neq_t=0.75,
            norm_p=0.75,
        ),
        network=dict(common.DDPMPP, dropout=0.2, scalar_conditions=("step_size",)),
        optimizer=dict(name="adam", learning_rate=6e-4, warmup=10_000, clip=None),
        ema=dict(decays=(0.99995,)),
        train=dict(steps=800_000, batch_size=1024, preview_every=5000),
        checkpoint=dict(every=5000),
        sampler=dict(name="flow_map", steps=1),
    )
