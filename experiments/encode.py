"""Encodes the data of a config with its autoencoder and its text encoder, once, for training.

python -m experiments.encode --config=configs/digits.py --out=data/latents --config.autoencoder.name=pca \\
    --config.autoencoder.path=runs/pca.safetensors [--flip]

Then train with the same autoencoder and --config.data="{'name': 'array_record', 'path': 'data/latents'}". The data set
holds what a step would compute from the images: of a variational autoencoder the mean and the logarithm of the
variance, from which every step draws its latents, and of others the latents. It also holds the labels, and if the
config reads captions (--config.data.captions=True), these, and the texts that a text encoder makes of them. Images are
neither cropped nor mirrored at random; --flip adds their mirror images. The mean and the standard deviation of each
channel are printed at the end, and info.json has them.

The same command resumes an encoding that was interrupted. With --num_processes and its like, several processes share
the work. Neither changes the files.
"""

import logging

import jax
from absl import flags

from diffusion.core.build import build
from diffusion.core.progress import Progress
from diffusion.core.types import InputError
from diffusion.data.pipeline import decoded_spec
from diffusion.pipelines.build_training import training
from diffusion.pipelines.config import check_config
from diffusion.pipelines.encoding import encode
from diffusion.pipelines.model import build_autoencoder, build_text_encoder
from experiments import cli

CONFIG = cli.define_config()
OUT = cli.define_path("out", None, "The folder to write, an array_record data set.")
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Number of examples that are encoded at once. Default: train.batch_size; the results are the "
    "same bits as in a step if it has as many examples per device.", lower_bound=1,
)  # fmt: skip
FLIP = flags.DEFINE_bool(
    "flip", False, "Also encode the mirror image, left to right, of each image: of N images, example N + i is that of "
    "example i."
)  # fmt: skip
flags.mark_flags_as_required(["config", "out"])

logger = logging.getLogger("diffusion.encode")


def main() -> None:
    config = CONFIG.value
    check_config(config)
    source = build("data", config["data"], field="data")
    autoencoder = build_autoencoder(config, decoded_spec(source))
    if autoencoder is None:
        raise InputError("autoencoder", "is missing; the config names none, so there is nothing to encode with")
    text_encoder = build_text_encoder(config, source=source) if config["text_encoder"] else None
    if text_encoder is not None and text_encoder.encode is None:
        logger.warning("the text encoder is trained with the network, so the captions are stored as they are")
        text_encoder = None
    if hasattr(source, "draw") and config["data"].get("flip") and not FLIP.value:
        logger.warning("data.flip has no effect, as each image is encoded once; --flip adds the mirror images")
    progress = Progress("encode", -(-len(source) * (1 + FLIP.value) // jax.process_count()))
    options = training(config)["options"]
    try:
        info = encode(
            source, autoencoder, OUT.value, text_encoder=text_encoder, data=config["data"], flip=FLIP.value,
            batch_size=BATCH_SIZE.value or options.batch_size, workers=options.workers, progress=progress.update,
        )  # fmt: skip
    finally:
        progress.close()
    moments = [f"{name} {' '.join(f'{value:.4g}' for value in info['latents'][name])}" for name in ("mean", "std")]
    also = ", 'captions': True" if source.spec.captions else ""
    print(f"{OUT.value}: {info['count']:,} latents {autoencoder.shape}, by channel {', '.join(moments)}; train on them "
          f"with --config.data=\"{{'name': 'array_record', 'path': {OUT.value!r}{also}}}\"")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
