"""Times networks against the same networks in PyTorch (diffusers): the same weights, alternately, in one process.

`python -m experiments.benchmark --suite=networks` runs it, from a checkout with requirements-peers.txt installed.
"""

import copy
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion.core.build import build, build_network, defaults
from diffusion.core.types import ArraySpec, Network, Spec, class_labels
from diffusion.distributed.mesh import make_mesh
from diffusion.interop import diffusers_models
from diffusion.layers.conditioner import Embedded
from diffusion.layers.functional import functional
from diffusion.layers.stack import Stack, rematerialised
from diffusion.networks import dit
from diffusion.pipelines.generator import Generator
from diffusion.profiling.macs import network_macs
from diffusion.profiling.timing import median_ratio, time_alternately
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.state import init_state
from diffusion.training.step import make_step

BATCH_SIZE, IMAGES, STEPS, SCALE = 8, 2, 50, 4.0
LEARNING_RATE, DECAY = 1e-4, 0.999
REMAT = "dots_with_no_batch_dims_saveable"  # the default of a DiT


@dataclasses.dataclass(frozen=True)
class Case:
    """A network that both libraries have, for data of a spec."""

    network: Mapping[str, Any]
    spec: Spec

    def build(self, **options: Any) -> Network:
        return build_network({**self.network, **options}, self.spec)


DIT_S = {"name": "dit", "patch_size": 2, "width": 384, "depth": 12, "num_heads": 6, "freq_shift": 1}
CIFAR = {"name": "unet", "head_dim": None, "scale_shift": False, "asymmetric_padding": True, "freq_shift": 1,
         "sin_first": True, "epsilon": 1e-6}  # fmt: skip
CASES = {
    "DiT-S/2, 32x32x4": Case(DIT_S, Spec(ArraySpec((32, 32, 4)), class_labels(1000))),
    "DDPM U-Net, 32x32x3": Case(CIFAR, Spec(ArraySpec((32, 32, 3)))),
}
OBJECTIVE = {"name": "denoising", "parameterization": {"name": "eps", "c_noise": "index"}, "time_sampler": "discrete"}


def networks(runs: int) -> None:
    """Prints a table of a train step of each network, guided sampling and compilation."""
    import torch

    torch.set_num_threads(os.cpu_count())
    rate = matmul_rate()
    print(f"matrix product, float32, {os.cpu_count()} threads: {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':34} {'ours':>9} {'theirs':>9}  ratio  of matmul   peak memory")
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, case) in enumerate(CASES.items()):
            path = os.path.join(folder, str(index))
            params = random_params(case)
            diffusers_models.write(path, diffusers_models.Model(case.network, case.spec, params))
            sides = {"ours": our_step(case, params), "theirs": their_step(path)}
            difference = relative_difference(case, params, path)
            work = 3 * 2 * BATCH_SIZE * network_macs(case.build(), case.spec)
            seconds = time_alternately(sides, runs)
            memory = {side: peak_memory(side, index, path) for side in sides}
            print_row(f"train step, {name}", seconds, work / rate, memory)
            print(f"{'':34} outputs differ by {difference:.1e}")
        path, case = os.path.join(folder, "0"), CASES["DiT-S/2, 32x32x4"]
        seconds = time_alternately(guided_sampling(case, path), runs)
        work = 2 * 2 * IMAGES * STEPS * network_macs(case.build(), case.spec)
        print_row(f"DDIM, {STEPS} steps, guided, DiT-S/2", seconds, work / rate)
    compilation(runs)


def data(runs: int) -> None:
    """Prints a table of the rates at which images are read; see `tests.peers.data_speed`."""
    from tests.peers import data_speed

    data_speed.data(runs)


def text(runs: int) -> None:
    """Prints a table of the U-Net of Stable Diffusion; see `tests.peers.text_speed`."""
    from tests.peers import text_speed

    text_speed.text(runs)


def print_row(
    name: str, seconds: Mapping[str, list[float]], ideal: float, memory: Mapping[str, float] | None = None
) -> None:
    """Prints the medians of both sides, their ratio, and the share of the matrix product's speed that ours reaches."""
    ours, theirs = (statistics.median(values) for values in seconds.values())
    ratio = median_ratio(seconds["theirs"], seconds["ours"])
    peak = "" if memory is None else f"  {memory['ours']:.2f} GB, {memory['theirs']:.2f} GB"
    print(f"{name:34} {ours:7.3f} s {theirs:7.3f} s {ratio:6.3f}   {ideal / ours:6.1%} {peak}", flush=True)


