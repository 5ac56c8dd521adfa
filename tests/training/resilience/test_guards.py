"""A bad step changes nothing, is counted, and ends the run when there are too many in a row."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import InputError, Network
from diffusion.training import ema, optimizer, trainer
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.resilience import guards
from diffusion.training.resilience.guards import Diverged, Guard
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.training.test_step import BATCH, NETWORK, Linear

OPT = optimizer.make_optimizer(steps=100, name="adam", learning_rate=1e-2, schedule="cosine", clip=1.0)
AVERAGES = ema.make_ema(decays=(0.5,), warmup=True)


class Told(Linear):
    """Counts in its memory how often it was prepared, and moves its teacher."""

    def memory(self):
        return {**super().memory(), "prepared": jnp.int32(0)}

    def prepare(self, params, ema_params, batch, memory, key, step):
        teacher = {"w": params["teacher"]["w"] + 1}
        return {**params, "teacher": teacher}, {**memory, "prepared": memory["prepared"] + 1}

    def remember(self, memory, noise, loss):
        seen, metrics = super().remember(memory, noise, loss)
        return {**memory, **seen}, metrics


def steps_of(batches, *, network=NETWORK, spike=None, state=None):
    """The states before and after each batch."""
    objective = Told(frozen=("teacher",))
    states = [state or init_state(objective, network, OPT.transform, AVERAGES, jax.random.key(0))]
    step = jax.jit(make_step(objective, network, OPT, AVERAGES, seed=0, guard=Guard(spike)))
    for batch in batches:
        states.append(step(states[-1], batch)[0])
    return states


def learned(state):
    return {"net": state.params["net"], "ema": state.ema, "moments": state.opt_state, "losses": state.memory["losses"]}


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


BAD = {**BATCH, "x": BATCH["x"].at[3].set(jnp.nan)}


def test_a_batch_that_is_no_number_changes_nothing():
    states = steps_of([BATCH, BAD, BATCH])
    assert_same(learned(states[2]), learned(states[1]))
    assert states[2].step == 2 and states[2].memory["prepared"] == 2 and states[2].params["teacher"]["w"] == 7
    counters = [jax.device_get(state.guard) for state in states]
    assert [(int(c["bad"]), int(c["in_row"]), int(c["sound"])) for c in counters] == [
        (0, 0, 0),
        (0, 0, 1),
        (1, 1, 1),
        (1, 0, 2),
    ]
    assert counters[2]["loss"] == counters[1]["loss"] and float(states[3].params["net"]["w"]) != float(
        states[2].params["net"]["w"]
    )


def test_a_gradient_that_is_no_number_changes_nothing():
    """Where the loss is one."""

    def net(params, x, c_noise, cond, *, key=None):
        return jnp.sqrt(0 * params["w"]) + x

    states = steps_of([BATCH], network=Network(NETWORK.init, net))
    assert_same(learned(states[1]), learned(states[0]))
    assert states[1].guard["bad"] == 1


def test_a_parameter_that_is_no_number_makes_every_step_bad():
    first = steps_of([])[0]
    first.params["net"]["w"] = jnp.float32(jnp.inf)
    assert steps_of([BATCH] * 3, state=first)[-1].guard["in_row"] == 3


def test_a_spike_changes_nothing(monkeypatch):
    monkeypatch.setattr(guards, "WARMUP", 3)
    spike = {**BATCH, "x": 40 * BATCH["x"]}
    states = steps_of([BATCH] * 4 + [spike, BATCH], spike=10.0)
    assert_same(learned(states[5]), learned(states[4]))
    assert states[5].guard["bad"] == 1 and states[6].guard["bad"] == 1
    assert steps_of([BATCH] * 4 + [spike])[-1].guard["bad"] == 0  # where none is asked for
    assert steps_of([BATCH] * 2 + [spike], spike=10.0)[-1].guard["bad"] == 0  # too early to tell
    with pytest.raises(InputError, match="spike: must be above 1, got 1"):
        Guard(1.0)


def test_the_mean_of_losses_is_theirs():
    counters = guards.counters()
    for loss in (2.0, 4.0, 9.0):
        _, counters = Guard(5.0).check_step(counters, jnp.float32(loss), jnp.float32(1))
    weights = guards.MEMORY ** np.arange(2, -1, -1)
    np.testing.assert_allclose(counters["loss"], (1 - guards.MEMORY) * weights @ [2, 4, 9], rtol=1e-5)


def test_the_rate_does_not_run_ahead():
    """The logged rate is that of the update, of which a bad step is none."""
    objective = Told(frozen=("teacher",))
    step = jax.jit(make_step(objective, NETWORK, OPT, AVERAGES, seed=0))
    state, rates = init_state(objective, NETWORK, OPT.transform, AVERAGES, jax.random.key(0)), []
    for batch in (BATCH, BAD, BATCH):
        state, metrics = step(state, batch)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [float(OPT.learning_rate(n)) for n in (0, 1, 1)], rtol=1e-6)


class Damaged:
    """Digits of which one is no number."""

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
        return trainer.train(
            str(workdir), source=source, network=network, objective=build("objectives", "denoising"),
            optimizer=optimizer.make_optimizer(steps=steps, learning_rate=1e-2), ema=ema.make_ema(), mesh=mesh_of(1, 1, 1),
            options=trainer.Options(steps=steps, batch_size=16, log_every=1, **options),
            checkpoint=trainer.CheckpointOptions(every=every, keep_best=keep_best), seed=0,
            meta={"config": {"network": {}, "objective": {}, "data": {}}},
        )  # fmt: skip

    return train


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_bad_steps_are_counted(run, tmp_path, digits):
    """One of four in every epoch; a restart counts on."""
    run(tmp_path, source=Damaged(digits), steps=6, every=1, keep_best="loss")  # which a bad step has none of
    state = run(tmp_path, source=Damaged(digits))
    found = lines(tmp_path)
    bad = [line for line in found if "loss" not in line]
    assert len(bad) == 3 and found[-1]["bad_steps"] == 3 == int(state.guard["bad"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.fixture
def diverging(tiny_mlp):
    """A network that is no number once it has learned."""

    def apply(params, *args, **kwargs):
        learned = jnp.abs(params["linear_out"]["kernel"]).max()
        return tiny_mlp.apply(params, *args, **kwargs) * jnp.where(learned > 0.025, jnp.nan, 1)

    return Network(tiny_mlp.init, apply)


def test_too_many_in_a_row_end_the_run(run, tmp_path, diverging):
    with pytest.raises(Diverged, match=r"3 steps in a row were bad, the last is (\d+), of loss nan; .*diverged.json"):
        run(tmp_path, network=diverging, patience=3)
    found = json.loads((tmp_path / "diverged.json").read_text())
    assert found["step"] * 16 == found["examples"][1] and found["seed"] == 0 and found["bad_steps"] == 3
    assert "net/linear_out" in found["gradient_norms"] and any(name.startswith("loss_log_snr") for name in found)
    newest = Checkpoints(str(tmp_path), read_only=True).latest()
    assert newest and newest < found["step"]


def test_back_to_the_checkpoint_and_on_with_other_data(run, tmp_path, diverging, capsys):
    with pytest.raises(Diverged):
        run(tmp_path, network=diverging, patience=2, rollbacks=2)
    assert capsys.readouterr().err.count("warning: back to step") == 2
    found = json.loads((tmp_path / "diverged.json").read_text())
    assert found["examples"][1] > found["step"] * 16
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(set(steps))
