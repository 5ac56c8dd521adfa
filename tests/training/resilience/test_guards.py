"""A bad step changes nothing and is counted; too many consecutive ones end the run."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Network
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.options import CheckpointOptions, Options
from diffusion.training.resilience import guards
from diffusion.training.resilience.guards import Diverged, Guard
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from diffusion.training.trainer import Trainer
from tests.refusals import refused
from tests.training.test_step import BATCH, NETWORK, Linear

OPTIMIZER = make_optimizer(steps=100, name="adam", learning_rate=1e-2, schedule="cosine", clip=1.0)
AVERAGES = make_ema(decays=(0.5,), warmup=True)


class Counting(Linear):
    """Counts the calls of `before_step` in its state, and changes its teacher in each."""

    def initial_state(self, params):
        return {**super().initial_state(params), "calls": jnp.int32(0)}

    def before_step(self, params, ema_params, batch, objective_state, key, step):
        teacher = {"w": params["teacher"]["w"] + 1}
        return {**params, "teacher": teacher}, {**objective_state, "calls": objective_state["calls"] + 1}

    def update_state(self, objective_state, draws, loss):
        updated, metrics = super().update_state(objective_state, draws, loss)
        return {**objective_state, **updated}, metrics


def steps_of(batches, *, network=NETWORK, spike=None, state=None):
    """Returns the states before and after each batch."""
    objective = Counting(frozen=("teacher",))
    states = [state or init_state(objective, network, OPTIMIZER, AVERAGES, jax.random.key(0))]
    step = jax.jit(make_step(objective, network, OPTIMIZER, AVERAGES, seed=0, guard=Guard(spike)))
    for batch in batches:
        states.append(step(states[-1], batch)[0])
    return states


def learned(state):
    losses = state.objective_state["losses"]
    return {"net": state.params["net"], "ema": state.ema, "moments": state.opt_state, "losses": losses}


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


BAD = {**BATCH, "x": BATCH["x"].at[3].set(jnp.nan)}


def test_a_batch_with_nan_changes_nothing():
    states = steps_of([BATCH, BAD, BATCH])
    assert_same(learned(states[2]), learned(states[1]))
    assert states[2].step == 2 and states[2].objective_state["calls"] == 2 and states[2].params["teacher"]["w"] == 7
    counters = [jax.device_get(state.guard) for state in states]
    counts = [(int(c["bad"]), int(c["in_row"]), int(c["good"])) for c in counters]
    assert counts == [(0, 0, 0), (0, 0, 1), (1, 1, 1), (1, 0, 2)]
    assert counters[2]["loss"] == counters[1]["loss"]
    assert float(states[3].params["net"]["w"]) != float(states[2].params["net"]["w"])


def test_a_gradient_with_nan_changes_nothing_if_the_loss_is_finite():
    def net(params, x, c_noise, cond, *, key=None):
        return jnp.sqrt(0 * params["w"]) + x

    states = steps_of([BATCH], network=Network(NETWORK.init, net))
    assert_same(learned(states[1]), learned(states[0]))
    assert states[1].guard["bad"] == 1


def test_an_infinite_parameter_makes_every_step_bad():
    first = steps_of([])[0]
    first.params["net"]["w"] = jnp.float32(jnp.inf)
    assert steps_of([BATCH] * 3, state=first)[-1].guard["in_row"] == 3


def test_a_spike_changes_nothing(monkeypatch):
    monkeypatch.setattr(guards, "WARMUP", 3)
    spike = {**BATCH, "x": 40 * BATCH["x"]}
    states = steps_of([BATCH] * 4 + [spike, BATCH], spike=10.0)
    assert_same(learned(states[5]), learned(states[4]))
    assert states[5].guard["bad"] == 1 and states[6].guard["bad"] == 1
    assert steps_of([BATCH] * 4 + [spike])[-1].guard["bad"] == 0  # without a limit
    assert steps_of([BATCH] * 2 + [spike], spike=10.0)[-1].guard["bad"] == 0  # before the warmup ends
    with refused("spike"):
        Guard(1.0)


def test_the_running_mean_of_the_losses():
    counters = guards.counters()
    for loss in (2.0, 4.0, 9.0):
        _, counters = Guard(5.0).check_step(counters, jnp.float32(loss), jnp.float32(1))
    weights = guards.LOSS_DECAY ** np.arange(2, -1, -1)
    np.testing.assert_allclose(counters["loss"], (1 - guards.LOSS_DECAY) * weights @ [2, 4, 9], rtol=1e-5)
    means = [weights[2 - n :] @ [2, 4, 9][: n + 1] / weights[2 - n :].sum() for n in range(3)]
    deviations = np.abs(np.array([2, 4, 9]) - means)
    np.testing.assert_allclose(counters["deviation"], (1 - guards.LOSS_DECAY) * weights @ deviations, rtol=1e-4)


def test_the_logged_learning_rate_is_that_of_the_update():
    """A bad step makes no update, so it does not advance the schedule."""
    objective = Counting(frozen=("teacher",))
    step = jax.jit(make_step(objective, NETWORK, OPTIMIZER, AVERAGES, seed=0))
    state, rates = init_state(objective, NETWORK, OPTIMIZER, AVERAGES, jax.random.key(0)), []
    for batch in (BATCH, BAD, BATCH):
        state, metrics = step(state, batch)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [float(OPTIMIZER.learning_rate(n)) for n in (0, 1, 1)], rtol=1e-6)


class WithNaN:
    """Digits of which one is NaN."""

    def __init__(self, digits):
        self.digits, self.spec = digits, digits.spec

    def __len__(self):
        return 64

    def __getitem__(self, index):
        example = self.digits[index]
        return {**example, "x": example["x"] * np.float32(np.nan if index == 5 else 1)}


@pytest.fixture
def run(tiny_mlp, digits, mesh_of):
    def train(workdir, *, source=digits, network=tiny_mlp, steps=12, every=2, keep_best=None, **options):
        return Trainer(
            source, network, build("objectives", "denoising"), workdir=str(workdir), mesh=mesh_of(1, 1, 1),
            optimizer=make_optimizer(steps=steps, learning_rate=1e-2), ema=make_ema(),
            options=Options(steps=steps, batch_size=16, log_every=1, **options),
            checkpoint=CheckpointOptions(every=every, keep_best=keep_best),
            meta={"config": {"network": {}, "objective": {}, "data": {}}},
        ).fit()  # fmt: skip

    return train


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_bad_steps_are_counted(run, tmp_path, digits):
    """One step of four in every epoch is bad, and a restart continues the count."""
    run(tmp_path, source=WithNaN(digits), steps=6, every=1, keep_best="loss")  # a bad step has no finite loss
    state = run(tmp_path, source=WithNaN(digits))
    found = lines(tmp_path)
    bad = [line for line in found if "loss" not in line]
    assert len(bad) == 3 and found[-1]["bad_steps"] == 3 == int(state.guard["bad"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.fixture
def diverging(tiny_mlp):
    """A network that returns NaN after a few steps of training."""

    def apply(params, *args, **kwargs):
        largest = jnp.abs(params["linear_out"]["kernel"]).max()
        return tiny_mlp.apply(params, *args, **kwargs) * jnp.where(largest > 0.025, jnp.nan, 1)

    return Network(tiny_mlp.init, apply)


def test_too_many_consecutive_bad_steps_end_the_run(run, tmp_path, diverging):
    with pytest.raises(Diverged, match=r"the checkpoint of step \d+ is kept; see .*diverged\.json"):
        run(tmp_path, network=diverging, patience=3)
    found = json.loads((tmp_path / "diverged.json").read_text(), parse_constant=pytest.fail)
    assert found["loss"] == "NaN"
    assert found["step"] * 16 == found["examples"][1] and found["seed"] == 0 and found["bad_steps"] == 3
    assert "net/linear_out" in found["gradient_norms"] and any(name.startswith("loss_log_snr") for name in found)
    newest = Checkpoints(str(tmp_path), read_only=True).latest()
    assert newest and newest < found["step"]


@pytest.mark.slow
def test_a_rollback_restores_the_checkpoint_and_continues_with_other_data(run, tmp_path, diverging, caplog):
    caplog.set_level(logging.WARNING, logger="diffusion")
    with pytest.raises(Diverged):
        run(tmp_path, network=diverging, patience=2, rollbacks=2)
    assert len([record for record in caplog.records if record.name.startswith("diffusion")]) == 2
    found = json.loads((tmp_path / "diverged.json").read_text())
    assert found["examples"][1] > found["step"] * 16
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("mean", [-2.0, 0.0, 1e-3, 500.0])
def test_a_spike_is_relative_to_the_spread_of_the_losses(mean):
    """Noise of std 0.1 around any mean is no spike; its mean absolute deviation is 0.08, and 10 times this a spike."""
    rng, counters = np.random.default_rng(0), guards.counters()
    check = jax.jit(Guard(10.0).check_step)
    for loss in mean + 0.1 * rng.normal(size=400):
        ok, counters = check(counters, jnp.float32(loss), jnp.float32(1))
        assert ok
    deviation = counters["deviation"] / (1 - guards.LOSS_DECAY**400)
    np.testing.assert_allclose(deviation, 0.1 * np.sqrt(2 / np.pi), rtol=0.15)
    for above, good in ((0.6, True), (1.1, False)):
        assert check(counters, jnp.float32(mean + above), jnp.float32(1))[0] == good
