"""Flow matching on 32x32 pictures of coloured shapes, drawn on the fly: a U-Net without conditions.

Command:   python -m experiments.train --config=configs/shapes.py --workdir=runs/shapes
Hardware:  two CPU cores, about fifteen minutes.
Expected:  python -m experiments.evaluate --workdir=runs/shapes
           readable_shapes 0.39, the share of 1,000 samples close to a possible picture; shapes_off 0.21
"""

from configs import common


def get_config():
    return common.config(
        dict(),
        data=dict(name="shapes"),
        objective=dict(name="flow_matching", time_sampler=dict(name="stratified")),
        network=dict(
            name="unet", width=16, channel_mult=(1, 2, 4), num_res_blocks=1, attention_resolutions=(8,), head_dim=32
        ),
        optimizer=dict(learning_rate=2e-3, schedule="cosine", warmup=100, b2=0.99),
        ema=dict(decays=(0.99, 0.998)),
        train=dict(steps=1500, batch_size=64, cond_drop_rate=0.0, preview_every=500),
        checkpoint=dict(every=500, keep=2),
        eval=dict(data=dict(name="shapes", split="test"), metrics=dict(readable_shapes=dict(num=1000))),
    )
