"""Tests every sampler of the package on every schedule.

The data are a correlated Gaussian, whose denoiser, ODE solution and moments are closed forms. A new sampler is included
automatically; `SPECS` lists the options to test. Without `make slow`, each sampler is tested on one of the schedules,
with the first of its options.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, find, names
from diffusion.core.types import Denoised
from diffusion.sampling.loop import invert, prior, sample
from tests.refusals import refused
from tests.tiers import first_of_each, slow_except

MEAN = np.array([0.4, -0.2])
COVARIANCE = np.array([[0.3, 0.12], [0.12, 0.1]])
VALUES, VECTORS = np.linalg.eigh(COVARIANCE)

SPECS = {
    "ancestral": [{}, {"variance": "beta"}, {"variance": "analytic"}],
    "ddim": [{}, {"eta": 0.5}, {"eta": 1.0}],
    "heun": [{}, {"churn": 20.0, "s_noise": 1.0}],
    "dpm_solver": [
        {"order": 2},
        {"order": 3},
        {"order": 3, "singlestep": False},
        {"order": 1, "sde": True, "singlestep": False},
        {"order": 2, "sde": True, "singlestep": False},
    ],
    "dpm_solver_pp": [
        {},
        {"order": 3},
        {"singlestep": True},
        {"order": 3, "singlestep": True, "inner_points": "grid"},
        {"sde": True},
        {"order": 3, "sde": True},
        {"singlestep": True, "sde": True},
        {"sde": True, "brownian": True},
    ],
    "dpm_solver_pp_sde": [{}, {"eta": 0.5}, {"eta": 0.0}],
    "er_sde": [{}, {"order": 1}],
    "res": [{}, {"order": 3}],
    "sa_solver": [
        {},
        {"predictor_order": 3, "corrector_order": 4, "tau": 0.6, "low": 0.0, "high": 1.0},
        {"prediction": "eps"},
        {"tau": 0.0},
    ],
    "tcd": [{}, {"gamma": 1.0}],
    "unipc": [{"order": 1}, {}, {"order": 3, "prediction": "eps"}],
    "pndm": [{}, {"prk": True}],
    "euler_maruyama": [{}, {"diffusion": "sbdm"}, {"diffusion": "constant", "scale": 0.5}, {"diffusion": "sin2"}],
    "rk45": [{"rtol": 1e-5, "atol": 1e-5}],
}
ALL = [{"name": name, **keywords} for name in names("samplers") for keywords in SPECS.get(name, [{}])]
CONSISTENCY = ("consistency", "lcm")
SCHEDULES = [
    {"name": "vp"},
    {"name": "vp", "betas": "cosine", "zero_terminal_snr": True},
    {"name": "edm"},
    {"name": "flow", "shift": 2.0},
]


def spell(spec):
    return " ".join([spec["name"], *(f"{key}={value}" for key, value in spec.items() if key != "name")])


def optimal(schedule, *, end=False):
    """Returns the denoiser E[x0 | x_t], with `end` the exact consistency model.

    Evaluated with a `target_time`, it is the exact flow map.
    """
    # Copies, because JAX may have cached the constants in the precision of an earlier test.
    mean, values, vectors = (np.array(a) for a in (MEAN, VALUES, VECTORS))

    def moments(t):
        """Returns alpha, sigma and the variances of x_t along the principal axes, `[B, 1]` or `[B, 2]`."""
        alpha, sigma = (jnp.reshape(a, (-1, 1)) for a in (schedule.alpha(t), schedule.sigma(t)))
        return alpha, sigma, alpha**2 * values + sigma**2

    def scaled(x, gains):
        """Multiplies the components of x along the principal axes of the data by the gains."""
        return (x @ vectors * gains) @ vectors.T

    def denoise(x, t, target_time=None):
        alpha, sigma, total = moments(t)
        gains, kind = (jnp.sqrt(values / total), "consistency") if end else (alpha * values / total, "posterior_mean")
        if target_time is not None:
            alpha_r, sigma_r, total_r = moments(target_time)
            gains = (jnp.sqrt(total_r / total) - sigma_r / sigma) / (alpha_r - alpha * sigma_r / sigma)
            kind = "flow_map"
        return Denoised((mean + scaled(x - alpha * mean, gains)).astype(x.dtype), kind=kind)

    return denoise


def x0_errors(schedule):
    """Returns pairs of t and the variance of x0 given x_t, the mean of v sigma^2 / (alpha^2 v + sigma^2) over axes."""
    t = np.linspace(0.001, 1, 500)
    alpha, sigma = (np.asarray(a)[:, None] for a in (schedule.alpha(t), schedule.sigma(t)))
    errors = (VALUES * sigma**2 / (alpha**2 * VALUES + sigma**2)).mean(axis=1)
    return tuple(zip(t.tolist(), errors.tolist(), strict=True))


def built(spec, schedule):
    if spec.get("variance") == "analytic":
        spec = {**spec, "x0_errors": x0_errors(schedule)}
    return build("samplers", spec)


def grid_of(schedule, steps):
    """Returns times that are even in arctan(sigma / alpha), from t = 1, which suit every schedule."""
    top = float(jnp.arctan2(schedule.sigma(jnp.float32(1)), schedule.alpha(jnp.float32(1))))
    angle = np.linspace(top, 0, steps + 1)[1:-1]
    with np.errstate(divide="ignore"):
        inner = np.asarray(schedule.time(jnp.asarray(-2 * np.log(np.tan(angle)), jnp.float32)))
    return jnp.concatenate([jnp.ones(1), jnp.asarray(inner), jnp.zeros(1)])


def drawn(spec, schedule, num, steps, *, end=False):
    times, sampler = grid_of(schedule, steps), built(spec, schedule)

    @jax.jit
    def draw(keys):
        x = prior(schedule, times[0], keys, (2,))
        return x, sample(optimal(schedule, end=end), schedule, sampler, x, times, keys)

    return (np.asarray(a, np.float64) for a in draw(jax.random.split(jax.random.key(0), num)))


def makes_sense(spec, schedule):
    pure_noise = float(schedule.alpha(jnp.float32(1))) == 0
    if pure_noise and spec.get("diffusion") == "sbdm":
        return False
    # The other w(t) are per unit of t, which is too little noise where sigma grows to 80.
    return spec["name"] != "euler_maruyama" or float(schedule.sigma(jnp.float32(1))) < 2


def is_stochastic(spec):
    return built(spec, build("schedules", "vp")).stochastic


ODE = [spec for spec in ALL if not is_stochastic(spec)]
SDE = [spec for spec in ALL if is_stochastic(spec)]


def marked(specs, schedules):
    """Yields all combinations, marked slow but for one schedule with the first spec of each quick sampler."""
    first = first_of_each(lambda spec: spec["name"], specs)
    for number, spec in enumerate(specs):
        sensible = [schedule for schedule in schedules if makes_sense(spec, build("schedules", schedule))]
        for index, schedule in enumerate(sensible):
            default = spec in first and index == number % len(sensible) and spec["name"] != "dpm_solver_pp_sde"
            marks = () if default else pytest.mark.slow
            yield pytest.param(spec, schedule, marks=marks, id=f"{spell(spec)}-{spell(schedule)}")


@pytest.mark.parametrize(("spec", "schedule"), marked(ODE, [SCHEDULES[0], SCHEDULES[1], SCHEDULES[3]]))
def test_follows_the_ode(spec, schedule):
    schedule = build("schedules", schedule)
    x, out = drawn(spec, schedule, 64, 24)
    exact = optimal(schedule, end=True)(jnp.asarray(x), jnp.float32(1)).x0
    # The data are of size 1. The error is at most 0.08 for first-order methods, and 1e-4 for the adaptive one.
    tolerance = {"ddim": 0.1, "euler": 0.1, "rk45": 1e-3}.get(spec["name"], 0.06)
    np.testing.assert_allclose(out, exact, atol=tolerance)


@pytest.mark.parametrize(("spec", "schedule"), marked(SDE, [SCHEDULES[0], SCHEDULES[2]]))
def test_has_the_moments_of_the_data(spec, schedule):
    schedule = build("schedules", schedule)
    sampler = built(spec, schedule)
    steps = 60 if sampler.brownian else 200  # a Brownian path costs much more than the optimal denoiser
    _, out = drawn(spec, schedule, 8000, steps, end=spec["name"] in CONSISTENCY)
    # The standard errors are 0.006 of the mean and 0.016 of the largest variance; the rest is discretization error.
    np.testing.assert_allclose(out.mean(axis=0), MEAN, atol=0.02)
    np.testing.assert_allclose(np.cov(out.T), COVARIANCE, atol=0.05 * COVARIANCE.max())


INVERTED = [{"name": name} for name in ("ddim", "heun", "dpm_solver_pp")]  # without `make slow`


@pytest.mark.parametrize(
    ("spec", "schedule"),
    slow_except(lambda case: case[0] in INVERTED, zip(ODE, itertools.cycle(["vp", "flow"]))),
    ids=str,
)
def test_sampling_from_the_inversion_restores_x0(spec, schedule):
    schedule = build("schedules", schedule)
    times = jnp.asarray(find("grids", "trailing", field="grid")(schedule, 48), jnp.float32)
    sampler, denoise = built(spec, schedule), optimal(schedule)
    noise = np.random.default_rng(0).normal(size=(16, 2))
    x0 = jnp.asarray(MEAN + noise @ np.linalg.cholesky(COVARIANCE).T, jnp.float32)

    @jax.jit
    def round_trip(x0):
        x = invert(denoise, schedule, sampler, x0, times)
        return x, sample(denoise, schedule, sampler, x, times, jax.random.key(0))

    x, back = round_trip(x0)
    first_order = spec["name"] in ("ddim", "euler", "gradient_estimation")
    np.testing.assert_allclose(back, x0, atol=0.15 if first_order else 0.06)
    np.testing.assert_allclose(optimal(schedule, end=True)(x, jnp.float32(1)).x0, x0, atol=0.08)


def test_inversion_with_the_noise_of_the_model(x64):
    """The first step of DDIMInverseScheduler: eps is that of the model at x0 itself, and x0 is the given one."""
    schedule, sampler, x0 = build("schedules", "vp"), build("samplers", "ddim"), jnp.array([[1.0, -0.5], [0.2, 0.3]])
    s, times = jnp.float64(0.02), jnp.array([0.04, 0.02, 0.0])
    eps = (x0 - schedule.alpha(s) * optimal(schedule)(x0, s).x0) / schedule.sigma(s)
    start = schedule.alpha(s) * x0 + schedule.sigma(s) * eps
    expected = sample(optimal(schedule), schedule, sampler, start, times[1::-1], jax.random.key(0))
    found = invert(optimal(schedule), schedule, sampler, x0, times, from_data=True)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    errors = []
    for from_data in (True, False):  # one step, and back
        x = invert(optimal(schedule), schedule, sampler, x0, times[1:], from_data=from_data)
        back = sample(optimal(schedule), schedule, sampler, x, times[1:], jax.random.key(0))
        errors.append(abs(back - x0).max())
    assert errors[0] < errors[1] / 5


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 3)])
def test_order_of_the_round_trip(name, order, x64):
    """Heun's errors cancel in their leading term: a step and the step back differ by a third-order term."""
    schedule, sampler = build("schedules", "vp"), build("samplers", name)
    x0, errors = jnp.array([[1.0, -0.5]]), []
    for steps in (64, 128):
        times = schedule.time(2 * jnp.linspace(-3.0, 3.0, steps + 1))
        x = invert(optimal(schedule), schedule, sampler, x0, jnp.append(times, 0))
        back = sample(optimal(schedule), schedule, sampler, x, times, jax.random.key(0))
        errors.append(float(abs(back - schedule.alpha(times[-1]) * x0).max()))
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.2)


