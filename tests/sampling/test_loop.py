import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, find
from diffusion.core.types import Denoised
from diffusion.sampling.guidance import cfg
from diffusion.sampling.loop import bind, in_batches, invert, noised, prior, sample
from tests.refusals import refused


@pytest.fixture(scope="module")
def drawing(ddpm, tiny_mlp, mlp_params):
    """Returns `draw(keys, cond, times, scale)`, jitted, and the list of its traces."""
    traces = []

    def draw(keys, cond, times, scale):
        traces.append(keys.shape)
        denoise = bind(cfg(ddpm.denoiser(tiny_mlp.apply, mlp_params), scale), cond)
        x = prior(ddpm.schedule, times[0], keys, (8, 8, 1))
        return sample(denoise, ddpm.schedule, build("samplers", {"name": "ddim", "eta": 1.0}), x, times, keys)

    return jax.jit(draw), traces


def times_of(ddpm, grid, steps):
    return jnp.asarray(find("grids", grid, field="grid")(ddpm.schedule, steps), jnp.float32)


def drawn(drawing, ddpm, batch_size, *, num=10, seed=0, scale=2.0, labels=None, grid="trailing"):
    draw, _ = drawing
    labels = np.arange(num) % 10 if labels is None else labels
    times = times_of(ddpm, grid, 5)
    batches = in_batches(
        lambda keys, cond: draw(keys, cond, times, scale), {"label": labels}, num, batch_size, jax.random.key(seed)
    )
    return np.concatenate(list(batches))


