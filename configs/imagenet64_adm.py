"""ADM on ImageNet at 64x64 with classes, as in Dhariwal & Nichol 2021 (arXiv 2105.05233).

Command:   python -m experiments.train --config=configs/imagenet64_adm.py --workdir=runs/imagenet64_adm
Data:      python -m experiments.prepare_data --config=configs/imagenet64_adm.py
           TFDS downloads 14 GB from image-net.org (not tried): the images of Chrabaszcz et al. 2017 (arXiv 1707.08819),
           1,281,167 and 50,000, each scaled to a square as a whole; the paper uses its central square (recalled).
Hardware:  the paper's: V100s, about 900 GPU days in half precision (recalled); here bfloat16.
Expected:  FID 2.07: 50,000 samples of the averaged parameters against the training set, 250 evaluations each, without
           guidance. 295.9 M parameters.
"""

from configs import common


def get_config():
    return common.imagenet64(
        objective=dict(
            name="denoising",
            schedule=dict(name="vp", betas="cosine", num_steps=1000),
            parameterization=dict(name="eps", c_noise="index"),
            time_sampler=dict(name="discrete"),
            learned_variance=True,
        ),
        network=dict(common.ADM64, dropout=0.1, outputs=2),
        optimizer=dict(name="adamw", learning_rate=3e-4, weight_decay=0.0, clip=None),
        ema=dict(decays=(0.9999,), warmup=False),
        train=dict(steps=540_000, batch_size=2048),
        checkpoint=dict(every=5000),
        sampler=dict(name="ancestral", variance="learned", steps=250, grid=dict(name="linspace")),
        guidance=dict(threshold=dict(percentile=1.0)),
        sharding=dict(rules=common.UNET_RULES),
    )
