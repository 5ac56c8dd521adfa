"""Every sampler that there is, found by listing the folder, on every schedule, with data from a correlated Gaussian,
whose denoiser, ODE and moments are closed forms. A new file enrols itself; what it wants set stands in `SPECS`. Without
`make slow` each has one of the schedules in turn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, find, names
from diffusion.core.types import Denoised, InputError
from diffusion.sampling.loop import invert, prior, sample

MEAN = np.array([0.4, -0.2])
COVARIANCE = np.array([[0.3, 0.12], [0.12, 0.1]])
VALUES, VECTORS = np.linalg.eigh(COVARIANCE)

SPECS = {
    "ancestral": [{}, {"variance": "beta"}, {"variance": "analytic"}],
    "ddim": [{}, {"eta": 0.5}, {"eta": 1.0}],
    "heun": [{}, {"churn": 20.0, "s_noise": 1.0}],
    "dpm_solver": [{"order": 2}, {"order": 3}, {"order": 3, "singlestep": False}],
    "dpm_solver_pp": [{}, {"order": 3}, {"singlestep": True}, {"sde": True}, {"order": 3, "sde": True}],
    "unipc": [{"order": 1}, {}, {"order": 3, "prediction": "eps"}],
    "pndm": [{}, {"prk": True}],
    "euler_maruyama": [{}, {"diffusion": "sbdm"}, {"diffusion": "constant", "scale": 0.5}, {"diffusion": "sin2"}],
    "rk45": [{"rtol": 1e-5, "atol": 1e-5}],
}
ALL = [{"name": name, **keywords} for name in names("samplers") for keywords in SPECS.get(name, [{}])]
TO_THE_END = ("consistency", "lcm")
SCHEDULES = [
    {"name": "vp"},
    {"name": "vp", "betas": "cosine", "zero_terminal_snr": True},
    {"name": "edm"},
    {"name": "flow", "shift": 2.0},
]


def spell(spec):
    return " ".join([spec["name"], *(f"{key}={value}" for key, value in spec.items() if key != "name")])


def optimal(schedule, *, end=False):
    """E[x0 | x_t], or where the ODE's path through x_t ends, or by what straight step it is at r."""
    # Copies, as JAX may have the constants in the precision of an earlier test still.
    mean, values, vectors = (np.array(a) for a in (MEAN, VALUES, VECTORS))

    def at(t):
        alpha, sigma = (jnp.reshape(a, (-1, 1)) for a in (schedule.alpha(t), schedule.sigma(t)))
        return alpha, sigma, alpha**2 * values + sigma**2

    def scaled(x, gains):
        """x's components along the data's axes, each multiplied."""
        return (x @ vectors * gains) @ vectors.T

    def denoise(x, t, target_time=None):
        alpha, sigma, total = at(t)
        gains, kind = (jnp.sqrt(values / total), "consistency") if end else (alpha * values / total, "posterior_mean")
        if target_time is not None:
            alpha_r, sigma_r, total_r = at(target_time)
            gains = (jnp.sqrt(total_r / total) - sigma_r / sigma) / (alpha_r - alpha * sigma_r / sigma)
            kind = "flow_map"
        return Denoised((mean + scaled(x - alpha * mean, gains)).astype(x.dtype), kind=kind)

    return denoise


def x0_errors(schedule):
    """The variance of x0 given x_t, for the analytic variance: v sigma^2 / (alpha^2 v + sigma^2), mean over the
    axes."""
    t = np.linspace(0.001, 1, 500)
    alpha, sigma = (np.asarray(a)[:, None] for a in (schedule.alpha(t), schedule.sigma(t)))
    errors = (VALUES * sigma**2 / (alpha**2 * VALUES + sigma**2)).mean(axis=1)
    return tuple(zip(t.tolist(), errors.tolist(), strict=True))


def built(spec, schedule):
    if spec.get("variance") == "analytic":
        spec = {**spec, "x0_errors": x0_errors(schedule)}
    return build("samplers", spec)


def grid_of(schedule, steps):
    """Even steps of the angle between data and noise: fair to every schedule, and from its very end."""
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
    # The others' w(t) counts in t, which says little where sigma goes up to 80 by t = 1.
    return spec["name"] != "euler_maruyama" or float(schedule.sigma(jnp.float32(1))) < 2


def is_stochastic(spec):
    return built(spec, build("schedules", "vp")).stochastic


ODE = [spec for spec in ALL if not is_stochastic(spec)]
SDE = [spec for spec in ALL if is_stochastic(spec)]


def marked(specs, schedules):
    """All of them with all schedules, of which one in turn is not slow."""
    for number, spec in enumerate(specs):
        sensible = [schedule for schedule in schedules if makes_sense(spec, build("schedules", schedule))]
        for index, schedule in enumerate(sensible):
            marks = () if index == number % len(sensible) else pytest.mark.slow
            yield pytest.param(spec, schedule, marks=marks, id=f"{spell(spec)}-{spell(schedule)}")


@pytest.mark.parametrize(("spec", "schedule"), marked(ODE, [SCHEDULES[0], SCHEDULES[1], SCHEDULES[3]]))
def test_follows_the_ode(spec, schedule):
    schedule = build("schedules", schedule)
    x, out = drawn(spec, schedule, 64, 24)
    exact = optimal(schedule, end=True)(jnp.asarray(x), jnp.float32(1)).x0
    # Data of size 1; a step of first order leaves 0.08 at worst, and those that are adaptive 1e-4.
    room = {"ddim": 0.1, "euler": 0.1, "rk45": 1e-3}.get(spec["name"], 0.06)
    np.testing.assert_allclose(out, exact, atol=room)


