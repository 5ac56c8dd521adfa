"""Sampling from a run: from given examples, with a function between steps, and with sharded parameters."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion as df
from diffusion.core.arrays import normal, sample_keys
from diffusion.core.build import build
from diffusion.core.types import InputError
from diffusion.distributed import sharding
from diffusion.pipelines import run as runs
from diffusion.pipelines.build_training import build_training
from diffusion.pipelines.conditions import moments_of
from diffusion.pipelines.config import resolve
from diffusion.pipelines.run import Run, open_run
from diffusion.sampling.loop import bind, noised, sample
from tests.refusals import refused

CONFIG = resolve({
    "data": "digits",
    "objective": "denoising",
    "network": {"name": "mlp", "width": 16, "depth": 2},
    "train": {"steps": 1, "batch_size": 16},
    "mesh": {"data": 2, "fsdp": 4},
    "sharding": {"fsdp_min_size": 0, "rules": (("^ema/.*/linear_in/kernel", (None, "data")),)},
    "sampler": {"name": "ddim", "steps": 4, "eta": 1.0},
})  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that was trained on a mesh of eight devices, with its arrays sharded."""
    path = str(tmp_path_factory.mktemp("runs") / "sharded")
    df.Trainer(**build_training(CONFIG, path), workdir=path).fit()
    return path


@pytest.fixture(scope="module")
def run(workdir):
    return open_run(workdir)


def as_is(run, place, mesh=None):
    return Run(config=run.config, spec=run.spec, network=run.network, objective=run.objective, mesh=mesh or run.mesh,
               params=jax.device_put(run.params, place))  # fmt: skip


@pytest.mark.slow
def test_parameters_are_sharded_as_in_training(run):
    """Their shardings are those of the average in the train state, and the samples those of replicated parameters."""
    assert dict(run.mesh.shape) == {"data": 2, "fsdp": 4, "model": 1}
    leaves = {sharding.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(run.params)}
    state = {"ema": {run.ema: run.params}}
    expected = sharding.of_state(state, run.mesh, run.config["sharding"]["rules"], fsdp_min_size=0)["ema"][run.ema]
    for (path, place), leaf in zip(jax.tree.leaves_with_path(expected), leaves.values(), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), sharding.path_name(path)
    kernel = leaves["net/linear_in/kernel"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 8}
    x = run.sample(num=8, guidance=2.0)
    replicated = as_is(run, sharding.replicated(run.mesh))
    np.testing.assert_allclose(x, replicated.sample(num=8, guidance=2.0), atol=1e-5 * abs(x).max())
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), run.mesh.axis_names)
    np.testing.assert_allclose(as_is(run, sharding.replicated(one), one).sample(num=8, guidance=2.0), x,
                               atol=1e-5 * abs(x).max())  # fmt: skip


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"data": 2, "fsdp": 2, "model": 2}, {"data": 2, "fsdp": 2, "model": 2}),
        ({"data": -1, "fsdp": 1, "model": 1}, {"data": 8, "fsdp": 1, "model": 1}),
        ({"data": 16, "fsdp": 12, "model": 1}, {"data": 2, "fsdp": 4, "model": 1}),
        ({"data": 1, "fsdp": 32, "model": 4}, {"data": 1, "fsdp": 2, "model": 4}),
        ({"data": 3, "fsdp": 1, "model": 1}, {"data": 8, "fsdp": 1, "model": 1}),
    ],
)
def test_a_mesh_that_does_not_fit_is_reduced(section, expected, caplog):
    assert dict(runs._mesh(section).shape) == expected
    assert bool(caplog.records) == (section != expected and -1 not in section.values())


def test_start_and_strength(run):
    """Half of four steps start at the third time, from the examples with the noise of `prior`."""
    examples = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32)
    x = run.sample(num=4, labels=[1], start=examples, strength=0.6)
    generator = next(iter(run._generators.values()))
    keys, times = sample_keys(jax.random.key(0), jnp.arange(4)), generator.times
    denoise = bind(run.objective.denoiser(run.network.apply, run.params), {"label": jnp.ones(4, int)})

    @jax.jit
    def expected(start):
        x = noised(run.objective.schedule, start, times[2], keys)
        for i in (2, 3):  # the keys of a step are those of its place among all steps
            x = sample(denoise, run.objective.schedule, generator.solver, x, times[: i + 2], keys, first=i)
        return x

    np.testing.assert_allclose(x, expected(examples[[0, 1, 2, 0]]), atol=1e-5 * abs(x).max())
    compilations = generator.compilations
    assert np.abs(run.sample(num=4, labels=[1], start=examples, strength=0.3) - x).max() > 1e-3
    assert generator.compilations == compilations
    assert len(run.sample(start=examples, strength=1.0)) == 3


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"strength": 0.0}, "strength"), ({"strength": 1.1}, "strength"), ({"strength": 0.2}, "strength"),
        ({"start": np.zeros((2, 8, 8, 3), np.float32)}, "start"), ({"start": np.zeros((0, 8, 8, 1))}, "start"),
        ({"start": np.zeros((2, 8, 8, 1), np.uint8)}, "start"),
    ],
)  # fmt: skip
def test_bad_starts_are_refused(run, options, field):
    with refused(field):
        run.sample(**{"start": np.zeros((2, 8, 8, 1), np.float32), **options})