@pytest.mark.parametrize("spec", [{"name": "ancestral"}, {"name": "ddim", "eta": 0.5}], ids=spell)
def test_inversion_rejects_stochastic_samplers(spec):
    schedule = build("schedules", "vp")
    with refused("sampler.name"):
        invert(optimal(schedule), schedule, build("samplers", spec), jnp.ones((1, 2)), jnp.array([1.0, 0.5, 0.0]))


@pytest.mark.parametrize("name", CONSISTENCY)
def test_requires_a_consistency_model(name):
    schedule = build("schedules", "vp")
    times = jnp.array([1.0, 0.5, 0.0])
    with refused("sampler.name"):
        sample(optimal(schedule), schedule, build("samplers", name), jnp.ones((1, 2)), times, jax.random.key(0))


SHORT = [spec for spec in ALL if spec["name"] not in ("rk45", "flow_map", *CONSISTENCY)]
SHORT_DEFAULT = [{"name": "pndm"}, {"name": "dpm_solver_pp", "singlestep": True}, {"name": "sa_solver"}]


@pytest.mark.parametrize("spec", slow_except(SHORT_DEFAULT, SHORT), ids=spell)
def test_one_step_to_the_data_is_the_denoisers_x0(spec):
    """A sampler of any order takes one step, and lowers its order to do so."""
    schedule, x = build("schedules", "vp"), jnp.array([[0.3, -1.2], [1.5, 0.4]])
    args, times = (optimal(schedule), schedule, built(spec, schedule)), jnp.array([1.0, 0.0])
    out = jax.jit(lambda x: sample(*args, x, times, jax.random.key(0)))(x)
    if spec["name"] == "tcd":  # a flow map
        expected = optimal(schedule)(x, jnp.float32(1), target_time=jnp.zeros(2)).x0
    else:
        expected = optimal(schedule)(x, jnp.float32(1)).x0
    np.testing.assert_allclose(out, expected, atol=1e-4)


