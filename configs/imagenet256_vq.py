"""The vector-quantised autoencoders of latent diffusion for 256x256 images: Rombach et al. 2022 (arXiv 2112.10752).

Command:   python -m experiments.train --config=configs/imagenet256_vq.py:f4 --workdir=runs/imagenet256_vq
           python -m experiments.convert --from=runs/imagenet256_vq --to=models/imagenet256_vq
           the argument is the number of pixels per side of a latent pixel: f4, f8 or f16
Data:      data/imagenet/train and data/imagenet/validation, folders of images. The paper's table 8 is for models that
           were trained on OpenImages.
           weights/vgg16-397923af.pth and weights/vgg.pth, for the perceptual term; see docs/latents.md
Hardware:  not stated. The authors' configs have 8 (f4), 10 (f8) and 14 (f16) images per step and GPU and not the number
           of GPUs; here a step has 24. The learning rate is 4.5e-6 times this number, so change both.
Expected:  python -m experiments.evaluate --workdir=runs/imagenet256_vq
           psnr on ImageNet's validation images, from the table of the authors' repository (CompVis/latent-diffusion):
           f4 27.43, f8 23.07, f16 20.83; their rFID: 0.58, 1.14, 5.15. Their f8 and f16 have self-attention in all
           blocks at sides of 32 and 16, and here in the middle alone. f4, f8 and f16 have 55.3, 62.5 and 64.3 M
           parameters.
"""

from configs import common

VARIANTS = dict(
    f4=dict(latent_channels=3, num_vq_embeddings=8192, block_out_channels=(128, 256, 512)),
    f8=dict(latent_channels=4, num_vq_embeddings=16384, block_out_channels=(128, 256, 256, 512)),
    f16=dict(latent_channels=8, num_vq_embeddings=16384, block_out_channels=(128, 128, 256, 256, 512)),
)
CRITICS = dict(
    f4=dict(disc_weight=0.75, disc_start=0),
    f8=dict(disc_weight=0.6, disc_start=1, disc_layers=2),
    f16=dict(disc_weight=0.75, disc_start=250_001, disc_layers=2),
)
STEPS = dict(f4=533_066, f8=971_043, f16=1_101_166)


def get_config(variant: str = "f4"):
    return common.imagenet256_autoencoder(
        network=dict(name="autoencoder_vq", **common.choose("variant", variant, VARIANTS)),
        objective=dict(codebook_weight=1.0, **CRITICS[variant]),
        train=dict(steps=STEPS[variant]),
        eval=dict(metrics=dict(reconstruction=dict(codes=True))),
    )
