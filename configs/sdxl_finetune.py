"""Fine-tuning of SDXL (Podell et al. 2023, arXiv 2307.01952) on images with captions.

Command:   python -m experiments.convert --from=models/stable-diffusion-xl-base-1.0 --to=runs/sdxl
           python -m experiments.train --config=configs/sdxl_finetune.py --config.init_from=runs/sdxl \\
               --workdir=runs/sdxl_finetune --config.mesh.data=1 --config.mesh.fsdp=16
           the argument is what the network predicts, eps or v; see configs/sd15_finetune.py for further options
Data:      data/captioned, a folder of images with captions (docs/data.md), and models/stable-diffusion-xl-base-1.0, a
           pipeline folder of diffusers, whose autoencoder and text encoders are read and not trained. Images keep their
           aspect ratio: 33 sizes of about 1024x1024 pixels, each of which compiles its own train step. The network
           receives the size of an image in its file and what was cropped, as time_ids.
Hardware:  2567.5 M parameters. Parameters, moments and one average take 38.3 GiB in float32, and the encoders up to
           3.4 GiB; docs/scaling.md has plans for pods.
Expected:  no figures have been measured
"""

from configs import common

VARIANTS = tuple(common.SD_VARIANTS)


def get_config(variant: str = "eps"):
    path = "models/stable-diffusion-xl-base-1.0"
    return common.sd_finetune(
        variant,
        path,
        1024,
        data=dict(size_conditions="sdxl"),
        text_encoder=dict(name="joined", path=path, layout="sdxl"),
        network=dict(channel_mult=(1, 2, 4), depth=(0, 2, 10), middle_depth=10, num_heads=(5, 10, 20)),
    )
