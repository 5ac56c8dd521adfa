"""Times the U-Net and the autoencoder of Stable Diffusion 1.5 against the same networks in diffusers: the same weights,
alternately, in one process, on latents of 64 x 64 and batches of one.

`python -m experiments.benchmark --suite=text` runs it, from a checkout with requirements-peers.txt installed. It takes
about 18 GB of memory. A train step is loss, gradient and SGD, since the moments of Adam would take another 14 GB.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.build import build, build_network
from diffusion.core.tensors import to_native
from diffusion.core.types import ArraySpec, Autoencoder, Spec, Text, TextEncoder
from diffusion.distributed.mesh import make_mesh
from diffusion.interop import diffusers_models, diffusers_unet_text
from diffusion.pipelines.generator import Generator
from diffusion.profiling.macs import network_macs
from diffusion.profiling.timing import time_alternately
from tests.peers.speed import LEARNING_RATE, OBJECTIVE, matmul_rate, print_row

SIDE, STEPS, SCALE = 64, 20, 7.5
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 8 * SIDE,
}  # fmt: skip
NAME = f"Stable Diffusion's U-Net, {SIDE}x{SIDE}x4"


def text(runs: int) -> None:
    """Prints a table of a train step and of guided sampling."""
    import diffusers
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    diffusers.utils.logging.set_verbosity_error()
    model = diffusers.UNet2DConditionModel(sample_size=SIDE, cross_attention_dim=768)
    section, spec = diffusers_unet_text.network_of(dict(model.config), {}, False)
    network = build_network(section, spec)
    foreign = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(jnp.array, to_native(diffusers_models.pairs(section, spec), foreign, shapes))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, *spec.shape)).astype(np.float32)
    tokens, null = rng.normal(size=(2, 1, *spec.conditions["text"].shape)).astype(np.float32)
    texts = [Text(value, np.ones(value.shape[:2], bool)) for value in (tokens, null)]

    rate, macs = matmul_rate(), network_macs(network, spec)
    print(f"matrix product, float32: {rate / 1e9:.0f} GFLOP/s; a forward pass: {macs / 1e9:.0f} GMAC")
    with torch.no_grad():
        theirs = model(channels_first(x), torch.tensor([500]), torch.tensor(tokens)).sample.permute(0, 2, 3, 1).numpy()
    ours = jax.jit(network.apply)(params, x, np.float32([500]), {"text": texts[0]})
    print(f"outputs differ by {abs(ours - theirs).max() / abs(theirs).max():.1e}")
    vae = diffusers.AutoencoderKL(**VAE).eval()
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        autoencoder = build("autoencoders", {"name": "kl", "path": folder}, shape=(8 * SIDE, 8 * SIDE, 3))
    sides = {
        "ours": our_sampling(network, spec, params, texts, autoencoder),
        "theirs": their_sampling(model, vae, tokens, null),
    }
    seconds = time_alternately(sides, runs)
    print_row(f"DDIM, {STEPS} steps, guided, decoded", seconds, 2 * 2 * STEPS * macs / rate)
    sides = {"ours": our_step(network, params, x, texts[0]), "theirs": their_step(model, x, tokens)}
    seconds = time_alternately(sides, runs)
    print_row("train step (SGD)", seconds, 3 * 2 * macs / rate)
    print(f"{statistics.median(seconds['ours']):.1f} s per step")


def channels_first(x: np.ndarray) -> Any:
    """Returns images `[B, H, W, C]` as a tensor `[B, C, H, W]`."""
    import torch

    return torch.tensor(x.transpose(0, 3, 1, 2)).contiguous()


def our_step(network: Any, params: Any, x: np.ndarray, text: Text) -> Callable[[], None]:
    """Returns a function that runs a train step; it takes over the parameters."""
    eps = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def loss(params: Any) -> jax.Array:
        return jnp.mean((network.apply(params, x, np.float32([500]), {"text": text}) - eps) ** 2)

    step = jax.jit(
        lambda params: jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, jax.grad(loss)(params)),
        donate_argnums=0,
    )

    def call() -> None:
        nonlocal params
        params = jax.block_until_ready(step(params))

    return call


def their_step(model: Any, x: np.ndarray, tokens: np.ndarray) -> Callable[[], None]:
    """Returns the same in PyTorch."""
    import torch

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    x, tokens, eps = channels_first(x), torch.tensor(tokens), torch.randn(x.transpose(0, 3, 1, 2).shape)

    def call() -> None:
        torch.nn.functional.mse_loss(model(x, torch.tensor([500]), tokens).sample, eps).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def our_sampling(
    network: Any, spec: Any, params: Any, texts: list[Text], autoencoder: Autoencoder
) -> Callable[[], Any]:  # fmt: skip
    """Returns guided sampling of one image of 512 x 512 pixels."""
    prompt, null = texts
    data = Spec(ArraySpec((8 * SIDE, 8 * SIDE, 3)), captions=True)
    encoder = TextEncoder(lambda prompts: prompt, spec.conditions["text"], {}, lambda params, text: text, null=null)
    generator = Generator(
        network, build("objectives", OBJECTIVE), data, make_mesh(), cond_drop_rate=0.1, text_encoder=encoder,
        autoencoder=autoencoder,
        sampler={"name": "ddim", "steps": STEPS, "grid": {"name": "leading", "steps_offset": 1}},
        guidance={"name": "cfg", "scale": SCALE},
    )  # fmt: skip
    return lambda: generator({"net": params}, {"text": prompt}, 1, seed=0, batch_size=1)


def their_sampling(model: Any, vae: Any, tokens: np.ndarray, null: np.ndarray) -> Callable[[], None]:
    """Returns the same by diffusers' pipeline."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(vae, None, None, model.eval(), scheduler, None, None,
                                   requires_safety_checker=False)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    prompt, negative = torch.tensor(tokens), torch.tensor(null)

    def call() -> None:
        with torch.no_grad():
            pipe(prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=SCALE, height=8 * SIDE,
                 width=8 * SIDE, num_inference_steps=STEPS, output_type="np")  # fmt: skip

    return call
