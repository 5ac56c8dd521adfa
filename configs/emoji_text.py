"""Text to image on emoji: 1,700 pictures of 64x64 pixels from their names, with a text encoder that is trained along.

Command:   python -m experiments.train --config=configs/emoji_text.py --workdir=runs/emoji_text
           python -m experiments.sample --workdir=runs/emoji_text --prompts="grinning face; red heart" --guidance=3
Data:      Noto emoji (Apache License 2.0) in data/emoji; docs/text.md says how to get them
Hardware:  any GPU or TPU; the model has 61 million parameters
Expected:  no figures have been measured
"""

from configs import common


def get_config():
    data = dict(name="folder", size=64, captions=True, labels=False)
    return common.config(
        dict(),
        data=dict(**data, path="data/emoji/train"),
        text_encoder=dict(name="small", vocab_size=2048, length=32, width=256, depth=4, num_heads=4),
        objective=dict(name="flow_matching", time_sampler=dict(name="logit_normal")),
        network=dict(
            name="unet", width=96, channel_mult=(1, 2, 3, 4), attention_resolutions=(16, 8), head_dim=32, dropout=0.1
        ),
        optimizer=dict(learning_rate=3e-4, warmup=1000),
        ema=dict(decays=(0.9995,)),
        train=dict(steps=100_000, batch_size=128, cond_drop_rate=0.1, preview_every=5000),
        checkpoint=dict(every=5000),
        eval=dict(data=dict(**data, path="data/emoji/test"), metrics=dict()),
    )