@pytest.mark.parametrize(("spec", "schedule"), marked(SDE, [SCHEDULES[0], SCHEDULES[2], SCHEDULES[3]]))
def test_has_the_moments_of_the_data(spec, schedule):
    schedule = build("schedules", schedule)
    _, out = drawn(spec, schedule, 20000, 200, end=spec["name"] in TO_THE_END)
    # Standard errors are 0.004 of the mean and 0.01 of the largest variance; the rest is the steps' own.
    np.testing.assert_allclose(out.mean(axis=0), MEAN, atol=0.02)
    np.testing.assert_allclose(np.cov(out.T), COVARIANCE, atol=0.05 * COVARIANCE.max())


@pytest.mark.parametrize(("spec", "schedule"), zip(ODE, itertools.cycle(["vp", "flow"])), ids=str)
def test_inversion_leads_back(spec, schedule):
    schedule = build("schedules", schedule)
    times = jnp.asarray(find("grids", "trailing", field="grid")(schedule, 48), jnp.float32)
    sampler, denoise = built(spec, schedule), optimal(schedule)
    noise = np.random.default_rng(0).normal(size=(16, 2))
    x0 = jnp.asarray(MEAN + noise @ np.linalg.cholesky(COVARIANCE).T, jnp.float32)

    @jax.jit
    def there_and_back(x0):
        x = invert(denoise, schedule, sampler, x0, times)
        return x, sample(denoise, schedule, sampler, x, times, jax.random.key(0))

    x, back = there_and_back(x0)
    np.testing.assert_allclose(back, x0, atol=0.15 if spec["name"] in ("ddim", "euler") else 0.06)
    np.testing.assert_allclose(optimal(schedule, end=True)(x, jnp.float32(1)).x0, x0, atol=0.08)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 3)])
def test_order_of_the_round_trip(name, order, x64):
    """Heun's errors there and back cancel in their leading term (step and step back differ by a third-order one)."""
    schedule, sampler = build("schedules", "vp"), build("samplers", name)
    x0, errors = jnp.array([[1.0, -0.5]]), []
    for steps in (64, 128):
        times = schedule.time(2 * jnp.linspace(-3.0, 3.0, steps + 1))
        x = invert(optimal(schedule), schedule, sampler, x0, jnp.append(times, 0))
        back = sample(optimal(schedule), schedule, sampler, x, times, jax.random.key(0))
        errors.append(float(abs(back - schedule.alpha(times[-1]) * x0).max()))
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.2)


@pytest.mark.parametrize("spec", [{"name": "ancestral"}, {"name": "ddim", "eta": 0.5}], ids=spell)
def test_what_draws_noise_is_not_inverted(spec):
    schedule = build("schedules", "vp")
    with pytest.raises(InputError, match=r"sampler.name: draws noise"):
        invert(optimal(schedule), schedule, build("samplers", spec), jnp.ones((1, 2)), jnp.array([1.0, 0.5, 0.0]))


@pytest.mark.parametrize("name", TO_THE_END)
def test_consistency_wants_a_model_of_the_end(name):
    schedule = build("schedules", "vp")
    times = jnp.array([1.0, 0.5, 0.0])
    with pytest.raises(InputError, match=r"sampler.name: samples consistency models"):
        sample(optimal(schedule), schedule, build("samplers", name), jnp.ones((1, 2)), times, jax.random.key(0))


ORDERED = [({"name": "lms"}, 4), ({"name": "dpm_solver"}, 3), ({"name": "dpm_solver_pp"}, 2), ({"name": "deis"}, 3),
           ({"name": "unipc", "order": 3}, 3), ({"name": "pndm"}, 4)]  # fmt: skip


@pytest.mark.parametrize(("spec", "order"), ORDERED, ids=lambda value: str(value))
def test_fewer_steps_than_the_order_are_refused(spec, order):
    schedule, times = build("schedules", "vp"), jnp.linspace(1, 0, order)
    with pytest.raises(InputError, match=rf"sampler.steps: must be at least .* order {order}, got {order - 1}"):
        sample(optimal(schedule), schedule, build("samplers", spec), jnp.ones((1, 2)), times, jax.random.key(0))


@pytest.mark.parametrize("name", ["heun", "dpm2", "lms", "rk4"])
def test_a_coordinate_that_is_infinite_is_refused(name):
    sampler = build("samplers", {"name": name, "coordinate": "noise_level"})
    schedule = build("schedules", "flow")
    with pytest.raises(InputError, match=r"sampler.coordinate: noise_level is infinite"):
        sample(optimal(schedule), schedule, sampler, jnp.ones((1, 2)), jnp.linspace(1, 0, 6), jax.random.key(0))


def test_evaluations_are_counted():
    """What `evaluations` says is how often the denoiser is asked."""
    schedule, asked = build("schedules", "vp"), []

    def denoise(x, t):
        jax.debug.callback(lambda: asked.append(1))
        return Denoised(0 * x)

    specs = ("ddim", "heun", "dpm2", "dpm2_ancestral", "rk4", "predictor_corrector", "unipc", "dpm_solver", "pndm")
    for spec in [{"name": name} for name in specs] + [{"name": "pndm", "prk": True}]:
        sampler, asked[:] = built(spec, schedule), []
        args = denoise, schedule, sampler, jnp.ones((1, 2)), grid_of(schedule, 6), jax.random.key(0)
        jax.block_until_ready(jax.jit(lambda args=args: sample(*args))())
        jax.effects_barrier()
        assert len(asked) == sampler.evaluations(6), spec
