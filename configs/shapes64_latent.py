"""Flow matching on latents of 64x64 pictures of coloured shapes, without captions.

Command:   python -m experiments.encode --config=configs/shapes64_latent.py --config.data.length=40000 \\
               --out=data/shapes64
           python -m experiments.train --config=configs/shapes64_latent.py --workdir=runs/shapes64_latent \\
               --config.data="{'name': 'array_record', 'path': 'data/shapes64'}"
Data:      40,000 pictures, encoded by the autoencoder in models/shapes64_kl; see configs/shapes64_kl.py
Hardware:  one CPU core, 2 minutes to encode and 31 minutes to train (AMD EPYC)
Expected:  python -m experiments.evaluate --workdir=runs/shapes64_latent
           readable_shapes 0.48, the share of 1,000 samples close to a possible picture; shapes_off 0.20. With
           autoguidance by its own step 2,000 and a scale of 3.5, 0.55 of 300
"""

from configs import common


def get_config():
    return common.config(
        dict(),
        data=dict(name="shapes", size=64),
        autoencoder=dict(name="kl", path="models/shapes64_kl"),
        objective=dict(name="flow_matching", time_sampler=dict(name="stratified")),
        network=dict(name="unet", width=64, channel_mult=(1, 2), head_dim=32, attention_resolutions=(8, 4)),
        optimizer=dict(learning_rate=1.5e-3, schedule="cosine", warmup=100, b2=0.99),
        ema=dict(decays=(0.99, 0.998)),
        train=dict(steps=8000, batch_size=32, cond_drop_rate=0.0, preview_every=2000),
        checkpoint=dict(every=1000, keep=2, keep_every=2000),
        eval=dict(data=dict(name="shapes", size=64, split="test"), metrics=dict(readable_shapes=dict(num=1000))),
    )
