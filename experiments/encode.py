"""Encodes the data of a config with its autoencoder, once, for training on latents.

python -m experiments.encode --config=configs/digits.py --out=data/latents --config.autoencoder.name=pca \\
    --config.autoencoder.path=runs/pca.safetensors

Then train with the same autoencoder and --config.data="{'name': 'array_record', 'path': 'data/latents'}". The same
command resumes an encoding that was interrupted. With --num_processes and its like, several processes share the work.
"""

import jax
from absl import flags

from diffusion.core.build import build
from diffusion.core.progress import Progress
from diffusion.core.types import InputError
from diffusion.pipelines.build_training import training
from diffusion.pipelines.config import check_config
from diffusion.pipelines.encoding import encode
from diffusion.pipelines.model import build_autoencoder
from experiments import cli

CONFIG = cli.define_config()
OUT = cli.define_path("out", None, "The folder to write, an array_record data set.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Number of examples that are encoded at once.", lower_bound=1)
flags.mark_flags_as_required(["config", "out"])


def main() -> None:
    config = CONFIG.value
    check_config(config)
    source = build("data", config["data"], field="data")
    autoencoder = build_autoencoder(config, source.spec)
    if autoencoder is None:
        raise InputError("autoencoder", "is missing; the config names none, so there is nothing to encode with")
    processes = jax.process_count()
    progress = Progress("encode", -(-len(source) // processes))
    try:
        count = encode(
            source, autoencoder, OUT.value, batch_size=BATCH_SIZE.value, workers=training(config)["options"].workers,
            process=jax.process_index(), processes=processes, progress=progress.update,
        )  # fmt: skip
    finally:
        progress.close()
    print(f"{OUT.value}: {count:,} latents {autoencoder.shape}; train on them with "
          f"--config.data=\"{{'name': 'array_record', 'path': {OUT.value!r}}}\"")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
