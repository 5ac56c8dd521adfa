"""A vector-quantised autoencoder of 64x64 pictures of coloured shapes: 16x16 codes of 512, with three channels.

Command:   python -m experiments.train --config=configs/shapes64_vq.py --workdir=runs/shapes64_vq
           python -m experiments.convert --from=runs/shapes64_vq --to=models/shapes64_vq
Hardware:  one CPU core, about 16 minutes (AMD EPYC).
Expected:  python -m experiments.evaluate --workdir=runs/shapes64_vq
           psnr 39.8, readable_shapes 1.000, of 1,000 held-out pictures; codes_used 512, perplexity 267.5
"""

from configs import common


def get_config():
    return common.shapes64(
        objective=dict(codebook="ema"),
        network=dict(name="autoencoder_vq", latent_channels=3, num_vq_embeddings=512, block_out_channels=(16, 32, 64)),
        eval=dict(metrics=dict(reconstruction=dict(codes=True))),
    )
