"""What surviving costs a training: the guard of its steps, the watchdog and the meter of time, and its checkpoints; on
the U-Net of configs/cifar10_ddpm.py."""

import statistics
import tempfile
import time
from unittest import mock

import jax
import numpy as np

from diffusion.core.build import build
from diffusion.core.types import Spec
from diffusion.distributed import mesh, sharding
from diffusion.training import ema, optimizer
from diffusion.training import step as steps
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.resilience.goodput import Goodput
from diffusion.training.resilience.watchdog import Watchdog
from diffusion.training.state import init_state

SPEC = Spec(shape=(32, 32, 3), num_classes=0)
NETWORK = {
    "name": "unet",
    "width": 128,
    "channel_mult": (1, 2, 2, 2),
    "num_res_blocks": 2,
    "attention_resolutions": (16,),
    "dropout": 0.1,
}
BATCH_SIZE, EVERY = 48, 100


def reliability(runs: int) -> None:
    """Prints a line for each. The batch is below the config's 128, which makes the steps short, and so the shares
    large: none of what is measured grows with the batch. A step takes 13 s on two cores."""
    network = build("networks", NETWORK, shape=SPEC.shape, num_classes=SPEC.num_classes)
    objective, devices = build("objectives", "denoising"), mesh.make_mesh()
    opt, averages = optimizer.make_optimizer(steps=1000), ema.make_ema()
    batch = {"x": np.zeros((BATCH_SIZE, *SPEC.shape), np.float32), "cond": {}}
    batch = sharding.to_global(batch, sharding.by_example(devices))

    def compiled():
        step = steps.make_step(objective, network, opt, averages, seed=0)
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile()

    state = jax.jit(lambda: init_state(objective, network, opt.transform, averages, jax.random.key(0)))()
    with mock.patch.object(steps, "select_if_ok", lambda ok, new, old: new):
        unguarded = compiled()
    programs = {"unguarded": unguarded, "guarded": compiled()}
    seconds = {name: [] for name in programs}
    for _ in range(runs + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            state, _ = jax.block_until_ready(program(state, batch))
            seconds[name].append(time.perf_counter() - began)
    share = statistics.median(b / a for a, b in zip(*(times[1:] for times in seconds.values()), strict=True)) - 1
    a_step = statistics.median(seconds["guarded"][1:])
    print(f"a step             {a_step:.3f} s, batch {BATCH_SIZE}")
    print(f"guard              {100 * share:.2f} % of a step")

    with tempfile.TemporaryDirectory() as workdir:
        watched = _watched(workdir)
        print(f"watchdog and meter {1e6 * watched:.0f} us a step: {100 * watched / a_step:.4f} %")
        checkpoints, blocked, during = Checkpoints(workdir), [], []
        for number in range(runs + 1):
            began = time.perf_counter()
            checkpoints.save(number, state, {}, {})
            blocked.append(time.perf_counter() - began)
            began = time.perf_counter()
            state, _ = jax.block_until_ready(programs["guarded"](state, batch))  # while the save is being written
            during.append(time.perf_counter() - began)
            checkpoints.wait()
        checkpoints.close()
    save, beside = statistics.median(blocked[1:]), statistics.median(during[1:])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    print(f"save of {size:.0f} MB     blocks {save:.3f} s: {100 * save / (EVERY * a_step):.2f} % of {EVERY} steps; the "
          f"step beside its writing takes {beside / a_step:.2f} x")  # fmt: skip


def _watched(workdir: str, steps: int = 1000) -> float:
    """Seconds that a step of the loop spends on saying that it is alive and where its time goes."""
    meter = Goodput(workdir, 0)
    with Watchdog(60, f"{workdir}/stuck.txt") as watchdog:
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