@pytest.mark.parametrize(("name", "value"), [("num", 0), ("num", 10**8), ("seed", -1), ("batch_size", 0)])
def test_bad_numbers_are_refused(run, name, value):
    with refused(name):
        run.sample(**{name: value})


@pytest.mark.parametrize("labels", [[-1], 10, [1.0], [True], [], [[1, 2]], [1, 2, 3], [10**30]])
def test_bad_labels_are_refused(run, labels):
    for draw in (run.sample, functools.partial(df.sample, run)):
        with refused("labels"):
            draw(num=2, labels=labels)


def test_labels_of_samples(run):
    assert run.conditions(3, 4)["label"].tolist() == [4, 4, 4]
    assert run.conditions(3, np.array([4, 9]))["label"].tolist() == [4, 9, 4]


@pytest.mark.parametrize("label", [None, [-1, 0], [0, 10], [0.0, 1.0], [0]])
def test_bad_labels_of_a_denoiser_are_refused(run, label):
    cond = {} if label is None else {"label": jnp.array(label)}
    with refused("network.label"):
        run.denoiser(**cond)(jnp.zeros((2, 8, 8, 1)), jnp.float32(0.5))


def test_after_step_on_times_that_rise(run):
    """Known pixels are exact; the function is part of what is compiled, and the same one is compiled once."""
    known, mask, schedule = jnp.full((8, 8, 1), 0.25), jnp.arange(8)[:, None, None] < 4, run.objective.schedule
    calls = []

    def keep_known(x, x0, t, s, keys):
        calls.append(x.shape)
        noise = normal(keys, known.shape)
        return jnp.where(mask, schedule.alpha(s) * known + schedule.sigma(s) * noise, x)

    grid = {"name": "repaint", "jump_length": 1, "jump_n_sample": 2}
    x = run.sample(num=8, after_step=keep_known, grid=grid)
    np.testing.assert_allclose(x[:, :4], 0.25, atol=1e-6)
    assert abs(x[:, 4:] - run.sample(num=8, grid=grid)[:, 4:]).max() > 1e-3
    traces = len(calls)
    again = run.sample(num=8, after_step=keep_known, grid=grid)
    np.testing.assert_array_equal(again, x)
    assert len(calls) == traces
    assert run._generator({**run.config["sampler"], "grid": grid}, run.config["guidance"], keep_known).evaluations == 7


def test_samples_start_from_the_law_at_the_end_of_the_schedule(digits, caplog):
    """It needs the data where the schedule does not end in noise, and not otherwise."""
    assert moments_of(build("schedules", "vp"), pytest.fail, None) is None
    with caplog.at_level("WARNING", "diffusion"):
        objective = build("objectives", {"name": "denoising", "schedule": {"name": "vp", "num_steps": 50}})
    assert "signal-to-noise ratio of 1.52," in caplog.text
    mean, variance = moments_of(objective.schedule, lambda: digits, None)
    x = np.stack([digits[index]["x"] for index in range(0, len(digits), 2)])
    np.testing.assert_allclose(mean, x.mean(axis=0), atol=0.15)
    np.testing.assert_allclose(variance, x.var(axis=0), atol=0.15)

    def unreadable():
        raise InputError("data.path", "does not exist")

    with caplog.at_level("WARNING", "diffusion"):
        assert moments_of(objective.schedule, unreadable, None) == (0, 1)
    assert "cannot be read: data.path" in caplog.text


def test_cfg_pp_takes_no_scale_above_one(run):
    with refused("guidance.scale"):
        run.generator(sampler={"name": "ddim", "steps": 2}, guidance={"name": "cfg_pp", "scale": 7.5})


def test_a_workdir_may_begin_with_the_home_folder(workdir, monkeypatch):
    monkeypatch.setenv("HOME", os.path.dirname(workdir))
    assert open_run(f"~/{os.path.basename(workdir)}").step == 1
    assert df.Trainer("digits", "mlp", "denoising", workdir="~/x").workdir == f"{os.path.dirname(workdir)}/x"
    with refused("folder.path") as caught:
        build("data", {"name": "folder", "path": "~/none", "size": 8}, field="folder")
    assert "~" not in caught.value.problem
