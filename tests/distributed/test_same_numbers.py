"""Twenty training steps, and samples or reconstructions, on meshes of eight devices compared with one device."""

import functools
import itertools

import jax
import numpy as np
import pytest

from configs import imagenet64_adm, imagenet256_dit
from diffusion.core.build import build
from diffusion.core.trees import path_name
from diffusion.distributed import sharding
from diffusion.pipelines.generator import Generator
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.program import make_program
from diffusion.training.state import averaged

STEPS, BATCH_SIZE = 20, 32
NETWORKS = {
    "dit": {"name": "dit", "width": 32, "depth": 2, "num_heads": 8, "patch_size": 2},
    "unet": {
        "name": "unet",
        "width": 16,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "head_dim": 4,
    },
}
# Autoencoders with a critic that starts during the training.
TRUNK = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}
AUTOENCODERS = {
    "kl": TRUNK | {"name": "autoencoder_kl"},
    "vq": TRUNK | {"name": "autoencoder_vq", "num_vq_embeddings": 16},
}
ADVERSARIAL = {"name": "autoencoder", "disc_weight": 0.5, "disc_start": 5, "disc_layers": 1, "disc_width": 8}
OBJECTIVES = {"kl": ADVERSARIAL, "vq": ADVERSARIAL | {"codebook": "ema", "codebook_decay": 0.9}}
RULES = {
    "dit": imagenet256_dit.get_config("S/8").sharding.rules,
    "unet": imagenet64_adm.get_config().sharding.rules,
}
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "model": (1, 1, 8), "all": (2, 2, 2), "accumulated": (2, 2, 2),
          "sequence": (2, 2, 2)}  # fmt: skip
OPTIONS = {"accumulated": {"accumulate": 4}, "sequence": {"sequence": "model"}}


@pytest.fixture(scope="module")
def trained(digits, mesh_of):
    """Returns the losses, state and samples of a network on a mesh, and the paths of its sharded parameters."""

    @functools.cache
    def train(name, arrangement):
        mesh = mesh_of(*MESHES.get(arrangement, (1, 1, 1)))
        objective = build("objectives", OBJECTIVES.get(name, "flow_matching"))
        network = build("networks", (NETWORKS | AUTOENCODERS)[name], shape=digits.spec.shape, num_classes=10)
        # SGD, because Adam turns a gradient of 1e-9 that is rounding error into an update of full size.
        program = make_program(
            network=network, objective=objective, ema=make_ema(decays=(0.5,)), mesh=mesh, rules=RULES.get(name, ()),
            optimizer=make_optimizer(steps=STEPS, name="sgd", learning_rate=0.05), seed=0, batch_size=BATCH_SIZE,
            cond_drop_rate=0.1, fsdp_min_size=0, **OPTIONS.get(arrangement, {}),
        )  # fmt: skip
        state, losses = program.init(None, {}), []
        for number in range(STEPS):
            examples = [digits[number * BATCH_SIZE + row] for row in range(BATCH_SIZE)]
            batch = jax.tree.map(lambda *rows: np.stack(rows), *examples)
            state, metrics = program.step(state, sharding.to_global(batch, program.batch), {})
            losses.append(float(metrics["loss"]))
        reached = jax.device_get((state.params, state.objective_state))
        sharded = {path_name(path) for path, leaf in jax.tree.leaves_with_path(state.params)
                   if not leaf.is_fully_replicated}  # fmt: skip
        if name in AUTOENCODERS:
            x = np.stack([digits[row]["x"] for row in range(16)])
            return losses, reached, np.asarray(objective.reconstruct(network.apply, averaged(state, "0.5"), x)), sharded
        generator = Generator(
            network, objective, digits.spec, mesh, sampler={"name": "heun", "steps": 4}, cond_drop_rate=0.1,
            guidance={"name": "cfg", "scale": 2.0},
        )  # fmt: skip
        samples = generator(averaged(state, "0.5"), {"label": np.arange(16) % 10}, 16, seed=0, batch_size=16)
        return losses, reached, samples, sharded

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    # The adaptive weight of an adversarial loss is that of a micro-batch, so that it depends on accumulation.
    [*itertools.product(NETWORKS, MESHES), *itertools.product(AUTOENCODERS, ("data", "fsdp"))],
)
def test_the_same_numbers(name, mesh, trained):
    losses, reached, samples, _ = trained(name, "one")
    found = trained(name, mesh)
    np.testing.assert_allclose(found[0], losses, rtol=1e-5)
    for (path, one), other in zip(jax.tree.leaves_with_path(reached), jax.tree.leaves(found[1]), strict=True):
        scale = np.linalg.norm(one)
        assert np.linalg.norm(np.float32(other) - one) <= 1e-4 * max(scale, 1e-3), path_name(path)
    assert np.abs(found[2] - samples).max() <= 1e-4 * np.abs(samples).max()
    if mesh == "model":  # the rules shard the wide layers
        kinds = {"dit": ("qkv", "up", "out", "down"), "unet": ("conv1", "conv2", "qkv", "out")}[name]
        assert all(any(f"{kind}/kernel" in path for path in found[3]) for kind in kinds)
