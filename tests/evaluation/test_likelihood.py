import jax
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Denoised
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
        values = metric(toy.distribution.denoiser(schedule), schedule, jax.random.key(0))
        assert abs(values["nll"] - values["entropy"]) < 0.01
        excess.append(values["bound"] - values["entropy"])
    assert 0 < excess[1] < 0.5 * excess[0]


def test_likelihood_of_images_in_bits(digits, ddpm, tiny_mlp):
    """With labels, Hutchinson's trace and data of 17 levels, where no model can have less than 0 bits."""
    spec = {"name": "likelihood", "num": 4, "steps": 4, "bound_steps": 8, "trace": "hutchinson", "levels": 17}
    metric = build("evaluation", spec, train=digits, held_out=digits)
    params = jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(tiny_mlp.init)(jax.random.key(0)))
    values = metric(ddpm.denoiser(tiny_mlp.apply, {"net": params}), ddpm.schedule, jax.random.key(0))
    assert values.keys() == {"nll", "bound"} and np.isfinite(list(values.values())).all() and values["bound"] > 0


def test_straightness(toy):
    """Trajectories that end in a single point are straight; those that end in a mixture are curved."""
    flow, metric = build("schedules", "flow"), build("evaluation", "straightness", train=toy, held_out=toy)

    def to_a_point(x, t, cond):
        return Denoised(0 * x + 0.3)

    straight = metric(to_a_point, flow, jax.random.key(0))["path_curvature"]
    bent = metric(toy.distribution.denoiser(flow), flow, jax.random.key(0))["path_curvature"]
    assert straight < 1e-5 and bent > 0.05
    trig = metric(to_a_point, build("schedules", "trig"), jax.random.key(0))["path_curvature"]
    assert trig > 0.05  # straight, but the speed is not constant


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"name": "likelihood", "num": 0}, "num"),
        ({"name": "likelihood", "steps": 0}, "steps"),
        ({"name": "likelihood", "levels": 1}, "levels"),
        ({"name": "likelihood", "log_snr": (-9.0, 9.0)}, "log_snr"),
        ({"name": "straightness", "steps": 0}, "steps"),
        ({"name": "energy_distance", "num": 0}, "num"),
    ],
)
def test_bad_options(toy, spec, field):
    with refused(f"evaluation.{field}"):
        build("evaluation", spec, train=toy, held_out=toy)