def matmul_rate(side: int = 2048) -> float:
    """Returns the FLOP/s of a float32 matrix product."""
    a = jnp.ones((side, side))
    product = jax.jit(lambda a: a @ a)
    return 2 * side**3 / min(time_alternately({"": lambda: product(a).block_until_ready()}, 9)[""])


def random_params(case: Case) -> Any:
    """Returns weights without zeros, so that every layer affects the output."""
    rng = np.random.default_rng(0)
    drawn = jax.jit(case.build().init)(jax.random.key(0))
    return jax.tree.map(lambda leaf: np.float32(leaf + 0.02 * rng.normal(size=leaf.shape)), drawn)


def example(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Returns x `[B, H, W, C]` and labels `[B]`."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(BATCH_SIZE, *case.spec.shape)).astype(np.float32)
    return x, np.arange(BATCH_SIZE) % max(case.spec.num_classes, 1)


def our_step(case: Case, params: Any = None, batches: Iterator[Mapping] | None = None) -> Callable[[], None]:
    """Returns a function that runs our train step on the next batch of `batches`, or on a synthetic batch."""
    network, objective = case.build(), build("objectives", OBJECTIVE)
    optimizer = make_optimizer(steps=10**6, learning_rate=LEARNING_RATE, clip=None)
    ema = make_ema(decays=(DECAY,), warmup=False)
    state = jax.jit(lambda: init_state(objective, network, optimizer, ema, jax.random.key(0)))()
    if params is not None:
        state = dataclasses.replace(state, params={"net": jax.tree.map(jnp.asarray, params)})
    step = jax.jit(make_step(objective, network, optimizer, ema, seed=0), donate_argnums=0)
    x, label = example(case)
    batch = {"x": x, "cond": {"label": label} if case.spec.num_classes else {}}
    batches = batches or itertools.repeat(batch)

    def call() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, next(batches)))

    return call


def load(path: str) -> Any:
    """Loads the diffusers model in a folder."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        kind = json.load(file)["_class_name"]
    return getattr(diffusers, kind).from_pretrained(path)


def their_step(path: str) -> Callable[[], None]:
    """Returns the same train step in PyTorch: noise, loss, gradient, AdamW and one EMA."""
    import torch
    from diffusers import DDPMScheduler

    model, scheduler = load(path).train(), DDPMScheduler()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=1e-4)
    config = model.config
    case = Case(
        {},
        Spec(
            ArraySpec((config.sample_size, config.sample_size, config.in_channels)),
            class_labels(config.get("num_embeds_ada_norm") or 0),
        ),
    )
    x, label = example(case)
    x, labels = torch.tensor(x.transpose(0, 3, 1, 2)).contiguous(), [torch.tensor(label)] * bool(case.spec.num_classes)

    def call() -> None:
        t, eps = torch.randint(0, 1000, (len(x),)), torch.randn_like(x)
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(model(scheduler.add_noise(x, eps, t), t, *labels).sample, eps).backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - DECAY)

    return call


def relative_difference(case: Case, params: Any, path: str) -> float:
    """Returns the largest difference of the two networks' outputs, relative to the largest output."""
    import torch

    x, label = example(case)
    t = np.linspace(0, 999, BATCH_SIZE).astype(np.int64)
    classes = case.spec.num_classes
    ours = jax.jit(case.build().apply)(params, x, np.float32(t), {"label": label} if classes else {})
    with torch.no_grad():
        model = load(path).eval()
        args = [torch.tensor(label)] * bool(classes)
        theirs = (
            model(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), *args).sample.numpy().transpose(0, 2, 3, 1)
        )
    return float(abs(ours - theirs).max() / abs(theirs).max())


