"""DDPM on CIFAR-10 without classes, as in Ho et al. 2020 (arXiv 2006.11239).

Command:   python -m experiments.train --config=configs/cifar10_ddpm.py --workdir=runs/cifar10_ddpm
Data:      python -m experiments.prepare_data --config=configs/cifar10_ddpm.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  the paper's: a TPU v3-8, 10.6 hours (recalled).
Expected:  FID 3.17 (recalled): 50,000 samples of the averaged parameters against the training set, 1,000 evaluations
           each; without the average a rerun gives 12 to 14. 35.7 M parameters.
"""

from configs import common


def get_config():
    return common.cifar10(
        objective=dict(
            name="denoising",
            schedule=dict(name="vp", betas="linear", beta_start=1e-4, beta_end=0.02, num_steps=1000),
            parameterization=dict(name="eps", c_noise="index"),
            time_sampler=dict(name="discrete"),
        ),
        network=dict(
            name="unet",
            width=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=2,
            attention_resolutions=(16,),
            head_dim=None,
            scale_shift=False,
            asymmetric_padding=True,
            freq_shift=1,
            sin_first=True,
            epsilon=1e-6,
            dropout=0.1,
        ),
        optimizer=dict(name="adam", learning_rate=2e-4, warmup=5000),
        ema=dict(decays=(0.9999,), warmup=False),
        train=dict(steps=800_000, batch_size=128),
        sampler=dict(name="ancestral", variance="beta", steps=1000),
        guidance=dict(threshold=dict(percentile=1.0)),
    )