# Of the stochastic samplers, those that add no noise in such a step.
LEFT = [spec for spec in first_of_each(lambda spec: spec["name"], [spec for spec in SHORT if spec in SDE])
        if spec["name"] not in ("heun", "predictor_corrector", "tcd")]  # fmt: skip
LEFT_DEFAULT = [*SHORT_DEFAULT, {"name": "ddim", "eta": 0.5}]


@pytest.mark.parametrize(
    "spec", slow_except(LEFT_DEFAULT, [*(spec for spec in SHORT if spec in ODE), *LEFT]), ids=spell
)
def test_a_step_of_length_0_leaves_x(spec):
    """Grids that end at the lowest level of a table may repeat their last time. UniPC still corrects x there."""
    schedule, x = build("schedules", "vp"), jnp.array([[0.3, -1.2], [1.5, 0.4]])
    times = jnp.asarray(np.linspace(1, 0.1, 13), jnp.float32)
    args, grids = (optimal(schedule), schedule, built(spec, schedule)), (jnp.append(times, times[-1]), times)
    with_it, without = jax.jit(lambda x: [sample(*args, x, grid, jax.random.key(0)) for grid in grids])(x)
    corrected = spec["name"] == "sa_solver"
    atol = 0.1 if corrected else 0.03 if "order" in spec or "singlestep" in spec else 0.01
    np.testing.assert_allclose(with_it, without, atol=atol)


