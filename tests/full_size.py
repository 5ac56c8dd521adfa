"""Writes a pipeline of Stable Diffusion in full size with random weights, and measures its conversion to a run.

python -m tests.full_size --kind=sdxl --folder=models/sdxl_random --dtype=float32

prints the size of the weights, the time in which all files can be read, that of the conversion, and the peak of its
memory. On Linux as root, files are read from the disk and not from the cache of the system.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import tempfile
import time

import jax
import numpy as np

from configs.common import CAPTIONED
from diffusion.core import model_folder, trees
from diffusion.core.build import build, build_network
from diffusion.core.types import ArraySpec, ConditionSpec, Spec
from diffusion.encoders import autoencoder_folder
from diffusion.encoders.autoencoder_folder import Scale, Stored
from diffusion.encoders.text_folder import CLIP, PROJECTED
from diffusion.interop import diffusers_models
from diffusion.pipelines.conversion import import_folder
from tests import text_folders
from tests.sd_folders import EULER, PNDM

LARGEST = 2**28  # values of the largest array
VAE = {"name": "autoencoder_kl", "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
       "layers_per_block": 2}  # fmt: skip
VIT_L = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768}  # fmt: skip
VIT_G = VIT_L | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
                 "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
XL = {"name": "unet_text", "channel_mult": (1, 2, 4), "depth": (0, 2, 10), "middle_depth": 10, "num_heads": None,
      "head_dim": 64, "use_linear_projection": True}  # fmt: skip
# For each kind: the class, the side of the latents, the network, its conditions, the text encoders and the scheduler.
KINDS = {
    "sd15": ("StableDiffusionPipeline", 64, {"name": "unet_text"}, {"text": ConditionSpec("text", (77, 768))},
             {"text_encoder": (CLIP, VIT_L)}, PNDM),
    "sdxl": ("StableDiffusionXLPipeline", 128, XL,
             {"time_ids": ConditionSpec("vector", (6,)), "text": ConditionSpec("text", (77, 2048), pooled=1280)},
             {"text_encoder": (CLIP, VIT_L), "text_encoder_2": (PROJECTED, VIT_G)}, EULER),
}  # fmt: skip


def write(folder: pathlib.Path, kind: str, dtype: str) -> None:
    """Writes a pipeline. All tensors are views of the same random values, so that it takes little memory."""
    name, side, network, conditions, encoders, scheduler = KINDS[kind]
    values = (np.random.default_rng(0).standard_normal(LARGEST, np.float32) / 50).astype(dtype)
    ones = np.ones(2**16, dtype)

    def random(path, like):
        source = ones if trees.path_name(path).endswith("scale") else values
        return source[: like.size].reshape(like.shape)

    def params(init):
        return jax.tree_util.tree_map_with_path(random, jax.eval_shape(init, jax.random.key(0)))

    spec = Spec(ArraySpec((side, side, 4), "latent"), conditions)
    model = diffusers_models.Model(network, spec, params(build_network(network, spec).init))
    parts = {"unet": ["diffusers", diffusers_models.write(str(folder / "unet"), model)]}
    shape = (8 * side, 8 * side, 3)
    stored = Stored(VAE, params(build("networks", VAE, shape=shape).init), shape, Scale(0.18215))
    autoencoder_folder.write(str(folder / "vae"), stored)
    for part, (encoder, config) in encoders.items():
        stored = text_folders.Stored(encoder, text_folders.CLIP_CONFIG | config, None)
        stored = text_folders.Stored(encoder, stored.config, params(stored.transformer().init))
        tokenizer = part.replace("text_encoder", "tokenizer")
        text_folders.write_encoder(folder / part, stored, folder / tokenizer)
        parts |= {part: ["transformers", encoder], tokenizer: ["transformers", "CLIPTokenizer"]}
    parts |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", scheduler["_class_name"]]}
    if kind == "sd15":
        parts |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    model_folder.write_json(str(folder / "scheduler"), "scheduler_config.json", scheduler)
    about = {"_class_name": name, "_diffusers_version": model_folder.VERSION}
    (folder / "model_index.json").write_text(json.dumps(about | parts))


def forget_files() -> None:
    """Empties the cache of the system, if that is allowed."""
    os.sync()
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")


def seconds(function) -> float:
    forget_files()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def read_all(folder: pathlib.Path) -> None:
    buffer = bytearray(2**24)
    for path in folder.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=KINDS, default="sd15")
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    if not args.folder.exists():
        write(args.folder, args.kind, args.dtype)
    size = sum(path.stat().st_size for path in args.folder.rglob("*.safetensors"))
    print(f"weights {size / 2**30:.2f} GiB")
    with tempfile.TemporaryDirectory() as top:
        for run in range(args.runs):
            reading = seconds(lambda: read_all(args.folder))
            workdir = os.path.join(top, str(run))
            converting = seconds(lambda: import_folder(str(args.folder), workdir, lambda *of: CAPTIONED))  # noqa: B023
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(f"read in {reading:.1f} s, converted in {converting:.1f} s: {converting / reading:.2f}; "
                  f"peak {peak / 2**30:.2f} GiB: {peak / size:.2f} of the weights")  # fmt: skip


if __name__ == "__main__":
    main()
