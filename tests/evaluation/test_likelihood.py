import jax
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Denoised
from diffusion.evaluation import held_out_loss
from diffusion.process.analytic import Mixture
from tests.refusals import refused


@pytest.fixture(scope="module")
def toy():
    return build("data", {"name": "toy", "kind": "mixture", "labels": False, "size": 500, "split": "test"})


def test_likelihood_of_the_optimal_model(toy):
    """nll equals the entropy of the same points; the bound exceeds it by less if it has more steps."""
    schedule, excess = build("schedules", "flow"), []
    for bound_steps in (100, 400):
        spec = {"name": "likelihood", "num": 500, "steps": 100, "bound_steps": bound_steps}
        metric = build("evaluation", spec, train=toy, held_out=toy)
        values = metric(lambda _: (toy.distribution.denoiser(schedule), schedule), {}, jax.random.key(0))
        assert tuple(values) == metric.names
        assert abs(values["nll"] - values["entropy"]) < 0.01
        excess.append(values["bound"] - values["entropy"])
    assert 0 < excess[1] < 0.5 * excess[0]


@pytest.mark.slow
def test_likelihood_of_images_in_bits(digits, ddpm, tiny_mlp):
    """With labels, Hutchinson's trace and data of 17 levels, where no model can have less than 0 bits."""
    spec = {"name": "likelihood", "num": 4, "steps": 4, "bound_steps": 8, "trace": "hutchinson", "levels": 17}
    metric = build("evaluation", spec, train=digits, held_out=digits)
    params = jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(tiny_mlp.init)(jax.random.key(0)))
    values = metric(
        lambda params: (ddpm.denoiser(tiny_mlp.apply, params), ddpm.schedule), {"net": params}, jax.random.key(0)
    )
    assert (
        tuple(values) == metric.names == ("nll", "bound")
        and np.isfinite(list(values.values())).all()
        and values["bound"] > 0
    )


def test_straightness(toy):
    """Trajectories that end in a single point are straight; those that end in a mixture are curved."""
    flow, metric = build("schedules", "flow"), build("evaluation", "straightness", train=toy, held_out=toy)

    def to_a_point(x, t, cond):
        return Denoised(0 * x + 0.3)

    def curvature(denoise, schedule):
        return metric(lambda _: (denoise, schedule), {}, jax.random.key(0))["path_curvature"]

    assert curvature(to_a_point, flow) < 1e-5 and curvature(toy.distribution.denoiser(flow), flow) > 0.05
    assert curvature(to_a_point, build("schedules", "trig")) > 0.05  # straight, but the speed is not constant


def test_held_out_loss(toy):
    """For the optimal denoiser of N(m, s^2 I) on data of that law, the error of eps is SNR / (SNR + 1 / s^2)."""
    s, levels = 0.5, (4.0, 0.0, -40.0)  # the schedule ends above the last one
    gaussian = Mixture(means=np.array([[0.3, -0.2]]), stds=np.array([s]), weights=np.ones(1))
    x = np.asarray(gaussian.sample(jax.random.key(1), 3000))
    schedule = build("schedules", "vp_sde")
    held_out = [{"x": row, "cond": {}} for row in x]
    metric, calls = held_out_loss.make(toy, held_out, num=2900, log_snr=levels, batch_size=800), []

    def model(params):
        calls.append(params)
        return gaussian.denoiser(schedule), schedule

    values = metric(model, {}, jax.random.key(0))
    snr = np.exp([*levels[:2], float(schedule.log_snr(np.float32(1)))])
    assert tuple(values) == metric.names == ("held_out_loss", *(f"held_out_loss/log_snr_{v:g}" for v in levels))
    np.testing.assert_allclose(list(values.values())[1:], snr / (snr + 1 / s**2), rtol=0.05)
    np.testing.assert_allclose(values["held_out_loss"], np.mean(list(values.values())[1:]), rtol=1e-6)
    other = held_out_loss.make(toy, held_out, num=2900, log_snr=levels, batch_size=5000)(model, {}, jax.random.key(0))
    np.testing.assert_allclose(list(other.values()), list(values.values()), rtol=1e-5)
    metric(model, {}, jax.random.key(0))
    assert len(calls) == 2  # one trace per batch size: another measurement compiles nothing


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"name": "likelihood", "num": 0}, "num"),
        ({"name": "likelihood", "steps": 0}, "steps"),
        ({"name": "likelihood", "levels": 1}, "levels"),
        ({"name": "likelihood", "log_snr": (-9.0, 9.0)}, "log_snr"),
        ({"name": "straightness", "steps": 0}, "steps"),
        ({"name": "energy_distance", "num": 0}, "num"),
        ({"name": "held_out_loss", "num": 0}, "num"),
        ({"name": "held_out_loss", "log_snr": (1.0, 1.0)}, "log_snr"),
    ],
)
def test_bad_options(toy, spec, field):
    with refused(f"evaluation.{field}"):
        build("evaluation", spec, train=toy, held_out=toy)
