"""Fine-tuning of Stable Diffusion 1.5 (Rombach et al. 2022, arXiv 2112.10752) on images with captions.

Command:   python -m experiments.convert --from=models/stable-diffusion-v1-5 --to=runs/sd15
           python -m experiments.train --config=configs/sd15_finetune.py --config.init_from=runs/sd15 \\
               --workdir=runs/sd15_finetune
           the argument is what the network predicts: eps (the default), with the weights of min-SNR (Hang et al. 2023,
           arXiv 2303.09556); or v, which makes the model predict v on a schedule with zero terminal SNR (Lin et al.
           2024, arXiv 2305.08891). --config.objective.offset_noise=0.05 adds noise that all pixels share, for darker
           and brighter pictures; --config.objective.weighting.name=simple leaves out the weights.
Data:      data/captioned, a folder of images with captions (docs/data.md), and models/stable-diffusion-v1-5, a pipeline
           folder of diffusers, whose autoencoder and text encoder are read and not trained. Images keep their aspect
           ratio: 17 sizes of about 512x512 pixels, each of which compiles its own train step.
Hardware:  859.5 M parameters. Parameters, moments and one average take 12.8 GiB in float32; docs/scaling.md has plans.
           On several devices set --config.mesh.fsdp to their number, up to 8, and --config.mesh.data for the rest.
Expected:  no figures have been measured
"""

from configs import common

VARIANTS = tuple(common.SD_VARIANTS)


def get_config(variant: str = "eps"):
    path = "models/stable-diffusion-v1-5"
    return common.sd_finetune(variant, path, 512, text_encoder=dict(name="clip", path=path))
