"""Low-rank adaptation: what it changes, trains and saves."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.adapters import lora
from diffusion.core import trees
from diffusion.core.build import build
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.trainer import Trainer
from tests.refusals import refused

DIT = {"name": "dit", "patch_size": 4, "width": 32, "depth": 2, "num_heads": 2}
UNET = {"name": "unet", "width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)}
UNET |= {"head_dim": 8}
X, LABELS = jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.array([3, 1])


@pytest.fixture(scope="module", params=["dit", pytest.param("unet", marks=pytest.mark.slow)])
def pair(request):
    """A network with random parameters, none of them zero, and its adapted form with the same base."""
    spec = {"dit": DIT, "unet": UNET}[request.param]
    network = build("networks", spec, shape=(8, 8, 1), num_classes=10)
    adapted = build("adapters", {"name": "lora", "rank": 2, "alpha": 4.0}, network=network)
    params = jax.jit(adapted.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    base = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params["base"])
    return network, jax.jit(network.apply), jax.jit(adapted.apply), {**params, "base": base}


def changed(params):
    """Returns parameters whose matrices B are not zero."""
    key = jax.random.key(2)
    return {**params, "lora": jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), params["lora"])}


def test_no_effect_at_initialisation(pair):
    _network, plain, adapted, params = pair
    args = X, jnp.array([0.3, 0.7]), {"label": LABELS}
    np.testing.assert_array_equal(adapted(params, *args), plain(params["base"], *args))


def test_merged_parameters_give_the_same_output(pair):
    """The product is also that of the low-rank form, W x + (alpha / rank) A B x."""
    _network, plain, adapted, params = pair
    params = changed(params)
    args = X, jnp.array([0.3, 0.7]), {"label": LABELS}
    merged = jax.device_get(lora.merge(params, 4.0 / 2))
    assert jax.tree.structure(merged) == jax.tree.structure(params["base"])
    np.testing.assert_allclose(adapted(params, *args), plain(merged, *args), atol=1e-6)
    assert not np.allclose(adapted(params, *args), plain(params["base"], *args), atol=1e-3)
    for path, kernel in trees.by_path(merged).items():
        pair_ = params["lora"]
        for part in path.split("/"):
            pair_ = pair_.get(part, {})
        before = trees.by_path(params["base"])[path]
        if not pair_:
            np.testing.assert_array_equal(kernel, before)
            continue
        x = np.random.default_rng(0).normal(size=(5, kernel.shape[-2])).astype(np.float32)
        np.testing.assert_allclose(x @ kernel, x @ before + 2 * (x @ pair_["A"]) @ pair_["B"], atol=1e-4)


def test_training_changes_the_low_rank_matrices_alone(tmp_path, digits):
    """The base is in neither the state nor the checkpoint, whose size is that of what is trained."""
    network = build("networks", {"name": "mlp", "width": 256, "depth": 4}, shape=(8, 8, 1), num_classes=10)
    adapted = lora.make(network, rank=32, targets=("blocks/kernel",))
    params = jax.jit(adapted.init)(jax.random.key(0))
    base = jax.tree.map(lambda p: p + 0.1, params["base"])
    trainer = Trainer(digits, adapted, "flow_matching", start={"net": {"base": base}}, workdir=str(tmp_path),
                      steps=3, batch_size=8, optimizer={"learning_rate": 1e-2})  # fmt: skip
    state = trainer.fit()
    assert state.params.keys() == {"net"} and state.params["net"].keys() == {"lora"}
    before, after = trees.by_path(params["lora"]), trees.by_path(state.params["net"]["lora"])
    assert before.keys() == after.keys() and all(np.any(after[path] != 0) for path in after)
    sampled = trainer.averaged_params()["net"]
    jax.tree.map(np.testing.assert_array_equal, sampled["base"], base)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)))
    saved = sum(path.stat().st_size for path in pathlib.Path(tmp_path, "checkpoints").rglob("*") if path.is_file())
    assert saved <= 1.05 * arrays, (saved, arrays)
    assert os.path.isdir(tmp_path / "checkpoints" / "3")

    again = Trainer(digits, adapted, "flow_matching", start={"net": {"base": base}}, workdir=str(tmp_path),
                    steps=3, batch_size=8, optimizer={"learning_rate": 1e-2})  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, again.fit().params, state.params)
    checkpoints = Checkpoints(str(tmp_path), read_only=True)
    assert not [name for name in checkpoints._about(3)["arrays"] if "/base/" in name]


@pytest.mark.parametrize(
    ("options", "field"),
    [({"rank": 0}, "lora.rank"), ({"targets": ("nothing",)}, "lora.targets"), ({"targets": ("(",)}, "lora.targets")],
)
def test_invalid_options(options, field, tiny_mlp):
    with refused(field):
        build("adapters", {"name": "lora", **options}, field="lora", network=tiny_mlp)


def test_a_base_is_required(digits, tiny_mlp):
    with refused("train.trainable"):
        Trainer(digits, lora.make(tiny_mlp), "flow_matching", steps=1, batch_size=8).fit()
