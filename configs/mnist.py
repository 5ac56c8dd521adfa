"""DDPM on MNIST: a class-conditional U-Net on 60,000 images of 28x28.

Command:   python -m experiments.train --config=configs/mnist.py --workdir=runs/mnist
Data:      python -m experiments.prepare_data --config=configs/mnist.py    (TFDS downloads it; 60,000 and 10,000 images)
Hardware:  not measured; meant for one GPU.
Expected:  not measured.
"""

from configs import common


def get_config():
    return common.config(
        dict(),
        data=dict(name="tfds", dataset="mnist"),
        objective=dict(name="denoising", time_sampler=dict(name="stratified")),
        network=dict(
            name="unet", width=64, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(14, 7), dropout=0.1
        ),
        optimizer=dict(learning_rate=1e-3, schedule="cosine", warmup=500, b2=0.99),
        train=dict(steps=20_000, batch_size=128, log_every=100, preview_every=2000),
        checkpoint=dict(every=2000, keep=2),
        guidance=dict(scale=1.5),
        eval=dict(data=dict(name="tfds", dataset="mnist", split="test")),
    )
