import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion.core.build import build, find, names
from diffusion.sampling.loop import evaluations
from tests.refusals import refused

SCHEDULES = {
    "linear": "vp",
    "scaled_linear": {"name": "vp", "betas": "scaled_linear"},
    "cosine": {"name": "vp", "betas": "cosine"},
    "zero_terminal_snr": {"name": "vp", "betas": "scaled_linear", "zero_terminal_snr": True},
    "vp_sde": "vp_sde",
    "ve": "ve",
    "edm": "edm",
    "flow": "flow",
    "trig": "trig",
    "learned": {"name": "learned", "gamma_max": 6.0},
}
PURE_NOISE = ("zero_terminal_snr", "flow", "trig")
LEVELS = {  # sigma / alpha at the ten steps (Sabour et al. 2024)
    "sd15": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152],
    "sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113],
    "svd": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034],
}


class OneShape:
    """A schedule whose `time` is compiled only once, for inputs padded to one length."""

    def __init__(self, spec):
        self.schedule = build("schedules", spec)
        self._time = jax.jit(self.schedule.time)

    def __getattr__(self, name):
        return getattr(self.schedule, name)

    def time(self, log_snr):
        return np.asarray(self._time(jnp.asarray(np.resize(log_snr, 1500))))[: len(log_snr)]


@pytest.fixture(scope="module", params=SCHEDULES)
def named_schedule(request):
    return request.param, OneShape(SCHEDULES[request.param])


@pytest.fixture(scope="module")
def edm():
    """A schedule with sigma / alpha = 1000 t, so that the times of a grid show its noise levels."""
    return build("schedules", {"name": "edm", "sigma_max": 1000.0})


def times_of(name, schedule, steps, **keywords):
    if name == "given":
        keywords = {"times": tuple(np.linspace(1, 0, steps + 1) ** 3), **keywords}
    return find("grids", name, field="grid")(schedule, steps, **keywords)


REPEATING = ("repaint", "restart", "to_sigma_min")  # grids of another grid
FALLING = [name for name in names("grids") if name not in (*REPEATING, "lattice")]


LEVEL_GRIDS = ("beta_sigmas", "exponential", "karras", "kl_optimal", "log_snr", "polyexponential")


@pytest.mark.parametrize("name", FALLING)
def test_times_decrease_to_zero(name, named_schedule):
    key, schedule = named_schedule
    for steps in (1, 2, 7, 50, 1000, 1500):
        if steps > 50 and (name, key) == ("beta_sigmas", "cosine"):
            continue  # whose highest levels all lie between the last two points of the table
        times = times_of(name, schedule, steps)
        assert times.dtype == np.float64 and times.shape == (steps + 1,)
        assert times[-1] == 0 and times[0] <= 1
        assert np.all(np.diff(times) < 0) and np.all(np.diff(np.float32(times)) < 0)


@pytest.mark.parametrize("name", sorted({*FALLING} - {"leading", "align_your_steps"}))
def test_first_time(name, named_schedule):
    """Grids begin at t = 1; grids of noise levels begin at sigma / alpha = 80 where t = 1 is pure noise."""
    key, schedule = named_schedule
    times = times_of(name, schedule, 1)
    if name in LEVEL_GRIDS and key in PURE_NOISE:
        with jax.enable_x64(True):
            assert float(schedule.log_snr(jnp.asarray(times[0]))) == pytest.approx(-2 * np.log(80), rel=1e-9)
    else:
        assert times[0] == pytest.approx(1, rel=1e-12)


def test_points_of_the_table():
    """Table 2 of Lin et al. 2024, for T = 1000 and 10 steps; index i of the table is at t = (i + 1) / T."""
    schedule = build("schedules", "vp")
    expected = {
        "trailing": [999, 899, 799, 699, 599, 499, 399, 299, 199, 99],
        "leading": [900, 800, 700, 600, 500, 400, 300, 200, 100, 0],
        "linspace": [999, 888, 777, 666, 555, 444, 333, 222, 111, 0],
        "sgm_uniform": [999, 899.1, 799.2, 699.3, 599.4, 499.5, 399.6, 299.7, 199.8, 99.9],
    }
    for name, indices in expected.items():
        times = find("grids", name, field="grid")(schedule, 10)
        np.testing.assert_allclose(times[:-1], (np.array(indices) + 1) / 1000, atol=1e-12)
    rounded = times_of("simple", schedule, 7)[:-1]  # 1000 / 7 = 142.9 points per step
    np.testing.assert_allclose(1000 * rounded - 1, [999, 857, 714, 571, 428, 285, 142], atol=1e-9)


