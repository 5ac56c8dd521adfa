"""Text to image: pictures of coloured shapes from their captions, with a text encoder that is trained along.

Command:   python -m experiments.encode --config=configs/shapes_text.py --config.data.length=40000 \\
               --out=data/shapes_text
           python -m experiments.train --config=configs/shapes_text.py --workdir=runs/shapes_text \\
               --config.data="{'name': 'array_record', 'path': 'data/shapes_text', 'captions': True}"
           python -m experiments.sample --workdir=runs/shapes_text --guidance=3 \\
               --prompts="a red circle; two blue squares; a small green triangle above a large white circle"
Data:      40,000 pictures with captions, encoded by the autoencoder in models/shapes64_kl (configs/shapes64_kl.py),
           without four of the 24 pairs of a colour and a shape, which held-out prompts also name
Hardware:  two cores of an Intel Xeon: 3 minutes on one to encode, and 21 minutes on both to train
Expected:  python -m experiments.evaluate --workdir=runs/shapes_text
           caption_match 0.87 of 2,000 held-out prompts; 0.88 of those of seen combinations, 0.84 of the others
"""

from configs import common


def get_config(space: str = "latents"):
    pixels = common.choose("space", space, {"latents": False, "pixels": True})
    data = dict(name="shapes", size=64, max_things=2, captions="varied")
    return common.config(
        dict(),
        data=dict(**data, combinations="seen"),
        autoencoder=None if pixels else dict(name="kl", path="models/shapes64_kl"),
        text_encoder=dict(name="small", vocab_size=400, length=24, width=96, depth=2, num_heads=4),
        objective=dict(name="flow_matching", time_sampler=dict(name="logit_normal", mean=0.5)),
        network=dict(common.SMALL_DIT, patch_size=4 if pixels else 2),
        optimizer=common.MUON,
        ema=dict(decays=(0.99,)),
        train=dict(
            steps=900 if pixels else 2200, batch_size=16 if pixels else 128, cond_drop_rate=0.1, preview_every=500
        ),
        checkpoint=dict(every=500, keep=2),
        eval=dict(
            data=dict(**data, split="test"),
            metrics=dict(
                caption_match=dict(num=2000, guidance=2.0, by_combination=True),
                readable_shapes=dict(num=1000, guidance=2.0),
            ),
        ),
    )
