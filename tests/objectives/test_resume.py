"""Every objective, interrupted and resumed from a checkpoint, gives the same train state bit for bit: parameters,
targets, teachers, averages, moments and objective state, across steps at which a discretization or a round changes.

Without `make slow`, only the objectives with a state, or with networks that follow the student."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, names
from diffusion.core.types import Batch
from diffusion.training import ema, optimizer
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.test_coverage import SCALAR_CONDITIONS, STATEFUL, spec_of
from tests.tiers import slow_except

DISCRETIZATION = {"name": "square_root", "steps": 4, "start": 2, "end": 9}
ADVERSARIAL = {"disc_weight": 0.5, "disc_start": 2, "disc_layers": 1, "disc_width": 4}
CASES = {name: {} for name in names("objectives")} | {
    "autoencoder": ADVERSARIAL | {"equivariance": 0.1},
    "vector-quantised autoencoder": ADVERSARIAL | {"name": "autoencoder", "codebook": "ema", "codebook_decay": 0.5},
    "consistency": {"discretization": DISCRETIZATION, "target": "average", "sigma_min": 0.002},
    "continuous_consistency": {"warmup": 4},
    "denoising": {
        "time_sampler": {"name": "importance", "bins": 2, "history": 2}, "learned_weight": True, "offset_noise": 0.1,
        "pyramid_noise": 0.5, "input_perturbation": 0.1,
    },
    "flow_matching": {"contrastive": 0.05},
    "progressive_distillation": {"round_steps": 2},
    "reflow": {"round_steps": 2, "rounds": 2},
}  # fmt: skip
TRUNK = {"block_out_channels": (2, 4), "layers_per_block": 1, "norm_num_groups": 2}
NETWORKS = {
    "autoencoder": TRUNK | {"name": "autoencoder_kl"},
    "vector-quantised autoencoder": TRUNK | {"name": "autoencoder_vq", "num_vq_embeddings": 16},
}
SAVED, STEPS = 3, 5


@pytest.fixture(scope="module")
def network(digits):
    spec = {"name": "mlp", "width": 8, "depth": 1, "scalar_conditions": ("step_size", "guidance_scale")}
    return build("networks", spec, shape=digits.spec.shape, num_classes=10)


@pytest.mark.parametrize("name", slow_except(STATEFUL, CASES))
def test_resumed_is_uninterrupted(name, network, digits, digits_batch, tmp_path):
    section = NETWORKS.get(name, {"name": "mlp", "width": 8, "depth": 1})
    plain = build("networks", section, shape=digits.spec.shape, num_classes=10)
    spec = spec_of(name, None, None, plain, digits.spec) | CASES[name]
    objective, network = build("objectives", spec), network if name in SCALAR_CONDITIONS else plain
    opt, averages = optimizer.make_optimizer(steps=STEPS, learning_rate=1e-2, cycles=1), ema.make_ema(decays=(0.5, 0.9))
    compiled = jax.jit(make_step(objective, network, opt, averages, seed=0, cond_drop_rate=0.3))

    def step(*args):
        with jax.debug_nans(True):  # a healthy step computes no NaN
            return compiled(*args)

    state = init_state(objective, network, opt, averages, jax.random.key(0))

    def batch(number):
        rows = np.random.default_rng(number).integers(0, 16, 8)
        return Batch(**jax.tree.map(lambda leaf: leaf[rows], digits_batch))

    for number in range(SAVED):
        state, _ = step(state, batch(number))
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(SAVED, state, {}, {"config": {}})
    checkpoints.close()
    whole = state
    for number in range(SAVED, STEPS):
        whole, _ = step(whole, batch(number))

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), state)
    resumed, _ = Checkpoints(str(tmp_path), read_only=True).restore(SAVED, shapes)
    for number in range(SAVED, STEPS):
        resumed, metrics = step(resumed, batch(number))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert jnp.isfinite(metrics["loss"])
    # Frozen networks that follow the student have changed.
    moves = {"consistency": "target", "latent_consistency": "target", "progressive_distillation": "teacher",
             "reflow": "teacher"}  # fmt: skip
    if name in moves:
        start = init_state(objective, network, opt, averages, jax.random.key(0)).params[moves[name]]
        ends = jax.tree.leaves(whole.params[moves[name]])
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(start), ends, strict=True))
