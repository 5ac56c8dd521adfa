"""EDM on CIFAR-10 without classes, as in Karras et al. 2022 (arXiv 2206.00364), except for its augmentation.

Command:   python -m experiments.train --config=configs/cifar10_edm.py:ddpmpp --workdir=runs/cifar10_edm
           the argument is the network: ddpmpp (55.7 M parameters) or ncsnpp (56.4 M)
Data:      python -m experiments.prepare_data --config=configs/cifar10_edm.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  the paper's: 8 V100, about two days.
Expected:  FID 2.05 for ddpmpp and 1.99 for ncsnpp (recalled; table 2, configuration E): the lowest of three sets of
           50,000 samples of the averaged parameters against the training set, 35 evaluations each. This is with
           horizontal flips, as here; with the paper's augmentation, which is not supported, 1.97 and 1.98 (recalled).
"""

from configs import common

NETWORKS = dict(ddpmpp=common.DDPMPP, ncsnpp=common.DDPMPP | common.NCSNPP)
IMAGES, BATCH_SIZE = 200_000_000, 512


def get_config(network: str = "ddpmpp"):
    return common.cifar10(
        objective=dict(
            name="denoising",
            schedule=dict(name="edm", sigma_min=0.002, sigma_max=80.0),
            parameterization=dict(name="edm", sigma_data=0.5, c_noise="log_sigma"),
            time_sampler=dict(name="log_normal", mean=-1.2, std=1.2),
            weighting=dict(name="edm", sigma_data=0.5),
        ),
        network=dict(**common.choose("network", network, NETWORKS), dropout=0.13),
        optimizer=dict(name="adam", learning_rate=1e-3, warmup=10_000_000 // BATCH_SIZE, clip=None),
        ema=dict(decays=(0.5 ** (BATCH_SIZE / 500_000),)),  # a half-life of 500,000 images
        train=dict(steps=IMAGES // BATCH_SIZE, batch_size=BATCH_SIZE, preview_every=5000),
        checkpoint=dict(every=5000),
        sampler=dict(name="heun", steps=18, grid=dict(name="karras", rho=7.0)),
    )
