"""Settings of the sampler and the guidance from the command line: how they are parsed, and which are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Spec
from diffusion.pipelines import overrides, sampling_sweep
from diffusion.pipelines.generator import Generator, is_neutral
from tests.refusals import refused

CONFIG = {
    "sampler": {"name": "ddim", "eta": 0.5, "steps": 4, "grid": {"name": "trailing"}},
    "guidance": {"name": "cfg", "scale": 2.0, "rescale": {"factor": 0.5}},
}


@pytest.mark.parametrize(
    ("chosen", "sampler", "guidance"),
    [
        ({}, {}, {}),
        ({"sampler": "ddim"}, {}, {}),
        ({"sampler": "ddim:eta=0"}, {"eta": 0}, {}),
        ({"steps": "7", "grid": "karras:rho=5"}, {"steps": 7, "grid": {"name": "karras", "rho": 5}}, {}),
        ({"grid": "given:times=(1,0.5,0)", "steps": "2"},
         {"steps": 2, "grid": {"name": "given", "times": (1, 0.5, 0)}}, {}),
        ({"guidance": "3"}, {}, {"scale": 3.0}),
        ({"interval": "0.2,0.8"}, {}, {"interval": {"low": 0.2, "high": 0.8}}),
        ({"interval": "0.3:5:sigma"}, {}, {"interval": {"low": 0.3, "high": 5.0, "unit": "sigma"}}),
        ({"rescale": "0.7", "threshold": "0.99"}, {}, {"rescale": {"factor": 0.7}, "threshold": {"percentile": 0.99}}),
        ({"rescale": "0.7:output=v", "threshold": "1:keep_noise=true"}, {},
         {"rescale": {"factor": 0.7, "output": "v"}, "threshold": {"percentile": 1.0, "keep_noise": True}}),
        ({"guidance": "cfg:scale=2:threshold={'percentile':0.9,'keep_noise':true}"}, {},
         {"scale": 2, "threshold": {"percentile": 0.9, "keep_noise": True}}),
        ({"evaluations": "9"}, {"steps": 9}, {}),
        ({"guidance": "cfg:scale=3:pag={'scale':2,'layers':[1]}"}, {},
         {"scale": 3, "pag": {"scale": 2, "layers": (1,)}}),
    ],
    ids=str,
)  # fmt: skip
def test_chosen_settings_replace_the_configs(chosen, sampler, guidance):
    found = overrides.sections(CONFIG, chosen)
    assert found == ({**CONFIG["sampler"], **sampler}, {**CONFIG["guidance"], **guidance})


def test_another_sampler_or_guidance_does_not_inherit_keywords():
    sampler, _ = overrides.sections(CONFIG, {"sampler": "dpm_solver_pp:order=3:sde=true"})
    assert sampler == {"name": "dpm_solver_pp", "order": 3, "sde": True, "steps": 4, "grid": {"name": "trailing"}}
    _, guidance = overrides.sections(CONFIG, {"guidance": "apg:scale=2:eta=0.5"})
    assert guidance == {"name": "apg", "scale": 2, "eta": 0.5, "rescale": {"factor": 0.5}}
    _, guidance = overrides.sections(CONFIG, {"guidance": "pag:scale=3:layers=[1,2]"})
    assert guidance == {"name": "pag", "scale": 3, "layers": (1, 2), "rescale": {"factor": 0.5}}


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 10), ("heun", 5), ("rk4", 3), ("pndm", 9), ("unipc", 10)])
def test_steps_for_ten_evaluations(sampler, steps):
    assert overrides.sections(CONFIG, {"sampler": sampler, "evaluations": "10"})[0]["steps"] == steps


def test_steps_for_evaluations_without_a_step_to_the_data():
    chosen = {"sampler": "heun", "grid": "to_sigma_min", "evaluations": "11"}
    assert overrides.sections(CONFIG, chosen)[0]["steps"] == 5


@pytest.mark.parametrize("text", ["ddim", "heun:churn=40:s_noise=1.003", "given:times=(1, 0.5, 0)", "lms:flag=True"])
def test_parts_are_written_as_they_are_parsed(text):
    assert overrides.spell(overrides.part(text, "--sampler")) == text


@pytest.mark.parametrize(
    ("chosen", "field"),
    [
        ({"sampler": "heun:churn"}, "--sampler"),
        ({"sampler": "huen"}, "--sampler"),
        ({"steps": "0"}, "--steps"),
        ({"steps": "2.5"}, "--steps"),
        ({"interval": "0.2"}, "--interval"),
        ({"interval": "0.2,0.8,noise"}, "--interval"),
        ({"interval": "0.2,b"}, "--interval"),
        ({"threshold": "high"}, "--threshold"),
        ({"threshold": "high:keep_noise=true"}, "--threshold"),
        ({"sampler": "heun", "evaluations": "0"}, "--evaluations"),
        ({"sampler": "rk45", "evaluations": "9"}, "--evaluations"),
        ({"grid": "repaint", "evaluations": "9"}, "--evaluations"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(chosen, field):
    with refused(field):
        overrides.sections(CONFIG, chosen)


@pytest.fixture(scope="module")
def make_generator(digits, tiny_mlp, mesh_of):
    def make(sampler, guidance, *, objective="denoising", cond_drop_rate=0.1, mesh=(1, 1, 1), **keywords):
        return Generator(
            tiny_mlp, build("objectives", objective), digits.spec, mesh_of(*mesh), sampler={"steps": 4, **sampler},
            guidance=guidance, cond_drop_rate=cond_drop_rate, **keywords,
        )  # fmt: skip

    return make


def given(*times):
    return {"name": "given", "times": times}


CFG = {"name": "cfg", "scale": 2.0}


@pytest.mark.parametrize(
    ("sampler", "guidance", "field"),
    [
        ({"name": "consistency"}, CFG, "sampler.name"),
        ({"name": "ancestral", "variance": "learned"}, CFG, "sampler.variance"),
        ({"name": "ancestral", "variance": "analytic"}, CFG, "sampler.x0_errors"),
        ({"name": "ddim", "steps": "4"}, CFG, "sampler.steps"),
        ({"name": "ddim", "unroll": 0}, CFG, "sampler.unroll"),
        ({"name": "ddim", "grid": given(1, 0.5, 0.6, 0.1, 0)}, CFG, "sampler.grid.times"),
        ({"name": "ddim", "grid": given(1, 0.5, 0)}, CFG, "sampler.grid.times"),
        ({"name": "ddim", "grid": given(1, 1 - 1e-12, 0.5, 0.1, 0)}, CFG, "sampler.grid"),
        *[
            pytest.param({"name": "ddim", "grid": lambda schedule, steps, times=times: np.array(times)}, CFG,
                         "sampler.grid", id=str(times))
            for times in ([1, 0.5, 0.7, 0.2, 0], [1, 0.5, 0.2, 0, 0], [1, 0.5, 0.5, 0.2, 0.2])
        ],
        ({"name": "ddim", "grid": {"name": "repaint", "grid": "karas"}}, CFG, "sampler.grid.grid.name"),
        ({"name": "ddim", "grid": {"name": "restart", "intervals": ((3, 2, 0.3, 0.1),)}}, CFG,
         "sampler.grid.intervals"),
        ({"name": "ddim"}, {**CFG, "interval": {"low": 0.8, "high": 0.2}}, "guidance.interval"),
        ({"name": "ddim"}, {**CFG, "interval": 0.8}, "guidance.interval"),
        ({"name": "ddim"}, {**CFG, "interval": {"lo": 0.8}}, "guidance.interval.lo"),
        ({"name": "ddim"}, {**CFG, "scale": "2"}, "guidance.scale"),
        ({"name": "ddim"}, {**CFG, "negative": {"text": 3}}, "guidance.negative"),
        ({"name": "ddim"}, {**CFG, "threshold": {"percentile": 2.0}}, "guidance.threshold.percentile"),
        ({"name": "ddim"}, {"name": "rescale"}, "guidance.name"),
        ({"name": "heun"}, {"name": "cfg_pp"}, "guidance.name"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_the_model_does_not_support_are_refused(make_generator, sampler, guidance, field):
    with refused(field):
        make_generator(sampler, guidance)


def test_a_last_step_may_have_length_0(make_generator, mlp_params):
    """A grid that ends at the lowest point of a table may begin its last step there."""
    label = {"label": np.arange(4)}
    short, long = (
        make_generator({"name": "ddim", "steps": len(times), "grid": lambda schedule, steps, times=times: times}, CFG)
        for times in (np.array([1, 0.5, 0.1]), np.array([1, 0.5, 0.1, 0.1]))
    )
    samples = [generator(mlp_params, label, 4, seed=0) for generator in (short, long)]
    np.testing.assert_allclose(*samples, atol=1e-6)


def test_guidance_requires_condition_dropout(make_generator):
    for guidance in (CFG, {"name": "apg", "scale": 3.0}, {"name": "cfg_pp"}):
        with refused("guidance.scale"):
            make_generator({"name": "ddim"}, guidance, cond_drop_rate=0.0)
    for guidance in ({"name": "cfg", "scale": 1.0}, {**CFG, "negative": {"label": 3}}):
        make_generator({"name": "ddim"}, guidance, cond_drop_rate=0.0)


def test_only_guidance_with_scale_one_is_neutral():
    assert is_neutral({"name": "cfg", "scale": 1.0}) and is_neutral({"name": "apg"})
    assert not is_neutral(CFG) and not is_neutral({"name": "cfg_pp", "scale": 1.0})


def test_other_settings_share_what_is_compiled(make_generator, mlp_params):
    """Scale, interval and times are arguments of one compiled function; another number of steps compiles another."""
    guidance = {**CFG, "interval": {"low": 0.1, "high": 0.9}, "rescale": {"factor": 0.2}}
    first = make_generator({"name": "ddim"}, guidance)

    def draw(generator):
        return generator(mlp_params, {"label": np.arange(4)}, 4, seed=0)

    base = draw(first)
    for sampler, other in (
        ({}, {**guidance, "scale": 4.0}),
        ({}, {**guidance, "interval": {"low": 0.6, "high": 0.9}}),
        ({}, {**guidance, "rescale": {"factor": 1.0}}),
        ({"grid": "leading"}, guidance),
    ):
        generator = first.with_settings(sampler={"name": "ddim", "steps": 4, **sampler}, guidance=other)
        assert abs(draw(generator) - base).max() > 1e-4
    assert first.compilations == 1
    draw(first.with_settings(sampler={"name": "ddim", "steps": 5}, guidance=guidance))
    assert first.compilations == 2


def test_a_grid_in_noise_levels_is_that_of_the_trained_schedule(mesh_of):
    """The levels are visited, also those that the schedule did not have before training, and others are refused."""
    objective = build("objectives", {"name": "vdm", "schedule": {"name": "learned", "gamma_max": 3.0}})
    network = build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=(2,))
    params, visited = objective.init(network, jax.random.key(0)), []
    gamma = params["gamma"]
    params["gamma"] = {**gamma, "height": gamma["height"] + 12, "ends": jnp.array([-9.0, jnp.log(14.0)])}
    trained = objective.schedule_for(params)

    def record(x, x0, t, s, keys):
        jax.debug.callback(lambda level: visited.append(float(level)), jnp.exp(-trained.log_snr(t) / 2), ordered=True)
        return x

    def sampler(top):
        return {"name": "ddim", "steps": 8, "grid": {"name": "exponential", "sigma_min": 0.02, "sigma_max": top}}

    first = Generator(network, objective, Spec(ArraySpec((2,), "points")), mesh_of(1, 1, 1), after_step=record,
                      sampler=sampler(10.0), guidance={"name": "cfg"}, cond_drop_rate=0.0)  # fmt: skip
    for generator, top in ((first, 10.0), (first.with_settings(sampler=sampler(11.0), guidance={"name": "cfg"}), 11.0)):
        visited.clear()
        generator(params, {}, 2, seed=0)
        jax.effects_barrier()
        np.testing.assert_allclose(visited, np.geomspace(top, 0.02, 8), rtol=1e-3)
    with refused("sampler.grid.sigma_max"):
        first.with_settings(sampler=sampler(20.0), guidance={"name": "cfg"})(params, {}, 2, seed=0)
    with refused("sampler.grid.sigma_max"):
        first.with_settings(sampler=sampler(-1.0), guidance={"name": "cfg"})


@pytest.mark.parametrize("first", [0, 8, 11])
def test_batches_may_start_at_any_sample(make_generator, mlp_params, first):
    """The samples and their conditions are those of the whole, bit for bit."""
    labels, generator = np.arange(14) % 10, make_generator({"name": "ddim", "steps": 2}, {"name": "cfg", "scale": 1.0})
    whole = generator(mlp_params, {"label": labels}, 14, seed=0, batch_size=4)
    found = list(generator.batches(mlp_params, {"label": labels}, 14, seed=0, batch_size=4, first=first))
    np.testing.assert_array_equal(np.concatenate([x for x, _ in found]), whole[first:])
    assert np.concatenate([cond["label"] for _, cond in found]).tolist() == labels[first:].tolist()
    assert all(len(x) <= 4 for x, _ in found) and generator.compilations == 1


@pytest.mark.slow
def test_the_mesh_does_not_change_samples(make_generator, mlp_params):
    """The batch of six is padded to the eight devices. The sampler draws noise and contains a branch."""
    sampler = {"name": "predictor_corrector", "predictor": {"name": "ddim", "eta": 0.5}}
    generators = [make_generator(sampler, CFG, mesh=mesh) for mesh in ((1, 1, 1), (4, 2, 1))]
    one, eight = (generator(mlp_params, {"label": np.arange(6)}, 6, seed=3) for generator in generators)
    np.testing.assert_allclose(eight, one, atol=1e-4 * abs(one).max())


@pytest.mark.parametrize("text", ["", "step=1", "steps=1;steps=2", "steps=1,,2", "steps=1;evaluations=2"])
def test_invalid_sweeps_are_refused(text):
    with refused("--sweep"):
        sampling_sweep.axes(text)


def test_commas_in_brackets_do_not_separate_values():
    found = sampling_sweep.axes("guidance=pag:layers=[1,2],cfg:pag={'scale':2,'layers':(0,1)},3;steps=1,2")
    assert found == {"guidance": ["pag:layers=[1,2]", "cfg:pag={'scale':2,'layers':(0,1)}", "3"], "steps": ["1", "2"]}


@pytest.mark.parametrize(
    "content", ["[", "[]", "{}", "[3]", '[{"steps": 1}, {"step": 2}]', '[{"steps": 1, "evaluations": 2}]']
)
def test_invalid_lists_of_combinations_are_refused(content, tmp_path):
    (tmp_path / "points.json").write_text(content)
    with refused("--sweep"):
        sampling_sweep.points(f"@{tmp_path}/points.json")


def test_a_list_of_combinations_is_read_from_a_file(tmp_path):
    (tmp_path / "points.json").write_text('[{"sampler": "ddim", "steps": 5}, {"guidance": 1.5}]')
    assert sampling_sweep.points(f"@{tmp_path}/points.json") == [{"sampler": "ddim", "steps": "5"}, {"guidance": "1.5"}]
    with refused("--sweep"):
        sampling_sweep.points("@/nowhere")


def test_the_last_axis_varies_fastest():
    points = sampling_sweep.points("steps=10, 20;guidance=1,2")
    assert [sampling_sweep.spell(point) for point in points] == [
        "steps=10 guidance=1", "steps=10 guidance=2", "steps=20 guidance=1", "steps=20 guidance=2",
    ]  # fmt: skip
