"""Measures the overhead of the library against the bare computation that it wraps.

Each function returns its measurements: seconds or ratios per repetition, taken alternately so that all sides see the
same load of the machine. `experiments.benchmark` prints them.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.build import build, build_network
from diffusion.core.types import Array, ArraySpec, Spec, class_labels
from diffusion.distributed import sharding
from diffusion.distributed.mesh import make_mesh
from diffusion.pipelines.generator import Generator
from diffusion.profiling.timing import median_ratio, time_alternately
from diffusion.sampling.loop import bind, sample
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.options import CheckpointOptions, Options
from diffusion.training.resilience.goodput import Goodput
from diffusion.training.resilience.guards import Guard
from diffusion.training.resilience.watchdog import Watchdog
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from diffusion.training.trainer import Trainer

DIGITS = Spec(ArraySpec((8, 8, 1)), class_labels(10))
SMALL = {"name": "unet", "width": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,),
         "head_dim": 32}  # fmt: skip
LARGER = {**SMALL, "width": 64, "num_res_blocks": 2}  # one evaluation takes more than 10 ms on two CPU cores
LOOP_BATCH_SIZE, LOOP_STEPS = 128, 60

SAMPLERS = (
    {"name": "ddim"},
    {"name": "ancestral"},
    {"name": "dpm_solver_pp"},
    {"name": "dpm_solver_pp", "order": 3},
    {"name": "dpm_solver"},
    {"name": "unipc"},
    {"name": "lms"},
    {"name": "heun"},
)
EVALUATIONS = 24

CIFAR10 = Spec(ArraySpec((32, 32, 3)))
CIFAR10_UNET = {"name": "unet", "width": 128, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 2,
                "attention_resolutions": (16,), "dropout": 0.1}  # fmt: skip
CIFAR10_BATCH_SIZE = 48


class Synthetic:
    """A data source with the shapes of `digits` whose examples cost nothing to read."""

    spec = DIGITS

    def __init__(self):
        self.x = np.zeros(DIGITS.shape, np.float32)

    def __len__(self) -> int:
        return 1500

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x, "cond": {"label": np.int32(index % DIGITS.num_classes)}}


def loop_overhead(runs: int) -> dict[str, list[float]]:
    """Measures seconds per step of the jitted train step alone, and of the trainer with data, metrics and files.

    Compilation is not included: the trainer's figure is the rate that it logs last, the median over its last steps.
    """
    network = build_network(SMALL, DIGITS)
    objective, mesh = build("objectives", "denoising"), make_mesh()
    optimizer, ema = make_optimizer(steps=LOOP_STEPS), make_ema()
    options = Options(steps=LOOP_STEPS, batch_size=LOOP_BATCH_SIZE, log_every=10)
    step = jax.jit(make_step(objective, network, optimizer, ema, seed=0, cond_drop_rate=0.1), donate_argnums=0)
    example = Synthetic()[0]
    batch = jax.tree.map(lambda x: np.stack([x] * LOOP_BATCH_SIZE), example)
    batch = sharding.to_global(batch, sharding.by_example(mesh))
    seconds = {"bare step": [], "trainer": []}
    for _ in range(runs):
        state = jax.jit(lambda: init_state(objective, network, optimizer, ema, jax.random.key(0)))()
        state, _ = step(state, batch)
        jax.block_until_ready(state)
        steps = []
        for _ in range(LOOP_STEPS):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            steps.append(time.perf_counter() - start)
        seconds["bare step"].append(statistics.median(steps[-32:]))
        with tempfile.TemporaryDirectory() as workdir:
            Trainer(
                Synthetic(), network, objective, optimizer=optimizer, ema=ema, mesh=mesh, options=options,
                checkpoint=CheckpointOptions(every=10 * LOOP_STEPS), seed=0, workdir=workdir,
                meta={"config": {"network": {}, "objective": {}, "data": {}}},
            ).fit()  # fmt: skip
            with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as lines:
                seconds["trainer"].append(LOOP_BATCH_SIZE / json.loads(lines.readlines()[-1])["images_per_second"])
    return seconds


def scan_overhead(runs: int) -> dict[str, list[float]]:
    """Measures seconds per evaluation in each sampler's scan, and in a Python loop over the jitted denoiser.

    The loop is the entry `bare calls`.
    """
    network, objective = build_network(LARGER, DIGITS), build("objectives", "denoising")
    params = {"net": jax.jit(network.init)(jax.random.key(0))}
    x = jax.random.normal(jax.random.key(1), (32, *DIGITS.shape))
    cond = {"label": jnp.arange(len(x)) % DIGITS.num_classes}
    bare = jax.jit(lambda params, x, t, cond: objective.denoiser(network.apply, params)(x, t, cond).x0)

    def calls() -> None:
        # Each call depends on the result of the previous one, as in the scan; the host runs ahead of the device.
        y = x
        for t in np.linspace(1, 0, EVALUATIONS + 1, dtype=np.float32)[:-1]:
            y = bare(params, y, t, cond)
        jax.block_until_ready(y)

    functions, evaluations = {"bare calls": calls}, {"bare calls": EVALUATIONS}
    for section in SAMPLERS:
        sampler = build("samplers", section)
        steps = max(n for n in range(1, EVALUATIONS + 1) if sampler.evaluations(n) <= EVALUATIONS)
        name = " ".join(map(str, section.values()))
        evaluations[name] = sampler.evaluations(steps)
        functions[name] = _scan(network, objective, sampler, params, x, cond, jnp.linspace(1, 0, steps + 1))
    seconds = time_alternately(functions, runs)
    return {name: [value / evaluations[name] for value in values] for name, values in seconds.items()}


def _scan(network, objective, sampler, params, x: Array, cond: Mapping, times: Array) -> Callable[[], Array]:
    @jax.jit
    def scan(params, x, times, cond, key):
        denoise = bind(objective.denoiser(network.apply, params), cond)
        return sample(denoise, objective.schedule_for(params), sampler, x, times, key)

    return lambda: jax.block_until_ready(scan(params, x, times, cond, jax.random.key(0)))


def compile_time(runs: int) -> dict[str, list[float]]:
    """Measures seconds to lower and compile DDIM over 10 and over 1,000 steps."""
    network, objective = build_network(SMALL, DIGITS), build("objectives", "denoising")
    params = {"net": jax.jit(network.init)(jax.random.key(0))}
    cond = {"label": jnp.zeros(8, jnp.int32)}

    def draw(params, x, times, key):
        denoise = bind(objective.denoiser(network.apply, params), cond)
        return sample(denoise, objective.schedule_for(params), build("samplers", "ddim"), x, times, key)

    x, key, seconds = jnp.zeros((8, *DIGITS.shape)), jax.random.key(0), {"compile 10 steps": [], "compile 1,000": []}
    grids = jnp.linspace(1, 0, 11), jnp.linspace(1, 0, 1001)
    for run in range(runs + 1):
        for name, grid in zip(seconds, grids, strict=True):
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(draw).lower(params, x, grid, key).compile()
            if run:  # the first run initialises the compiler
                seconds[name].append(time.perf_counter() - start)
    return seconds


def recompilations() -> tuple[int, int]:
    """Counts the compilations of guided sampling over settings with other scales, intervals, grids, seeds and labels.

    Returns:
      The number of settings, which all have the same number of steps, and the number of compilations.
    """
    network, objective = build_network(SMALL, DIGITS), build("objectives", "denoising")
    params = {"net": jax.jit(network.init)(jax.random.key(0))}
    settings = (("trailing", 2.0, 0.1), ("karras", 2.0, 0.1), ("trailing", 4.0, 0.1), ("trailing", 2.0, 0.3))
    sections = [
        {
            "sampler": {"name": "ddim", "steps": 5, "grid": grid},
            "guidance": {"name": "cfg", "scale": scale, "interval": {"low": low, "high": 0.9}},
        }
        for grid, scale, low in settings
    ]
    first = Generator(network, objective, DIGITS, make_mesh(), cond_drop_rate=0.1, **sections[0])
    for seed, section in enumerate(sections):
        first.with_settings(**section)(params, {"label": np.full(8, seed)}, 8, seed=seed)
    return len(sections), first.compilations


class _NoGuard(Guard):
    """Accepts every step, so that XLA removes the selection between the old and the new state."""

    def check_step(self, counters: dict[str, Array], loss: Array, grad_norm: Array) -> tuple[Array, dict[str, Array]]:
        return jnp.bool_(True), counters


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Costs of surviving failures, for the U-Net of configs/cifar10_ddpm.py.

    Attributes:
      step: Seconds of a train step.
      guard: Share of a step that the check for finite numbers adds.
      monitoring: Seconds per step that the watchdog and the time meter take.
      save: Seconds that a save blocks the training.
      step_during_save: Seconds of a step while a checkpoint is being written.
      megabytes: Size of the train state in MB.
    """

    step: float
    guard: float
    monitoring: float
    save: float
    step_during_save: float
    megabytes: float