@pytest.mark.parametrize("steps", [50, 1000])
def test_the_start_has_the_moments_of_noised_data(steps):
    """A table of 50 linear betas ends at alpha = 0.78."""
    schedule, t = build("schedules", {"name": "vp", "num_steps": steps}), jnp.float32(1)
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.normal([0.5, -1.0], [0.3, 0.9], (20_000, 2)), jnp.float32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(len(data)))
    x = prior(schedule, t, keys, (2,), (data.mean(axis=0), data.var(axis=0)))
    expected = noised(schedule, data, t, keys)
    np.testing.assert_allclose(x.mean(axis=0), expected.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(x.std(axis=0), expected.std(axis=0), atol=0.02)
    if steps == 50:  # noise alone is another law
        assert abs(prior(schedule, t, keys, (2,)).std(axis=0) - expected.std(axis=0)).max() > 0.1


def test_batch_size_does_not_change_samples(drawing, ddpm):
    whole = drawn(drawing, ddpm, 10)
    assert whole.shape == (10, 8, 8, 1)
    for batch_size in (4, 1):
        np.testing.assert_allclose(drawn(drawing, ddpm, batch_size), whole, atol=1e-5 * abs(whole).max())
    np.testing.assert_allclose(drawn(drawing, ddpm, 10, num=7), whole[:7], atol=1e-5 * abs(whole).max())


def test_seed_labels_scale_and_times_do_not_recompile(drawing, ddpm):
    first = drawn(drawing, ddpm, 4)
    _, traces = drawing
    before = len(traces)
    for change in ({"seed": 1}, {"labels": np.full(10, 3)}, {"scale": 5.0}, {"grid": "leading"}):
        assert abs(drawn(drawing, ddpm, 4, **change) - first).max() > 1e-3
    assert len(traces) == before


def test_program_size_does_not_depend_on_the_steps(ddpm, tiny_unet, tiny_params):
    """A thousand steps lower to as many lines as ten, so that they compile in the same time."""

    def lowered(steps):
        def draw(key, times):
            x = jnp.zeros((2, 8, 8, 1))
            denoise = bind(ddpm.denoiser(tiny_unet.apply, tiny_params), {"label": jnp.zeros(2, jnp.int32)})
            return sample(denoise, ddpm.schedule, build("samplers", "ancestral"), x, times, key)

        return jax.jit(draw).lower(jax.random.key(0), jnp.linspace(1, 0, steps + 1)).as_text()

    assert len(lowered(1000).splitlines()) == len(lowered(10).splitlines())


def test_denoiser_is_evaluated_at_the_time_of_x(ddpm):
    """The denoiser receives t, the time of x, and not s, the end of the step."""
    evaluated = []

    def denoise(x, t):
        jax.debug.callback(lambda t: evaluated.append(float(t)), t, ordered=True)
        return Denoised(0 * x)

    times = jnp.array([1.0, 0.5, 0.25, 0.0])
    jax.block_until_ready(
        sample(denoise, ddpm.schedule, build("samplers", "ddim"), jnp.ones((1, 1)), times, jax.random.key(0))
    )
    jax.effects_barrier()
    assert evaluated == [1.0, 0.5, 0.25]


def test_trajectory_unroll_and_a_later_start(ddpm):
    """The trajectory ends in the sample, can be resumed at any of its times, and does not depend on unrolling."""
    times, keys = jnp.array([1.0, 0.7, 0.4, 0.0]), jax.random.split(jax.random.key(0), 3)
    args = (lambda x, t: Denoised(0.3 * x), ddpm.schedule, build("samplers", "ddim"))
    x = prior(ddpm.schedule, times[0], keys, (2,))
    path = sample(*args, x, times, keys, trajectory=True)
    assert path.shape == (4, 3, 2)
    np.testing.assert_array_equal(path[0], x)
    np.testing.assert_allclose(path[-1], sample(*args, x, times, keys), rtol=1e-6)
    np.testing.assert_allclose(path[-1], sample(*args, x, times, keys, unroll=3), rtol=1e-6)
    np.testing.assert_allclose(path[-1], sample(*args, path[1], times[1:], keys), rtol=1e-6)
    np.testing.assert_allclose(path[2], sample(*args, x, times[:3], keys), rtol=1e-6)


def test_noised_adds_the_prior_to_an_example(ddpm):
    """The start of image-to-image sampling is alpha x0 plus the noise of `prior`."""
    x0, keys = jnp.ones((3, 2)), jax.random.split(jax.random.key(0), 3)
    x = noised(ddpm.schedule, x0, jnp.float32(0.4), keys)
    start = prior(ddpm.schedule, jnp.float32(0.4), keys, (2,))
    np.testing.assert_allclose(x, ddpm.schedule.alpha(0.4) * x0 + start, rtol=1e-6)


@pytest.mark.parametrize("batch", [2, 3])
def test_raw_keys_are_equal_to_typed_keys(ddpm, batch):
    """A raw key has the shape [2], which must not be taken for one key per sample in a batch of two."""
    x, times = jnp.ones((batch, 1)), jnp.array([1.0, 0.5, 0.0])
    args = (lambda x, t: Denoised(0 * x), ddpm.schedule, build("samplers", "ancestral"), x, times)
    np.testing.assert_array_equal(sample(*args, jax.random.PRNGKey(0)), sample(*args, jax.random.key(0)))
    typed = jax.random.split(jax.random.key(1), batch)
    np.testing.assert_array_equal(sample(*args, jax.random.key_data(typed)), sample(*args, typed))


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc", "ancestral"])
def test_a_solver_refuses_a_consistency_model(name):
    denoise = lambda x, t: Denoised(0.5 * x, kind="consistency")  # noqa: E731
    with refused("sampler.name"):
        sample(denoise, build("schedules", "vp"), build("samplers", name), jnp.ones((1, 2)), jnp.linspace(1, 0, 4),
               jax.random.key(0))  # fmt: skip


INVERTIBLE = ["ddim", "dpm2", {"name": "dpm2_ancestral", "eta": 0.0}, "heun", "rk4", "unipc", "lms", "deis"]


@pytest.mark.parametrize("schedule", ["flow", "trig"])
@pytest.mark.parametrize("sampler", INVERTIBLE, ids=str)
def test_inversion_to_pure_noise_is_finite(sampler, schedule):
    denoise, times = lambda x, t: Denoised(0.5 * x), jnp.linspace(1, 0, 6)
    out = invert(denoise, build("schedules", schedule), build("samplers", sampler), jnp.ones((1, 2)), times)
    assert np.isfinite(out).all()
