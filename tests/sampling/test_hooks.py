"""`after_step`, times that rise, and times per example and frame, on data with closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import fold, normal
from diffusion.core.build import build, find, names
from diffusion.core.types import Denoised
from diffusion.process.analytic import Mixture
from diffusion.sampling.guidance import cfg
from diffusion.sampling.loop import evaluations, prior, renoised, sample
from tests.refusals import refused
from tests.sampling.samplers.test_every import ALL, CONSISTENCY, COVARIANCE, MEAN, built, grid_of, optimal, spell

VP = build("schedules", "vp")
X = jnp.array([[0.3, -1.0], [1.4, 0.2], [-0.7, 0.6]])


def line(t):
    """Returns values of x at time t that no sampler would reach by itself."""
    return VP.alpha(t) * X[::-1] + VP.sigma(t) * jnp.cos(3 * X)


def seen_by(spec, hook=lambda x, x0, t, s, keys: line(s), steps=6):
    """Samples with `after_step`, and returns the samples and the arguments of each of its calls."""
    seen = []

    def after_step(*args):
        jax.debug.callback(lambda *args: seen.append(args), *args[:4], jax.random.key_data(args[4]), ordered=True)
        return hook(*args)

    denoise, sampler, times = optimal(VP, end=spec["name"] in CONSISTENCY), built(spec, VP), grid_of(VP, steps)
    keys = jax.random.split(jax.random.key(0), 3)
    out = np.asarray(jax.jit(lambda: sample(denoise, VP, sampler, X, times, keys, after_step=after_step))())
    jax.effects_barrier()
    return out, seen


FAST = ("unipc", "dpm_solver order=3", "predictor_corrector")


def marked(specs, fast):
    """Returns the parameters of a test; those whose name is not in `fast` are marked slow."""
    found = {spec if isinstance(spec, str) else spell(spec): spec for spec in specs}
    return [pytest.param(spec, marks=() if name in fast else pytest.mark.slow, id=name) for name, spec in found.items()]


@pytest.mark.parametrize("spec", marked([spec for spec in ALL if "churn" not in spec], FAST))
def test_a_step_starts_from_what_the_function_returned(spec):
    """The first evaluation of each step is at the returned x and at its time, whose x0 the function receives."""
    out, seen = seen_by(spec)
    np.testing.assert_allclose(out, line(jnp.float32(0)), atol=1e-6)
    model = optimal(VP, end=spec["name"] in CONSISTENCY)
    assert len(seen) == 6 and seen[0][2] == 1 and seen[-1][3] == 0
    for (*_, s, _), (_, x0, t, _, _) in itertools.pairwise(seen):
        assert s == t
        if spec["name"] not in ("flow_map", "tcd"):  # whose x0 depends on s as well
            np.testing.assert_allclose(x0, model(line(t), jnp.float32(t)).x0, atol=2e-4)


def test_unipc_corrects_only_what_was_not_replaced():
    """Of order 1 and without corrections, it is DDIM."""
    spec = {"name": "unipc", "order": 1}
    replaced, ddim = (np.array([args[0] for args in seen_by(spec)[1]]) for spec in (spec, {"name": "ddim"}))
    np.testing.assert_allclose(replaced, ddim, atol=1e-5)
    half = lambda x, x0, t, s, keys: x.at[:, 0].set(line(s)[:, 0])  # noqa: E731
    partly, ddim = (np.array([args[0] for args in seen_by(spec, half)[1]]) for spec in (spec, {"name": "ddim"}))
    np.testing.assert_allclose(partly[:2, :, 0], ddim[:2, :, 0], atol=1e-5)
    assert abs(partly[1] - ddim[1])[:, 1].max() > 1e-3


@pytest.mark.parametrize("spec", [{"name": "unipc"}, {"name": "ddim", "eta": 1.0}], ids=spell)
def test_a_function_that_changes_nothing(spec):
    out, _ = seen_by(spec, lambda x, *_: x)
    sampler, times, keys = built(spec, VP), grid_of(VP, 6), jax.random.split(jax.random.key(0), 3)
    plain = jax.jit(lambda: sample(optimal(VP), VP, sampler, X, times, keys))()
    np.testing.assert_allclose(out, plain, atol=1e-6)


def test_the_keys_are_one_per_sample_and_not_the_samplers():
    _, seen = seen_by({"name": "ancestral"})
    keys = jax.random.split(jax.random.key(0), 3)
    used = [tuple(row) for *_, data in seen for row in data.tolist()]
    used += [tuple(row) for i in range(1, 7) for row in jax.random.key_data(fold(keys, i)).tolist()]
    assert len(set(used)) == len(used) == 2 * 6 * 3


# Times that rise


@pytest.mark.parametrize("schedule", ["vp", "edm", "ve", "flow"])
def test_added_noise_leads_to_the_marginal(schedule):
    """Noise from t to s on q(x_t | x0) gives q(x_s | x0), whether the schedule preserves the variance or not."""
    schedule, keys = build("schedules", schedule), jax.random.split(jax.random.key(0), 20000)
    for t, s in ((0.3, 0.7), (0.0, 0.5), (0.6, 1.0)):
        t, s = jnp.float32(t), jnp.float32(s)
        x = schedule.alpha(t) * 2.0 + schedule.sigma(t) * normal(fold(keys, 9), (1,))
        x = np.asarray(renoised(schedule, x, t, s, keys), np.float64)
        sigma = float(schedule.sigma(s))
        np.testing.assert_allclose(x.mean(), 2.0 * schedule.alpha(s), atol=0.03 * sigma)
        np.testing.assert_allclose(x.std(), sigma, rtol=0.02)


HISTORIES = [
    {"name": "unipc"}, {"name": "dpm_solver", "order": 3}, {"name": "pndm"}, {"name": "dpm_solver_pp", "order": 3},
    {"name": "unipc", "order": 3, "prediction": "eps"}, {"name": "lms", "order": 3}, {"name": "deis"},
    {"name": "dpm_solver_pp", "singlestep": True}, {"name": "pndm", "prk": True}, {"name": "heun"}, {"name": "rk45"},
]  # fmt: skip


@pytest.mark.parametrize("spec", marked(HISTORIES, [spell(spec) for spec in HISTORIES[:2]]))
def test_solvers_start_anew_where_noise_is_added(spec):
    """A list of times that rises once is two runs with `renoised` between them."""
    t, keys, sampler = grid_of(VP, 9), jax.random.split(jax.random.key(0), 3), built(spec, VP)
    listed = jnp.concatenate([t[:6], t[2:]])

    @jax.jit
    def both():
        args = optimal(VP), VP, sampler
        whole = sample(*args, X, listed, keys, renoise=True, trajectory=True)
        raised = renoised(VP, sample(*args, X, t[:6], keys), t[5], t[2], fold(keys, 6))
        return whole[6], whole[-1], raised, sample(*args, raised, t[2:], keys)

    at_turn, out, raised, expected = both()
    np.testing.assert_allclose(at_turn, raised, atol=1e-5)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_evaluations_of_times_that_rise():
    calls, times = [], jnp.array([1.0, 0.8, 0.6, 0.4, 0.9, 0.7, 0.5, 0.3, 0.0, 0.4, 0.2, 0.1, 0.05, 0.0])

    def denoise(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return Denoised(0.5 * x)

    for spec in ({"name": "heun"}, {"name": "pndm"}):
        sampler, calls[:] = built(spec, VP), []
        run = jax.jit(lambda sampler=sampler: sample(denoise, VP, sampler, X, times, jax.random.key(0), renoise=True))
        jax.block_until_ready(run())
        jax.effects_barrier()
        assert len(calls) == evaluations(sampler, np.asarray(times)), spec
    assert evaluations(built({"name": "ddim"}, VP), np.asarray(times)) == 11
    assert evaluations(built({"name": "rk45"}, VP), np.asarray(times)) is None


def test_restart_keeps_the_law_of_the_data():
    schedule, keys = build("schedules", "edm"), jax.random.split(jax.random.key(0), 20000)
    intervals = ((6, 3, 0.3, 2.0), (4, 2, 0.06, 0.3))
    times = find("grids", "restart", field="")(schedule, 24, intervals=intervals, grid={"name": "karras", "rho": 5.0})
    times = jnp.asarray(times, jnp.float32)

    @jax.jit
    def draw(keys):
        x = prior(schedule, times[0], keys, (2,))
        return sample(optimal(schedule), schedule, build("samplers", "heun"), x, times, keys, renoise=True)

    out = np.asarray(draw(keys), np.float64)
    np.testing.assert_allclose(out.mean(axis=0), MEAN, atol=0.02)
    np.testing.assert_allclose(np.cov(out.T), COVARIANCE, atol=0.05 * COVARIANCE.max())


@pytest.mark.slow
def test_inpainting():
    """RePaint: the known coordinate is exact, and resampling brings the other one to its conditional law."""
    known, keys = 1.2, jax.random.split(jax.random.key(0), 4000)
    gain = COVARIANCE[1, 0] / COVARIANCE[0, 0]
    mean, variance = MEAN[1] + gain * (known - MEAN[0]), COVARIANCE[1, 1] - gain * COVARIANCE[0, 1]

    def keep_known(x, x0, t, s, keys):
        return x.at[:, 0].set(VP.alpha(s) * known + VP.sigma(s) * normal(keys, ()))

    # The optimal variance is the exact law of a reverse step, up to the correlation of the two coordinates.
    sampler, errors = built({"name": "ancestral", "variance": "analytic"}, VP), {}
    for resamplings in (1, 10):
        grid = find("grids", "repaint", field="")(VP, 100, jump_length=2, jump_n_sample=resamplings)
        times = jnp.asarray(grid, jnp.float32)

        @jax.jit
        def draw(keys, times=times):
            x = prior(VP, times[0], keys, (2,))
            return sample(optimal(VP), VP, sampler, x, times, keys, after_step=keep_known, renoise=True)

        out = np.asarray(draw(keys), np.float64)
        assert (out[:, 0].astype(np.float32) == np.float32(known)).all()
        errors[resamplings] = abs(out[:, 1].mean() - mean), abs(out[:, 1].var() / variance - 1)
    # The standard errors are 0.004 and 0.02. Without resampling, the mean is wrong by 0.09 of 0.32.
    assert errors[10][0] < 0.025 and errors[10][1] < 0.06, errors
    assert errors[1][0] > 3 * errors[10][0], errors


# Times per example and frame

FRAMES = np.array([[[1, 0.7, 0.3, 0.0], [0.8, 0.8, 0.4, 0.1], [0.5, 0.0, 0.0, 0.0]],
                   [[1, 0.6, 0.5, 0.2], [0.9, 0.3, 0.3, 0.0], [0.2, 0.2, 0.1, 0.0]]], np.float32)  # fmt: skip
DATA = Mixture(means=[[0.5, -0.3], [-0.4, 0.2]], stds=[0.3, 0.5], weights=[0.4, 0.6])
VIDEO = jax.random.normal(jax.random.key(5), (2, 3, 2))


PER_FRAME = [{"name": "ddim"}, {"name": "euler", "coordinate": "time"}, {"name": "euler_maruyama", "scale": 0.0}]


@pytest.mark.parametrize("spec", marked(PER_FRAME, ["ddim"]))
def test_each_frame_follows_its_own_times(spec):
    """Frames that are independent are sampled as if they were alone; a frame whose time does not change stays."""
    times, key = jnp.moveaxis(jnp.asarray(FRAMES), -1, 0), jax.random.key(0)

    @jax.jit
    def draw():
        args = DATA.denoiser(VP), VP, build("samplers", spec)
        together = sample(*args, VIDEO, times, key, trajectory=True)
        examples = sample(*args, VIDEO.reshape(6, 2), times.reshape(4, 6), key)
        return together, examples, sample(*args, VIDEO[:, 0], times[:, 0, 0], key)

    together, examples, alone = draw()
    assert together.shape == (4, 2, 3, 2)
    np.testing.assert_array_equal(together[2, 0, 2], together[1, 0, 2])
    np.testing.assert_allclose(together[-1].reshape(6, 2), examples, atol=1e-5)
    np.testing.assert_allclose(together[-1, 0, 0], alone[0], atol=1e-5)


def test_equal_times_of_all_frames_are_one_time():
    keys, times = jax.random.split(jax.random.key(0), 2), jnp.array([1.0, 0.5, 0.2, 0.0])
    sampler, denoise = build("samplers", "ancestral"), DATA.denoiser(VP)

    @jax.jit
    def draw():
        many = sample(denoise, VP, sampler, VIDEO, jnp.broadcast_to(times[:, None, None], (4, 2, 3)), keys)
        return many, sample(lambda x, t: denoise(x, jnp.full((2, 3), t)), VP, sampler, VIDEO, times, keys)

    np.testing.assert_allclose(*draw(), atol=1e-5)


def test_solvers_that_take_one_time_refuse_others():
    for name in ("heun", "unipc", "rk45"):
        with refused("sampler.name"):
            sample(DATA.denoiser(VP), VP, build("samplers", name), VIDEO, jnp.ones((4, 2)), jax.random.key(0))


@pytest.mark.parametrize("parameterization", marked(names("parameterization"), ["v"]))
def test_denoiser_and_loss_with_a_time_per_frame(parameterization):
    """They are those of each frame alone, for a network that treats each frame by itself."""
    objective = build("objectives", {"name": "denoising", "parameterization": parameterization, "weighting": "min_snr"})
    t = jnp.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.8]])
    x, eps = (jax.random.normal(jax.random.key(i), (2, 3, 2, 2, 1)) for i in range(2))

    def network(params, x, c_noise, cond, key=None):
        return x * jnp.sin(c_noise).reshape(*c_noise.shape, *(1,) * (x.ndim - c_noise.ndim))

    denoise = cfg(objective.denoiser(network, {"net": None}), 2.0)
    cond = {"label": jnp.zeros(2, int)}
    denoise = jax.jit(denoise)
    together = denoise(x, t, cond).x0
    draws = {"t": t, "eps": eps, "weight": jnp.ones(2)}
    loss_of = jax.jit(lambda batch: objective.loss(network, {"net": None}, {}, batch, None, jnp.int32(0))[0])
    loss = loss_of({"x": x, "cond": {}, "draws": draws})
    losses = []
    for frame in range(3):
        np.testing.assert_allclose(together[:, frame], denoise(x[:, frame], t[:, frame], cond).x0, rtol=1e-5, atol=1e-6)
        batch = {"x": x[:, frame], "cond": {}, "draws": {**draws, "t": t[:, frame], "eps": eps[:, frame]}}
        losses.append(loss_of(batch))
    assert loss.shape == (2,)
    np.testing.assert_allclose(loss, np.mean(losses, axis=0), rtol=1e-5)
