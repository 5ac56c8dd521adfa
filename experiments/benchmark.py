"""Measures what the library costs on this machine, each against the bare work it wraps, in turn, and prints medians.

python -m experiments.benchmark --suite=loop        the train loop against the jitted step it runs
python -m experiments.benchmark --suite=sampling    the scan of each sampler against calls of the denoiser it makes, the
                                                    compiling of 1,000 steps against 10, and what recompiles
python -m experiments.benchmark --suite=networks    our networks against the same ones in PyTorch: train steps, guided
                                                    sampling, compiling (wants requirements-peers.txt; some minutes)
python -m experiments.benchmark --suite=data        reading images, against PyTorch's loader; training fed by them
python -m experiments.benchmark --suite=reliability what guard, watchdog, meter and checkpoints cost a training
"""

import json
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from diffusion.core.build import build
from diffusion.core.types import Network, Spec
from diffusion.distributed import mesh, sharding
from diffusion.pipelines.generator import Generator
from diffusion.sampling.loop import bind, sample
from diffusion.training import ema, optimizer, trainer
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from experiments import cli, data_speed, peer_speed, reliability_speed

SUITE = flags.DEFINE_enum("suite", "loop", ["loop", "sampling", "networks", "data", "reliability"], "What to measure.")
RUNS = flags.DEFINE_integer("runs", 5, "Runs of each side; the median counts.")

SPEC = Spec(shape=(8, 8, 1), num_classes=10)
BATCH_SIZE, STEPS = 128, 60


class Synthetic:
    """Examples in digits' shape that cost nothing to read."""

    spec = SPEC

    def __init__(self):
        self.x = np.zeros(SPEC.shape, np.float32)

    def __len__(self) -> int:
        return 1500

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x, "cond": {"label": np.int32(index % SPEC.num_classes)}}


def main() -> None:
    if SUITE.value == "networks":
        peer_speed.networks(RUNS.value)
        return
    if SUITE.value == "data":
        data_speed.data(RUNS.value)
        return
    if SUITE.value == "reliability":
        reliability_speed.reliability(RUNS.value)
        return
    network = build(
        "networks",
        {
            "name": "unet",
            "width": 32,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (4,),
            "head_dim": 32,
        },
        shape=SPEC.shape,
        num_classes=SPEC.num_classes,
    )
    {"loop": loop_overhead, "sampling": sampling}[SUITE.value](network)


def loop_overhead(network: Network) -> None:
    """Seconds a step: the jitted step on one batch again and again, and the whole loop with data, metrics and files.
    Neither counts compilation: the loop's rate is the median of its last steps, as it logs it."""
    objective, devices = build("objectives", "denoising"), mesh.make_mesh()
    opt, averages = optimizer.make_optimizer(steps=STEPS), ema.make_ema()
    options = trainer.Options(steps=STEPS, batch_size=BATCH_SIZE, log_every=10)
    step = jax.jit(make_step(objective, network, opt, averages, seed=0, cond_drop_rate=0.1), donate_argnums=0)
    example = Synthetic()[0]
    batch = jax.tree.map(lambda x: np.stack([x] * BATCH_SIZE), example)
    batch = sharding.to_global(batch, sharding.by_example(devices))
    times = {"bare step": [], "loop": []}
    for _ in range(RUNS.value):
        state = jax.jit(lambda: init_state(objective, network, opt.transform, averages, jax.random.key(0)))()
        state, _ = step(state, batch)
        jax.block_until_ready(state)
        seconds = []
        for _ in range(STEPS):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - start)
        times["bare step"].append(statistics.median(seconds[-32:]))
        with tempfile.TemporaryDirectory() as workdir:
            trainer.train(
                workdir, source=Synthetic(), network=network, objective=objective, optimizer=opt, ema=averages,
                mesh=devices, options=options, checkpoint=trainer.CheckpointOptions(every=10 * STEPS), seed=0,
                meta={"config": {"network": {}, "objective": {}, "data": {}}},
            )  # fmt: skip
            with open(f"{workdir}/metrics.jsonl", encoding="utf-8") as lines:
                times["loop"].append(BATCH_SIZE / json.loads(lines.readlines()[-1])["images_per_second"])
    report(times, "s/step")


def sampling(network: Network) -> None:
    scan_overhead()
    compile_time(network)
    recompilation(network)


SCANNED = (
    {"name": "ddim"},
    {"name": "ancestral"},
    {"name": "dpm_solver_pp"},
    {"name": "dpm_solver_pp", "order": 3},
    {"name": "dpm_solver"},
    {"name": "unipc"},
    {"name": "lms"},
    {"name": "heun"},
)