def test_options_of_the_points_of_the_table():
    """Timesteps of diffusers: steps_offset, multistep solvers, those that do not round, and LCM."""
    schedule = build("schedules", "vp")
    for name, steps, options, indices in (
        ("leading", 10, {"steps_offset": 1}, [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        ("leading", 5, {"steps_offset": 1, "endpoint": False}, [831, 665, 499, 333, 167]),
        ("linspace", 5, {"endpoint": False}, [999, 799, 599, 400, 200]),
        ("linspace", 5, {"rounded": False}, [999, 749.25, 499.5, 249.75, 0]),
        ("lattice", 4, {}, [999, 759, 499, 259]),
        ("lattice", 8, {}, [999, 879, 759, 639, 499, 379, 259, 139]),
    ):
        times = times_of(name, schedule, steps, **options)
        np.testing.assert_allclose(times, [*((np.array(indices) + 1) / 1000), 0], atol=1e-12)
    flow = build("schedules", "flow")
    np.testing.assert_allclose(times_of("leading", flow, 3, endpoint=False), [0.8, 0.6, 0.4, 0], rtol=1e-15)
    np.testing.assert_allclose(times_of("lattice", flow, 2, points=4), [1, 0.5, 0], rtol=1e-15)
    np.testing.assert_allclose(times_of("shifted", flow, 3, shift=1.0, last=0.2), [1, 0.6, 0.2, 0], rtol=1e-15)


@pytest.mark.parametrize("name", ["karras", "exponential", "beta_sigmas"])
def test_ends_of_another_grid(name, edm):
    levels = 1000 * times_of(name, edm, 6, ends={"name": "given", "times": (0.08, 0.07, 0.06, 0.05, 0.04, 0.003, 0)})
    np.testing.assert_allclose(levels, 1000 * times_of(name, edm, 6, sigma_min=3.0, sigma_max=80.0), rtol=1e-9)


def test_karras_levels_of_a_longer_list():
    edm = build("schedules", "edm")
    every = times_of("karras", edm, 40)
    for steps in (1, 2, 3, 40):
        taken = [*every[: steps * (40 // steps) : 40 // steps], 0]
        np.testing.assert_allclose(times_of("karras", edm, steps, points=40), taken, rtol=1e-9)


def test_points_without_a_table():
    for schedule in (build("schedules", "flow"), build("schedules", {"name": "vp", "num_steps": 3})):
        np.testing.assert_allclose(times_of("leading", schedule, 4), [0.8, 0.6, 0.4, 0.2, 0], rtol=1e-15)
        for name in ("trailing", "linspace", "simple", "sgm_uniform"):
            np.testing.assert_allclose(times_of(name, schedule, 4), [1, 0.75, 0.5, 0.25, 0], rtol=1e-15)


def test_quadratic():
    np.testing.assert_allclose(times_of("quadratic", None, 4), [1, 9 / 16, 1 / 4, 1 / 16, 0], rtol=1e-15)
    np.testing.assert_allclose(times_of("quadratic", None, 4, power=1), [1, 0.75, 0.5, 0.25, 0], rtol=1e-15)
    np.testing.assert_allclose(times_of("quadratic", None, 2, power=0.5), [1, 0.5**0.5, 0], rtol=1e-15)


@pytest.mark.parametrize("scale", [0.5, 6.0, 20.0])
def test_sigmoid_is_a_logistic(scale):
    times = times_of("sigmoid", None, 10, scale=scale)
    ends = stats.logistic.cdf([-scale / 2, scale / 2])
    logistic = stats.logistic.cdf(np.linspace(scale / 2, -scale / 2, 11))
    np.testing.assert_allclose(times, (logistic - ends[0]) / (ends[1] - ends[0]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["sigmoid", "beta"])
def test_dense_at_both_ends(name):
    gaps = -np.diff(times_of(name, None, 20))
    np.testing.assert_allclose(gaps, gaps[::-1], rtol=1e-9)
    assert np.all(np.diff(gaps[:10]) > 0)


def test_beta():
    np.testing.assert_allclose(times_of("beta", None, 20, a=1, b=1), np.linspace(1, 0, 21), atol=1e-14)
    np.testing.assert_allclose(
        times_of("beta", None, 20, a=0.4, b=1.7), stats.beta.ppf(np.linspace(1, 0, 21), 0.4, 1.7), rtol=1e-9
    )
    np.testing.assert_allclose(times_of("beta", None, 8, a=0.5, b=1), np.linspace(1, 0, 9) ** 2, atol=1e-14)


def test_shifted():
    even = np.linspace(1, 0, 21)
    np.testing.assert_allclose(times_of("shifted", None, 20, shift=1), even, rtol=1e-15)
    np.testing.assert_allclose(times_of("shifted", None, 4), [1, 0.9, 0.75, 0.5, 0], rtol=1e-15)
    for shift in (0.1, 3.0):
        times = times_of("shifted", None, 20, shift=shift)
        assert times[0] == 1
        np.testing.assert_allclose(times / (shift - (shift - 1) * times), even, rtol=1e-14)


def test_shifted_equals_the_shift_of_the_schedule(x64):
    plain, shifted = (build("schedules", {"name": "flow", "shift": shift}) for shift in (1.0, 3.0))
    times = times_of("shifted", plain, 20, shift=3.0)
    np.testing.assert_allclose(plain.sigma(times), shifted.sigma(np.linspace(1, 0, 21)), rtol=1e-14)


def test_linear_quadratic():
    """The reference implementation has these coefficients of i^2, of i and of 1 in its second half."""
    for steps, low in ((10, 0.025), (7, 0.1)):
        half, rest = steps // 2, steps - steps // 2
        square = (half - low * steps) / (half * rest**2)
        linear = low / half - 2 * (half - low * steps) / rest**2
        i = np.arange(steps)
        rises = np.where(i < half, i * low / half, square * i**2 + linear * i + square * half**2)
        times = times_of("linear_quadratic", None, steps, threshold_noise=low)
        np.testing.assert_allclose(times, [*(1 - rises), 0], rtol=1e-12)
    assert times_of("linear_quadratic", None, 1).tolist() == [1, 0]


def test_polyexponential(edm):
    levels = np.exp(np.linspace(1, 0, 6) ** 2.5 * np.log(1000) + np.log(0.1))
    times = times_of("polyexponential", edm, 6, rho=2.5, sigma_min=0.1, sigma_max=100.0)
    np.testing.assert_allclose(1000 * times, [*levels, 0], rtol=1e-12)
    np.testing.assert_allclose(times_of("polyexponential", edm, 6), times_of("exponential", edm, 6), rtol=1e-12)


def test_kl_optimal_is_even_in_the_angle(edm):
    times = times_of("kl_optimal", edm, 6, sigma_min=0.1, sigma_max=100.0)
    angles = np.arctan(1000 * times[:-1])
    np.testing.assert_allclose(np.diff(angles), (np.arctan(0.1) - np.arctan(100)) / 5, rtol=1e-12)
    np.testing.assert_allclose(1000 * times[[0, -2]], [100, 0.1], rtol=1e-9)


def test_karras(edm):
    """Equation 5 of Karras et al. 2022."""
    i, low, high = np.arange(18), 0.002 ** (1 / 7), 80 ** (1 / 7)
    times = times_of("karras", edm, 18, sigma_max=80.0)
    np.testing.assert_allclose(1000 * times[:-1], (high + i / 17 * (low - high)) ** 7, rtol=1e-12)


@pytest.mark.parametrize(("rho", "middle"), [(0.05, 900 / 2**0.05), (1.0, 450.5), (2.0, 240.25), (1e14, 30.0)])
def test_karras_is_even_in_the_power(rho, middle, edm):
    """Includes values of rho for which sigma^(1/rho) overflows or is 1 up to rounding (a geometric mean)."""
    times = times_of("karras", edm, 3, rho=rho, sigma_min=1.0, sigma_max=900.0)
    np.testing.assert_allclose(1000 * times, [900, middle, 1, 0], rtol=1e-9)


def test_karras_approaches_exponential(edm):
    exponential = np.log(times_of("exponential", edm, 20)[:-1])
    errors = [np.ptp(np.log(times_of("karras", edm, 20, rho=rho)[:-1]) - exponential) for rho in (1e3, 1e4, 1e8)]
    assert errors[0] > 9 * errors[1] and errors[1] > 1e-4 and errors[2] < 1e-6


def test_beta_sigmas(edm):
    """diffusers' `use_beta_sigmas`: sigma_min + q (sigma_max - sigma_min) for quantiles q at even probabilities."""
    quantiles = stats.beta.ppf(np.linspace(1, 0, 9), 0.4, 1.7)
    times = times_of("beta_sigmas", edm, 9, a=0.4, b=1.7, sigma_min=0.1, sigma_max=80.0)
    np.testing.assert_allclose(1000 * times, [*(0.1 + quantiles * 79.9), 0], rtol=1e-9)
    even = times_of("beta_sigmas", edm, 3, a=1.0, b=1.0, sigma_min=1.0, sigma_max=9.0)
    np.testing.assert_allclose(1000 * even, [9, 5, 1, 0], rtol=1e-12)


def test_to_sigma_min(edm):
    vp, flow = build("schedules", "vp"), build("schedules", "flow")
    # On a table the default is its first point. The last step of `linspace` has length 0.
    np.testing.assert_allclose(times_of("to_sigma_min", vp, 4), [1, 0.75, 0.5, 0.25, 0.001], rtol=1e-12)
    np.testing.assert_allclose(times_of("to_sigma_min", vp, 3, grid="linspace"), [1, 0.501, 0.001, 0.001], atol=1e-12)
    # sigma / alpha = t / (1 - t) for a flow, whose default is 0.002, and 1000 t for `edm`, which has a sigma_min.
    np.testing.assert_allclose(times_of("to_sigma_min", flow, 2), [1, 0.5, 0.002 / 1.002], rtol=1e-9)
    np.testing.assert_allclose(times_of("to_sigma_min", flow, 2, sigma_min=0.25), [1, 0.5, 0.2], rtol=1e-9)
    times = times_of("to_sigma_min", edm, 4, grid={"name": "karras", "rho": 3.0})
    np.testing.assert_array_equal(times[:-1], times_of("karras", edm, 4, rho=3.0)[:-1])
    assert times[-1] == times[-2]


def test_log_snr_is_even(named_schedule, x64):
    _, schedule = named_schedule
    for keywords, ends in (({}, None), ({"lowest": -3, "highest": 5.0}, (-3, 5))):
        levels = np.asarray(schedule.log_snr(jnp.asarray(times_of("log_snr", schedule, 9, **keywords)[:-1])))
        np.testing.assert_allclose(np.diff(levels), (levels[-1] - levels[0]) / 8, rtol=1e-6)
        assert levels[-1] == pytest.approx(ends[1] if ends else -2 * np.log(getattr(schedule, "sigma_min", 0.002)))
        assert ends is None or levels[0] == pytest.approx(ends[0])


def test_exponential_is_log_snr(named_schedule):
    _, schedule = named_schedule
    for sigmas, ends in (({}, {}), ({"sigma_min": 0.1, "sigma_max": 3}, {"highest": 4.605170, "lowest": -2.197225})):
        times = times_of("exponential", schedule, 9, **sigmas)
        np.testing.assert_allclose(times, times_of("log_snr", schedule, 9, **ends), rtol=1e-6)


def test_exponential_is_geometric(edm):
    times = times_of("exponential", edm, 4, sigma_min=0.01, sigma_max=10.0)
    np.testing.assert_allclose(1000 * times, [10, 1, 0.1, 0.01, 0], rtol=1e-12)


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_accepts_the_highest_level_of_the_schedule(name):
    """The highest level of VE is below its sigma_max by a rounding error."""
    times = times_of(name, build("schedules", "ve"), 5, sigma_min=0.01, sigma_max=50.0)
    assert times[0] == 1


@pytest.mark.parametrize("model", LEVELS)
def test_align_your_steps(model, edm):
    levels = np.array(LEVELS[model])
    np.testing.assert_allclose(1000 * times_of("align_your_steps", edm, 10, model=model), [*levels, 0], rtol=1e-12)
    # Of twenty steps, every other one is a step of the ten; those between are geometric means.
    times = 1000 * times_of("align_your_steps", edm, 20, model=model)
    np.testing.assert_allclose(times[:-1:2], levels, rtol=1e-12)
    np.testing.assert_allclose(times[1:-2:2], np.sqrt(levels[:-1] * levels[1:]), rtol=1e-12)
    # The last step interpolates towards the eleventh level, which itself is not used.
    last = {"sd15": 0.029, "sdxl": 0.029, "svd": 0.002}[model]
    assert times[-2] == pytest.approx(np.sqrt(levels[-1] * last), rel=1e-12)


def test_align_your_steps_on_its_own_schedule():
    """The authors also give the steps as indices of Stable Diffusion's table, which ends just below the first level."""
    times = times_of("align_your_steps", build("schedules", SCHEDULES["scaled_linear"]), 10)
    assert times[0] == 1
    indices = np.array([999, 850, 736, 645, 545, 455, 343, 233, 124, 24])
    np.testing.assert_allclose(times[:-1] * 1000 - 1, indices, atol=2)


def test_align_your_steps_accepts_a_schedule_within_one_percent():
    """The first level becomes the schedule's end, and steps between levels above it do not collapse to t = 1."""
    times = times_of("align_your_steps", build("schedules", {"name": "edm", "sigma_max": 14.5}), 2000)
    assert times[0] == pytest.approx(1, rel=1e-12) and times[200] * 14.5 == pytest.approx(6.475)
    with refused("model"):
        times_of("align_your_steps", build("schedules", {"name": "edm", "sigma_max": 14.4}), 10)


def test_given():
    assert times_of("given", None, 3, times=(1, 0.5, 0.25, 0.125)).tolist() == [1, 0.5, 0.25, 0.125]


@pytest.mark.parametrize(("jump_length", "jump_n_sample"), [(1, 1), (1, 3), (3, 4), (10, 10), (99, 2), (100, 2)])
def test_repaint(jump_length, jump_n_sample):
    """The times are those of a walk as in the paper: down, and up again as often as each landing allows."""
    schedule, steps = build("schedules", "flow"), 100
    left = {landing: jump_n_sample - 1 for landing in range(1, steps - jump_length + 1, jump_length)}
    remaining, walk = steps, [steps]
    while remaining:
        remaining -= 1
        walk.append(remaining)
        if left.get(remaining, 0):
            left[remaining] -= 1
            remaining += jump_length
            walk.append(remaining)
    times = times_of("repaint", schedule, steps, jump_length=jump_length, jump_n_sample=jump_n_sample)
    np.testing.assert_allclose(times, np.array(walk) / steps, atol=1e-12)


def test_restart(edm):
    """EDM on CIFAR-10 with 18 steps and [3, 2, 0.06, 0.30] takes 43 evaluations of Heun's method, as in the paper."""
    schedule = build("schedules", {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0})
    times = times_of("restart", schedule, 18)
    assert evaluations(build("samplers", "heun"), times) == 43
    main = times_of("karras", schedule, 18)
    low = main[1 + np.argmin(abs(80 * main[1:] - 0.06))]
    middle = ((0.3 ** (1 / 7) + (80 * low) ** (1 / 7)) / 2) ** 7 / 80
    cut = main.tolist().index(low) + 1
    expected = [*main[:cut], *[0.3 / 80, middle, low] * 2, *main[cut:]]
    np.testing.assert_allclose(times, expected, rtol=1e-9)
    several = times_of(
        "restart", schedule, 18, intervals=((4, 1, 19.35, 40.79), (4, 1, 1.09, 1.92)), grid="exponential"
    )
    assert (np.diff(several) > 0).sum() == 2 and len(several) == 19 + 2 * 4


def test_a_grid_that_is_repeated_may_have_options_and_falls():
    schedule = build("schedules", "edm")
    times = times_of("repaint", schedule, 5, jump_n_sample=1, grid={"name": "karras", "rho": 3.0})
    np.testing.assert_array_equal(times, times_of("karras", schedule, 5, rho=3.0))
    with refused("grid"):
        times_of("repaint", schedule, 5, jump_length=1, grid={"name": "repaint", "jump_length": 1})


LEARNED = {"name": "learned", "gamma_min": -10.0}  # sigma / alpha = 0.0067 at t = 0


@pytest.mark.parametrize(
    ("name", "keywords", "schedule", "field"),
    [
        *[
            (name, {field: bad}, "edm", field)
            for name, field in [("quadratic", "power"), ("sigmoid", "scale"), ("beta", "a"), ("beta", "b"),
                                ("beta_sigmas", "a"), ("beta_sigmas", "sigma_max"), ("to_sigma_min", "sigma_min"),
                                ("polyexponential", "rho"), ("kl_optimal", "sigma_min"),
                                ("linear_quadratic", "threshold_noise"),
                                ("shifted", "shift"), ("karras", "rho"), ("karras", "sigma_min"),
                                ("karras", "sigma_max"), ("exponential", "sigma_min"), ("exponential", "sigma_max")]
            for bad in (0, -1.0, np.nan, np.inf)
        ],
        # Two steps at the same time.
        ("quadratic", {"power": 1e4}, "edm", "power"),
        ("sigmoid", {"scale": 1e3}, "edm", "scale"),
        ("beta", {"a": 1e-5}, "edm", "a"),
        ("beta", {"b": 1e-5}, "edm", "b"),
        ("beta_sigmas", {"b": 1e-5}, "edm", "b"),
        ("shifted", {"shift": 1e20}, "edm", "shift"),
        ("karras", {"rho": 1e-20}, "edm", "rho"),
        ("exponential", {"sigma_min": 1e-300}, "vp", "sigma_min"),
        ("log_snr", {"highest": 3000.0}, "edm", "highest"),
        # Levels that the schedule does not reach, or in the wrong order.
        *[
            (name, keywords, schedule, field)
            for name in ("karras", "exponential")
            for keywords, schedule, field in [
                ({"sigma_max": 81.0}, "edm", "sigma_max"),
                ({"sigma_min": 3, "sigma_max": 2}, "flow", "sigma_min"),
                ({"sigma_min": 80.0}, "flow", "sigma_min"),
                ({}, LEARNED, "sigma_min"),
            ]
        ],
        ("leading", {"steps_offset": -1}, "vp", "steps_offset"),
        ("leading", {"steps_offset": 200}, "vp", "steps_offset"),
        ("leading", {"steps_offset": 1}, "flow", "steps_offset"),
        ("lattice", {"points": 4}, "vp", "points"),
        ("shifted", {"last": 1.0}, "flow", "last"),
        ("shifted", {"last": 0.0}, "flow", "last"),
        ("karras", {"ends": "trailing", "sigma_min": 1.0}, "edm", "ends"),
        ("karras", {"ends": "trailing"}, "flow", "ends"),
        ("karras", {"ends": "restart"}, "edm", "ends"),
        ("karras", {"points": 4}, "edm", "points"),
        ("log_snr", {"lowest": -9}, "edm", "lowest"),
        ("log_snr", {"lowest": 3, "highest": 2}, "flow", "highest"),
        ("log_snr", {"highest": 11}, LEARNED, "highest"),
        ("log_snr", {"lowest": -np.inf}, "flow", "lowest"),
        ("log_snr", {"highest": np.inf}, "flow", "highest"),
        ("log_snr", {"highest": np.nan}, "flow", "highest"),
        ("align_your_steps", {}, "learned", "model"),
        ("align_your_steps", {"model": "svd"}, "edm", "model"),
        # The wrong number of times, times outside of [0, 1], and times that do not decrease.
        ("given", {"times": (1, 0.8, 0.6, 0.4, 0.2)}, "edm", "times"),
        ("given", {"times": (1, 0.8, 0.6, 0.4, 0.2, 0.1, 0)}, "edm", "times"),
        ("given", {"times": (1.1, 0.8, 0.6, 0.4, 0.2, 0)}, "edm", "times"),
        ("given", {"times": (1, 0.8, 0.6, 0.4, 0.2, -0.1)}, "edm", "times"),
        ("given", {"times": (1, 0.8, 0.6, np.nan, 0.2, 0)}, "edm", "times"),
        ("given", {"times": (1, 0.8, 0.8, 0.4, 0.5, 0)}, "edm", "times"),
        ("linear_quadratic", {"threshold_noise": 0.9}, "flow", "threshold_noise"),
        ("to_sigma_min", {"sigma_min": 20.0}, "edm", "sigma_min"),
        ("to_sigma_min", {"grid": "karras"}, "vp", "sigma_min"),
        ("to_sigma_min", {"grid": "restart"}, "edm", "grid"),
        ("repaint", {"jump_length": 0}, "edm", "jump_length"),
        ("repaint", {"jump_n_sample": 0}, "edm", "jump_n_sample"),
        ("repaint", {"jump_n_sample": 10**9}, "edm", "jump_n_sample"),
        ("repaint", {"grid": {"name": "karras", "rho": -1.0}}, "edm", "grid.rho"),
        ("restart", {"rho": 0.0}, "edm", "rho"),
        *[
            ("restart", {"intervals": (interval,)}, "edm", "intervals")
            for interval in [(3, 2, 0.06), (2.5, 2, 0.06, 0.3), (1, 2, 0.06, 0.3), (3, 0, 0.06, 0.3), (3, 2, 0.0, 0.3),
                             (3, 2, 0.3, 0.3), (3, 2, 0.06, 81.0), (3, 2, 0.06, np.nan), (3, 10**9, 0.06, 0.3)]
        ],
        ("restart", {"intervals": ((3, 2, 0.06, 60.0), (3, 2, 0.061, 60.0))}, "edm", "intervals"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_errors_name_the_keyword(name, keywords, schedule, field):
    with refused(field) as error:
        times_of(name, build("schedules", schedule), 5, **keywords)
    assert "\n" not in str(error.value)