def test_tcd_without_noise_depends_on_no_key():
    """The variance of a step back to the same point of the table is exactly 0, not a rounding error."""
    schedule, x = build("schedules", "vp"), jnp.array([[0.3, -1.2], [1.5, 0.4]])
    args = optimal(schedule), schedule, build("samplers", {"name": "tcd", "gamma": 0.0}), x
    one, other = (sample(*args, jnp.array([1.0, 0.76, 0.301, 0.05]), jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["heun", "dpm2", "lms", "rk4"])
def test_rejects_a_coordinate_that_is_infinite(name):
    sampler = build("samplers", {"name": name, "coordinate": "noise_level"})
    schedule = build("schedules", "flow")
    with refused("sampler.coordinate"):
        sample(optimal(schedule), schedule, sampler, jnp.ones((1, 2)), jnp.linspace(1, 0, 6), jax.random.key(0))


BROKEN = {"nan": jnp.nan, "inf": jnp.inf}


@pytest.mark.parametrize("value", BROKEN)
def test_rk45_ends_where_the_model_is_not_finite(value):
    """It does not wait for an error that never becomes small, and the other samples are what they are alone."""
    schedule, sampler, calls = build("schedules", "flow"), build("samplers", "rk45"), []

    def count():
        calls.append(1)
        assert len(calls) < 2000, "does not end"

    def denoise(x, t):
        jax.debug.callback(count)
        broken = (jnp.arange(len(x)) == 0) & (t < 0.5) & (len(x) > 1)
        x0 = optimal(schedule)(x, t).x0
        return Denoised(jnp.where(broken[:, None], BROKEN[value], x0))

    def draw(x, keys):
        return sample(denoise, schedule, sampler, x, jnp.linspace(1, 0, 3), keys)

    x, keys = jnp.ones((2, 2)), jax.random.split(jax.random.key(0))
    out, alone = draw(x, keys), draw(x[1:], keys[1:])
    assert np.isnan(out[0]).all()
    np.testing.assert_allclose(out[1], alone[0], atol=1e-3)


@pytest.mark.parametrize("name", slow_except(["ddim", "unipc", "euler_ancestral"], names("samplers")))
def test_half_precision_is_kept_and_computed_in_float32(name):
    """The model alone sees x in half precision, which is the only difference from a computation in float32."""
    schedule, seen, half = build("schedules", "vp"), [], jnp.bfloat16
    exact, sampler = optimal(schedule, end=name in CONSISTENCY), build("samplers", name)

    def denoise(x, t, **more):
        seen.append(x.dtype)
        return exact(x.astype(half).astype(jnp.float32), t, **more)

    def in_half(x, t, **more):
        seen.append(x.dtype)
        return jax.tree.map(lambda leaf: leaf.astype(half), exact(x.astype(jnp.float32), t, **more))

    def draw(denoise, x):
        return sample(denoise, schedule, sampler, x, jnp.linspace(1, 0, 9), jax.random.key(0))

    x = jnp.array([[0.5, -1.25]])
    full = draw(denoise, x)
    assert {str(dtype) for dtype in seen} == {"float32"}
    seen.clear()
    out = draw(in_half, x.astype(half))
    assert out.dtype == half and {str(dtype) for dtype in seen} == {"bfloat16"}
    np.testing.assert_allclose(out.astype(jnp.float32), full, atol=0.03)


EVALUATED = [
    *({"name": name} for name in ("ddim", "heun", "dpm2", "dpm2_ancestral", "rk4", "predictor_corrector", "unipc")),
    *({"name": name} for name in ("dpm_solver", "pndm")),
    {"name": "pndm", "prk": True},
]


@pytest.mark.parametrize("spec", slow_except([{"name": "heun"}, {"name": "pndm", "prk": True}], EVALUATED), ids=spell)
def test_evaluations(spec):
    """`evaluations` returns the number of calls of the denoiser."""
    schedule, calls = build("schedules", "vp"), []

    def denoise(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return Denoised(0 * x)

    sampler = built(spec, schedule)
    args = denoise, schedule, sampler, jnp.ones((1, 2)), grid_of(schedule, 6), jax.random.key(0)
    jax.block_until_ready(jax.jit(lambda: sample(*args))())
    jax.effects_barrier()
    assert len(calls) == sampler.evaluations(6)