def scan_overhead() -> None:
    """Seconds for STEPS evaluations by each sampler's scan, against as many calls of the jitted denoiser, one by one.
    The network is larger, so that a call takes more than 10 ms."""
    network = build(
        "networks",
        {
            "name": "unet",
            "width": 64,
            "channel_mult": (1, 2),
            "num_res_blocks": 2,
            "attention_resolutions": (4,),
            "head_dim": 32,
        },
        shape=SPEC.shape,
        num_classes=SPEC.num_classes,
    )
    objective, evaluations = build("objectives", "denoising"), 24
    params = {"net": jax.jit(network.init)(jax.random.key(0))}
    x = jax.random.normal(jax.random.key(1), (32, *SPEC.shape))
    cond = {"label": jnp.arange(len(x)) % SPEC.num_classes}
    bare = jax.jit(lambda params, x, t, cond: objective.denoiser(network.apply, params)(x, t, cond).x0)

    def calls() -> None:
        # Each waits for the one before, as in the scan, but on the device: the host runs ahead.
        y = x
        for t in np.linspace(1, 0, evaluations + 1, dtype=np.float32)[:-1]:
            y = bare(params, y, t, cond)
        jax.block_until_ready(y)

    runs, asked = {"bare calls": calls}, {"bare calls": evaluations}
    for spec in SCANNED:
        sampler = build("samplers", spec)
        steps = max(n for n in range(1, evaluations + 1) if sampler.evaluations(n) <= evaluations)
        times = jnp.linspace(1, 0, steps + 1)

        @jax.jit
        def scan(params, x, times, cond, key, sampler=sampler):
            denoise = bind(objective.denoiser(network.apply, params), cond)
            return sample(denoise, objective.schedule, sampler, x, times, key)

        key, name = jax.random.key(0), " ".join(map(str, spec.values()))
        asked[name] = sampler.evaluations(steps)
        runs[name] = lambda scan=scan, times=times, key=key: jax.block_until_ready(scan(params, x, times, cond, key))
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(RUNS.value):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / asked[name])
    print(f"{'':18} ms/evaluation   ratio to bare calls")
    for name, values in times.items():
        ratio = statistics.median(b / a for a, b in zip(times["bare calls"], values, strict=True))
        print(f"{name:18} {1000 * statistics.median(values):13.2f}   {ratio:.3f}")


def compile_time(network: Network) -> None:
    """Seconds to lower and compile DDIM over 10 and over 1,000 steps."""
    objective = build("objectives", "denoising")
    params = {"net": jax.jit(network.init)(jax.random.key(0))}
    cond = {"label": jnp.zeros(8, jnp.int32)}
    times = {"compile 10 steps": [], "compile 1,000": []}
    for run in range(RUNS.value + 1):
        for name, steps in zip(times, (10, 1000), strict=True):

            def draw(params, x, times, key):
                denoise = bind(objective.denoiser(network.apply, params), cond)
                return sample(denoise, objective.schedule, build("samplers", "ddim"), x, times, key)

            x, grid = jnp.zeros((8, *SPEC.shape)), jnp.linspace(1, 0, steps + 1)
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(draw).lower(params, x, grid, jax.random.key(0)).compile()
            if run:  # the first warms the compiler up
                times[name].append(time.perf_counter() - start)
    report(times, "s")


def recompilation(network: Network) -> None:
    """How often guided sampling is compiled for several scales, intervals, grids, seeds and labels of one step
    count."""
    objective = build("objectives", "denoising")
    params = {"net": jax.jit(network.init)(jax.random.key(0))}
    settings = (("trailing", 2.0, 0.1), ("karras", 2.0, 0.1), ("trailing", 4.0, 0.1), ("trailing", 2.0, 0.3))
    sections = [
        {
            "sampler": {"name": "ddim", "steps": 5, "grid": grid},
            "guidance": {"name": "cfg", "scale": scale, "interval": {"low": low, "high": 0.9}},
        }
        for grid, scale, low in settings
    ]
    first = Generator(network, objective, SPEC, mesh.make_mesh(), cond_drop_rate=0.1, **sections[0])
    for seed, section in enumerate(sections):
        first.with_settings(**section)(params, np.full(8, seed), 8, seed=seed)
    print(f"{len(sections)} settings of scale, interval, times, seed and labels: {first.compilations} compilation(s)")


def report(times: dict[str, list[float]], unit: str) -> None:
    """Prints the medians, and the second's ratio to the first, run by run."""
    for name, values in times.items():
        print(f"{name:18} {statistics.median(values):.4f} {unit}")
    first, second = times.values()
    print(f"ratio              {statistics.median(b / a for a, b in zip(first, second, strict=True)):.3f}")


if __name__ == "__main__":
    cli.run(main)
