"""A variational autoencoder of 64x64 pictures of coloured shapes: latents of 8x8 pixels with four channels.

Command:   python -m experiments.train --config=configs/shapes64_kl.py --workdir=runs/shapes64_kl
           python -m experiments.convert --from=runs/shapes64_kl --to=models/shapes64_kl
Hardware:  one CPU core, 10 minutes (AMD EPYC).
Expected:  python -m experiments.evaluate --workdir=runs/shapes64_kl
           psnr 38.4, readable_shapes 0.999, of 1,000 held-out pictures
"""

from configs import common


def get_config():
    return common.shapes64(
        objective=dict(kl_weight=0.01),
        network=dict(name="autoencoder_kl", latent_channels=4, block_out_channels=(16, 32, 64, 64)),
    )