def guided_sampling(case: Case, path: str) -> dict[str, Callable[[], Any]]:
    """Returns guided sampling by our generator, and by diffusers' pipeline with an autoencoder of negligible cost."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    generator = Generator(
        case.build(), build("objectives", OBJECTIVE), case.spec, make_mesh(), cond_drop_rate=0.1,
        sampler={"name": "ddim", "steps": STEPS, "grid": {"name": "leading"}},
        guidance={"name": "cfg", "scale": SCALE},
    )  # fmt: skip
    params, labels = {"net": random_params(case)}, list(range(IMAGES))
    pipe = DiTPipeline(load(path).eval(), AutoencoderKL(block_out_channels=(4,), norm_num_groups=1), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def theirs() -> None:
        with torch.no_grad():
            pipe(labels, guidance_scale=SCALE, num_inference_steps=STEPS, output_type="pt")

    return {
        "ours": lambda: generator(params, {"label": np.array(labels)}, IMAGES, seed=0, batch_size=IMAGES),
        "theirs": theirs,
    }


def peak_memory(side: str, index: int, path: str) -> float:
    """Returns the GB that two train steps add to a process that has imported its library."""
    code = f"from tests.peers import speed; speed.print_peak({side!r}, {index}, {path!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(side: str, index: int, path: str) -> None:
    """Prints the memory in GB that two train steps add; `peak_memory` runs it in a separate process."""
    if side == "theirs":
        import diffusers
        import torch  # noqa: F401

        diffusers.DiTTransformer2DModel, diffusers.UNet2DModel  # noqa: B018 (diffusers imports them on first access)
    else:
        jax.block_until_ready(jnp.ones(1))
    before = high_water_mark()
    step = our_step(list(CASES.values())[index]) if side == "ours" else their_step(path)
    step()
    step()
    print(high_water_mark() - before)


def high_water_mark() -> float:
    """Returns the largest resident memory of this process so far, in GB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e9


class Chain(nnx.Module):
    """Twelve blocks of DiT-S without embedding and head, either stacked and scanned or called one after the other."""

    def __init__(self, scanned: bool, rngs: nnx.Rngs):
        config = dit.DiTConfig(shape=(32, 32, 4), **defaults(dit.make))  # DiT-S/2

        def block(rngs: nnx.Rngs) -> dit.DiTBlock:
            return dit.DiTBlock(config, rngs=rngs)

        self.scanned = scanned
        if scanned:
            self.blocks = Stack(block, 12, REMAT, rngs=rngs)
        else:
            self.blocks = nnx.Dict({f"{index:02}": block(rngs) for index in range(12)})

    def __call__(self, x: jax.Array, c_noise: jax.Array, cond: Mapping, key: None) -> jax.Array:
        emb, size = Embedded(c_noise[:, None] * jnp.ones(x.shape[2])), (16, 16)
        if self.scanned:
            return self.blocks(x, emb, None, size)
        for name in self.blocks:
            x = rematerialised(lambda x, block=self.blocks[name]: block(x, emb, None, size), REMAT)(x)
        return x


def compilation(runs: int) -> None:
    """Prints compile times of twelve blocks, scanned and one by one, and the time of the first train step with an empty
    and with a filled compilation cache."""
    tokens = jax.ShapeDtypeStruct((BATCH_SIZE, 256, 384), jnp.float32)
    c_noise = jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.float32)

    def compile_gradient(scanned: bool) -> Callable[[], Any]:
        network = functional(lambda rngs: Chain(scanned, rngs), (256, 384))
        shapes = jax.eval_shape(network.init, jax.random.key(0))

        def call() -> None:
            jax.clear_caches()
            jax.jit(jax.grad(lambda *args: jnp.mean(network.apply(*args, {}) ** 2))).lower(
                shapes, tokens, c_noise
            ).compile()

        return call

    functions = {"scanned": compile_gradient(True), "one by one": compile_gradient(False)}
    first, second = (statistics.median(values) for values in time_alternately(functions, min(runs, 3)).values())
    print(
        f"compile the gradient of 12 blocks: scanned {first:.2f} s, one by one {second:.2f} s, "
        f"ratio {second / first:.1f}"
    )

    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            code = f"from tests.peers import speed; speed.print_first_steps({name!r}, {folder!r})"
            pairs = []
            for _ in range(2):
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                pairs.append([float(value) for value in done.stdout.split()])
        (cold, _), (warm, step) = pairs
        print(
            f"first train step, {name}: empty cache {cold:.2f} s, filled cache {warm:.2f} s, ratio {warm / cold:.2f}; "
            f"a later step {step:.2f} s"
        )


def print_first_steps(name: str, folder: str) -> None:
    """Prints the seconds of the first and the second train step; `compilation` runs it in a separate process."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    step = our_step(CASES[name])
    for _ in range(2):
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start)