def reliability(runs: int) -> Reliability:
    """Measures the costs of the guard, the watchdog, the time meter and checkpoints.

    The batch of 48 is smaller than the config's 128. None of the costs depends on the batch, so a shorter step gives an
    upper bound of their share. A step takes 13 s on two cores.
    """
    network = build_network(CIFAR10_UNET, CIFAR10)
    objective, mesh = build("objectives", "denoising"), make_mesh()
    optimizer, ema = make_optimizer(steps=1000), make_ema()
    batch = {"x": np.zeros((CIFAR10_BATCH_SIZE, *CIFAR10.shape), np.float32), "cond": {}}
    batch = sharding.to_global(batch, sharding.by_example(mesh))
    state = jax.jit(lambda: init_state(objective, network, optimizer, ema, jax.random.key(0)))()

    def compiled(guard: Guard) -> jax.stages.Compiled:
        step = make_step(objective, network, optimizer, ema, seed=0, guard=guard)
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile()

    def advance(program: jax.stages.Compiled) -> None:
        nonlocal state
        state, _ = jax.block_until_ready(program(state, batch))

    programs = {"unguarded": compiled(_NoGuard()), "guarded": compiled(Guard())}
    functions = {name: lambda program=program: advance(program) for name, program in programs.items()}
    seconds = time_alternately(functions, runs)
    added = median_ratio(seconds["guarded"], seconds["unguarded"]) - 1

    with tempfile.TemporaryDirectory() as workdir:
        monitoring = _monitoring_seconds(workdir)
        checkpoints, blocked, during = Checkpoints(workdir), [], []
        for number in range(runs + 1):
            began = time.perf_counter()
            checkpoints.save(number, state, {}, {})
            blocked.append(time.perf_counter() - began)
            began = time.perf_counter()
            advance(programs["guarded"])  # while the checkpoint is being written
            during.append(time.perf_counter() - began)
            checkpoints.wait()
        checkpoints.close()
    return Reliability(
        step=statistics.median(seconds["guarded"]),
        guard=added,
        monitoring=monitoring,
        save=statistics.median(blocked[1:]),
        step_during_save=statistics.median(during[1:]),
        megabytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6,
    )


def _monitoring_seconds(workdir: str, steps: int = 1000) -> float:
    """Returns the seconds per step that calls of the watchdog and the time meter take in the training loop."""
    meter = Goodput(workdir, 0)
    with Watchdog(60, os.path.join(workdir, "hang.txt"), end_process=lambda code: None) as watchdog:
        began = time.perf_counter()
        for step in range(1, steps + 1):
            watchdog.beat(f"the data of step {step}")
            with meter.spent("data"):
                pass
            watchdog.beat(f"step {step}", None)
            with meter.spent("step"):
                pass
            if step % 50 == 0:
                meter.write(step)
        return (time.perf_counter() - began) / steps
