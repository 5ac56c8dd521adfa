"""Text to image: pictures of coloured shapes from their captions, with a text encoder that is trained along.

Command:   python -m experiments.train --config=configs/shapes_text.py --workdir=runs/shapes_text
           python -m experiments.sample --workdir=runs/shapes_text --guidance=3 \\
               --prompts="a red circle; two blue squares; a small green triangle above a large white circle"
Data:      drawn on the fly, without four of the 24 pairs of a colour and a shape, which held-out prompts also name, and
           encoded by the autoencoder in models/shapes64_kl; see configs/shapes64_kl.py
Hardware:  two CPU cores
Expected:  python -m experiments.evaluate --workdir=runs/shapes_text
           not measured yet. A U-Net in place of the transformer reached caption_match 0.16 of 300 samples after 6,000
           steps of 32, and did not follow places.
"""

from configs import common


def get_config():
    data = dict(name="shapes", size=64, max_things=2, captions="varied")
    return common.config(
        dict(),
        data=dict(**data, combinations="seen"),
        autoencoder=dict(name="kl", path="models/shapes64_kl"),
        text_encoder=dict(name="small", vocab_size=400, length=24, width=128, depth=2, num_heads=4),
        objective=dict(name="flow_matching", time_sampler=dict(name="stratified")),
        network=dict(name="dit", patch_size=2, width=256, depth=6, num_heads=8, qk_norm=True, remat="none"),
        optimizer=dict(learning_rate=1.5e-3, schedule="cosine", warmup=200, b2=0.99),
        ema=dict(decays=(0.99, 0.998)),
        train=dict(steps=8000, batch_size=32, cond_drop_rate=0.1, preview_every=2000),
        checkpoint=dict(every=1000, keep=2),
        eval=dict(
            data=dict(**data, split="test"),
            metrics=dict(caption_match=dict(num=2000, guidance=2.0, by_combination=True)),
        ),
    )
