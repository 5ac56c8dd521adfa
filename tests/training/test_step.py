"""The train step on a problem that is small enough to compute by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.trees import path_name
from diffusion.core.types import Network
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.options import Options
from diffusion.training.state import init_state
from diffusion.training.step import draw_keep, make_step
from diffusion.training.trainer import Trainer
from tests.refusals import refused


@dataclasses.dataclass(frozen=True)
class Linear:
    """An objective with loss_i = (w x_i - n_i)^2, where n is drawn and w is 0 if the condition is dropped."""

    frozen: tuple[str, ...] = ()

    def init(self, network, key, teacher=None):
        return {"net": network.init(key), "teacher": {"w": jnp.float32(5)}}

    def initial_state(self, params):
        return {"losses": jnp.zeros(16)}

    def before_step(self, params, ema_params, batch, objective_state, key, step):
        return params, objective_state

    def draw(self, batch, key, step, objective_state):
        return {"n": jax.random.normal(key, batch["x"].shape)}

    def update_state(self, objective_state, draws, loss):
        return {"losses": loss}, {"matched": jnp.sum(loss * draws["n"])}

    def loss(self, net, params, ema_params, batch, key, step):
        predicted = net(params["net"], batch["x"], None, batch["cond"]) + 0 * params["teacher"]["w"]
        loss = (predicted - batch["draws"]["n"]) ** 2
        return loss, {"kept": batch["cond"]["keep"].mean(), "averaged": ema_params["net"]["w"]}


def net(params, x, c_noise, cond, *, key=None):
    return jnp.where(cond["keep"], params["w"] * x, 0)


NETWORK = Network(lambda key: {"w": jnp.float32(2)}, net)
BATCH = {"x": jnp.arange(1.0, 17.0), "cond": {}}


def run(steps=1, *, objective=None, opt=None, averages=None, batch=None, **options):
    objective = objective or Linear(frozen=("teacher",))
    opt = opt or make_optimizer(steps=100, name="sgd", learning_rate=1e-3, clip=None)
    averages = averages or make_ema(decays=(0.5,), warmup=False)
    state = init_state(objective, NETWORK, opt, averages, jax.random.key(0))
    step = jax.jit(make_step(objective, NETWORK, opt, averages, seed=0, **options))
    states, metrics = [state], []
    for _ in range(steps):
        state, measured = step(state, batch or BATCH)
        states.append(state)
        metrics.append(measured)
    return states, metrics


def test_gradient_step_by_hand():
    states, metrics = run()
    key_draw = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)[1]
    x, n = BATCH["x"], jax.random.normal(key_draw, (16,))
    gradient = jnp.mean(2 * (2 * x - n) * x)
    np.testing.assert_allclose(states[1].params["net"]["w"], 2 - 1e-3 * gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics[0]["loss"], jnp.mean((2 * x - n) ** 2), rtol=1e-6)
    np.testing.assert_allclose(metrics[0]["grad_norm"], abs(gradient), rtol=1e-6)
    np.testing.assert_allclose(metrics[0]["learning_rate"], 1e-3)
    assert states[1].step == 1


def test_every_average_follows_the_parameters():
    averages = make_ema(decays=(0.5, 0.9), warmup=False)
    states, metrics = run(3, averages=averages)
    for name, decay in (("0.5", 0.5), ("0.9", 0.9)):
        expected = float(states[0].params["net"]["w"])
        for state in states[1:]:
            expected = decay * expected + (1 - decay) * float(state.params["net"]["w"])
            np.testing.assert_allclose(state.ema[name]["net"]["w"], expected, rtol=1e-6)
    assert states[-1].ema["0.5"]["net"]["w"] != states[-1].ema["0.9"]["net"]["w"] != states[-1].params["net"]["w"]
    np.testing.assert_allclose(metrics[1]["averaged"], states[1].ema["0.9"]["net"]["w"])  # by default the last


def test_the_average_that_objectives_use():
    states, metrics = run(2, averages=make_ema(decays=(0.5, 0.9), warmup=False, sample_with=0.5))
    np.testing.assert_array_equal(metrics[1]["averaged"], states[1].ema["0.5"]["net"]["w"])
    assert states[1].ema["0.5"]["net"]["w"] != states[1].ema["0.9"]["net"]["w"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"decays": ()}, "decays"),
        ({"decays": (0.5, 0.5)}, "decays"),
        ({"decays": (1.0,)}, "decays"),
        ({"decays": (0.5,), "sample_with": 0.9}, "sample_with"),
    ],
)
def test_bad_averages(options, field):
    with refused(field):
        make_ema(**options)


def test_warmup_of_averages():
    states, _ = run(2, averages=make_ema(decays=(0.999,)))
    w = [float(state.params["net"]["w"]) for state in states]
    first = 0.1 * w[0] + 0.9 * w[1]
    np.testing.assert_allclose(states[1].ema["0.999"]["net"]["w"], first, rtol=1e-6)
    np.testing.assert_allclose(states[2].ema["0.999"]["net"]["w"], 2 / 11 * first + 9 / 11 * w[2], rtol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_accumulation_changes_nothing(accumulate):
    (_, whole), (expected,) = run(cond_drop_rate=0.3)
    (_, parts), (metrics,) = run(cond_drop_rate=0.3, accumulate=accumulate)
    np.testing.assert_allclose(parts.params["net"]["w"], whole.params["net"]["w"], rtol=1e-6)
    np.testing.assert_allclose(parts.objective_state["losses"], whole.objective_state["losses"], rtol=1e-6)
    assert metrics.keys() == expected.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, expected)


def test_conditions_are_dropped_at_the_given_rate():
    _, metrics = run(60, cond_drop_rate=0.25)
    kept = np.array([m["kept"] for m in metrics])
    assert abs(kept.mean() - 0.75) < 4 * (0.25 * 0.75 / (16 * 60)) ** 0.5 and kept.std() > 0
    _, metrics = run(3)
    assert all(m["kept"] == 1 for m in metrics)


def test_conditions_are_dropped_independently_and_together():
    """The four combinations of two conditions have the right frequencies: chi-square with 3 degrees of freedom, below
    its quantile of 1 - 1e-4."""
    rates, size = {"image": 0.2, "text": 0.3, "joint": 0.1}, 50_000
    keep = draw_keep(jax.random.key(0), rates, ("text", "image"), size)
    observed = np.bincount(2 * np.asarray(keep["image"]) + np.asarray(keep["text"]), minlength=4)
    alone = np.outer([0.2, 0.8], [0.3, 0.7]).ravel()  # in the order of `observed`
    expected = size * (0.9 * alone + np.eye(4)[0] * 0.1)
    assert np.sum((observed - expected) ** 2 / expected) < 21.1


def test_one_rate_drops_all_conditions_together():
    keep = draw_keep(jax.random.key(3), 0.4, ("text", "image"), 64)
    np.testing.assert_array_equal(keep, jax.random.uniform(jax.random.key(3), (64,)) >= 0.4)
    keep = draw_keep(jax.random.key(0), {"text": 0.4}, ("text", "image"), 64)
    assert keep["image"].all() and not keep["text"].all()


def test_the_share_without_any_condition():
    assert Options(cond_drop_rate=0.2).unconditional_share(("text", "image")) == 0.2
    options = Options(cond_drop_rate={"text": 0.5, "image": 0.1, "joint": 0.2})
    assert options.unconditional_share(("text", "image")) == pytest.approx(0.2 + 0.8 * 0.05)
    assert options.unconditional_share(("text", "image", "label")) == pytest.approx(0.2)


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan"), {"text": 1.0}])
def test_bad_drop_rates(rate):
    with refused("cond_drop_rate.text" if isinstance(rate, dict) else "cond_drop_rate"):
        Options(cond_drop_rate=rate)


def test_rates_of_unknown_conditions_are_refused(digits, tiny_mlp, ddpm):
    rates = {"label": 0.1, "text": 0.1}
    with refused("train.cond_drop_rate"):
        draw_keep(jax.random.key(0), rates, ("label",), 2)
    with refused("train.cond_drop_rate"):
        Trainer(digits, tiny_mlp, ddpm, cond_drop_rate=rates)


def test_8_bit_data_are_scaled_in_the_step():
    pixels = np.arange(0, 256, 16, dtype=np.uint8)
    losses = [run(batch={**BATCH, "x": x})[1][0]["loss"] for x in (pixels, pixels / np.float32(127.5) - np.float32(1))]
    np.testing.assert_array_equal(*losses)


def test_gradient_is_clipped():
    opt = make_optimizer(steps=100, name="sgd", learning_rate=1.0, clip=0.01)
    (before, after), (metrics,) = run(opt=opt)
    np.testing.assert_allclose(abs(after.params["net"]["w"] - before.params["net"]["w"]), 0.01, rtol=1e-5)
    assert metrics["grad_norm"] > 1  # before clipping


def test_frozen_networks_have_no_moments_and_no_average():
    opt = make_optimizer(steps=100, name="adamw", learning_rate=1e-2)
    states, _ = run(2, opt=opt)
    assert states[2].params["teacher"]["w"] == 5 and states[2].params["net"]["w"] != 2
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(states[2])]
    assert [path for path in paths if "teacher" in path] == ["params/teacher/w"]
    unfrozen, _ = run(1, objective=Linear(), opt=opt)
    assert "teacher" in unfrozen[1].ema["0.5"]
