"""The variational autoencoders of latent diffusion for 256x256 images: Rombach et al. 2022 (arXiv 2112.10752).

Command:   python -m experiments.train --config=configs/imagenet256_kl.py:f8 --workdir=runs/imagenet256_kl
           python -m experiments.convert --from=runs/imagenet256_kl --to=models/imagenet256_kl
           the argument is the number of pixels per side of a latent pixel: f4, f8, f16 or f32; f8 is Stable Diffusion's
Data:      data/imagenet/train and data/imagenet/validation, folders of images. The paper's table 8 is for models that
           were trained on OpenImages; the authors' configs read ImageNet.
           weights/vgg16-397923af.pth and weights/vgg.pth, for the perceptual term; see docs/latents.md
Hardware:  not stated. The authors' configs have 24 images per step and GPU (f4: 4) and not the number of GPUs; here a
           step has 24. The learning rate is 4.5e-6 times this number, so change both.
Expected:  python -m experiments.evaluate --workdir=runs/imagenet256_kl
           psnr on ImageNet's validation images, from the table of the authors' repository (CompVis/latent-diffusion):
           f4 27.53, f8 24.19, f16 24.08, f32 22.27; their rFID: 0.27, 0.90, 0.87, 2.04. Their f16 and f32 have
           self-attention in all blocks at sides of 16 and 8, and here in the middle alone. f4, f8, f16 and f32 have
           55.3, 83.7, 64.4 and 93.4 M parameters.
"""

from configs import common

VARIANTS = dict(
    f4=dict(latent_channels=3, block_out_channels=(128, 256, 512)),
    f8=dict(latent_channels=4, block_out_channels=(128, 256, 512, 512)),
    f16=dict(latent_channels=16, block_out_channels=(128, 128, 256, 256, 512)),
    f32=dict(latent_channels=64, block_out_channels=(128, 128, 256, 256, 512, 512)),
)
STEPS = dict(f4=176_991, f8=246_803, f16=442_998, f32=406_763)


def get_config(variant: str = "f8"):
    return common.imagenet256_autoencoder(
        objective=dict(kl_weight=1e-6, disc_weight=0.5, disc_start=50_001),
        network=dict(name="autoencoder_kl", **common.choose("variant", variant, VARIANTS)),
        train=dict(steps=STEPS[variant]),
    )
