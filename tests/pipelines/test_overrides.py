"""Ways of sampling from the command line: what is understood, and what is refused before anything is drawn."""

import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import InputError
from diffusion.pipelines import overrides, sampling_sweep
from diffusion.pipelines.generator import Generator, is_plain

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
        ({"evaluations": "9"}, {"steps": 9}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_chosen_replaces_the_config(chosen, sampler, guidance):
    found = overrides.sections(CONFIG, chosen)
    assert found == ({**CONFIG["sampler"], **sampler}, {**CONFIG["guidance"], **guidance})


def test_another_sampler_does_not_inherit_keywords():
    sampler, _ = overrides.sections(CONFIG, {"sampler": "dpm_solver_pp:order=3:sde=true"})
    assert sampler == {"name": "dpm_solver_pp", "order": 3, "sde": True, "steps": 4, "grid": {"name": "trailing"}}
    _, guidance = overrides.sections(CONFIG, {"guidance": "apg:scale=2:eta=0.5"})
    assert guidance == {"name": "apg", "scale": 2, "eta": 0.5, "rescale": {"factor": 0.5}}


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 10), ("heun", 5), ("rk4", 3), ("pndm", 9), ("unipc", 10)])
def test_steps_for_ten_evaluations(sampler, steps):
    assert overrides.sections(CONFIG, {"sampler": sampler, "evaluations": "10"})[0]["steps"] == steps


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"sampler": "heun:churn"}, "--sampler: 'heun:churn': wants NAME:keyword=value"),
        ({"sampler": "huen"}, "--sampler: no 'huen' in samplers; did you mean 'heun'"),
        ({"steps": "0"}, "--steps: must be a whole number of at least 1, got 0"),
        ({"steps": "2.5"}, "--steps: must be a whole number"),
        ({"interval": "0.2"}, "--interval: wants lo,hi"),
        ({"interval": "0.2,0.8,noise"}, "--interval: wants lo,hi"),
        ({"interval": "0.2,b"}, "--interval: must be a number, got 'b'"),
        ({"threshold": "high"}, "--threshold: must be a number"),
        ({"sampler": "pndm", "evaluations": "1"}, "--evaluations: one step of pndm takes 2, got 1"),
        ({"sampler": "rk45", "evaluations": "9"}, "--evaluations: rk45 takes as many as it needs"),
    ],
    ids=str,
)
def test_bad_choices_are_refused(chosen, message):
    with pytest.raises(InputError) as error:
        overrides.sections(CONFIG, chosen)
    assert str(error.value).startswith(message)


@pytest.fixture(scope="module")
def drawer_of(digits, tiny_unet, mesh_of):
    def make(sampler, guidance, *, objective="ddpm", cond_drop_rate=0.1, mesh=(1, 1, 1), **keywords):
        mesh = mesh_of(*mesh)
        objective = build("objectives", objective)
        return Generator(tiny_unet, objective, digits.spec, mesh, sampler={"steps": 4, **sampler}, guidance=guidance,
                      cond_drop_rate=cond_drop_rate, **keywords)  # fmt: skip

    return make


def given(*times):
    return {"name": "given", "times": times}


CFG = {"name": "cfg", "scale": 2.0}


@pytest.mark.parametrize(
    ("sampler", "guidance", "message"),
    [
        ({"name": "consistency"}, CFG, "sampler.name: samples consistency models"),
        ({"name": "ancestral", "variance": "learned"}, CFG, "sampler.variance: the model has learned no variance"),
        ({"name": "ancestral", "variance": "analytic"}, CFG, "sampler.x0_errors: are what variance = 'analytic' goes"),
        ({"name": "lms", "steps": 3}, CFG, "sampler.steps: must be at least the sampler's order 4, got 3"),
        ({"name": "ddim", "steps": "4"}, CFG, "sampler.steps: must be an integer of at least 1"),
        ({"name": "ddim", "unroll": 0}, CFG, "sampler.unroll: must be an integer of at least 1, got 0"),
        ({"name": "ddim", "grid": given(1, 0.5, 0.6, 0.1, 0)}, CFG, "sampler.grid.times: must fall"),
        ({"name": "ddim", "grid": given(1, 0.5, 0)}, CFG, "sampler.grid.times: must be 5 numbers"),
        ({"name": "ddim", "grid": given(1, 1 - 1e-12, 0.5, 0.1, 0)}, CFG, "sampler.grid: its times do not fall"),
        ({"name": "ddim"}, {**CFG, "interval": {"low": 0.8, "high": 0.2}}, "guidance.interval: is upside down"),
        ({"name": "ddim"}, {**CFG, "interval": 0.8}, "guidance.interval: must be a section"),
        ({"name": "ddim"}, {**CFG, "interval": {"lo": 0.8}}, "guidance.interval.lo: diffusion/guidance.py takes no"),
        ({"name": "ddim"}, {**CFG, "scale": "2"}, "guidance.scale: diffusion/guidance.py wants float, got '2'"),
        ({"name": "ddim"}, {**CFG, "negative": {"text": 3}}, "guidance.negative: the model has no condition 'text'"),
        ({"name": "ddim"}, {**CFG, "threshold": {"percentile": 2.0}}, "guidance.threshold.percentile: must be above"),
        ({"name": "ddim"}, {"name": "rescale"}, "guidance.name: rescale goes around guidance: set guidance.rescale"),
        ({"name": "heun"}, {"name": "cfg_pp"}, "guidance.name: cfg_pp takes the noise from elsewhere than x0"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_model_cannot_do_is_refused(drawer_of, sampler, guidance, message):
    with pytest.raises(InputError) as error:
        drawer_of(sampler, guidance)
    assert str(error.value).startswith(message)


def test_guidance_wants_condition_dropout(drawer_of):
    for guidance in (CFG, {"name": "apg", "scale": 3.0}, {"name": "cfg_pp"}):
        with pytest.raises(InputError, match=r"guidance.scale: the model was trained with train.cond_drop_rate = 0"):
            drawer_of({"name": "ddim"}, guidance, cond_drop_rate=0.0)
    for guidance in ({"name": "cfg", "scale": 1.0}, {**CFG, "negative": {"label": 3}}):
        drawer_of({"name": "ddim"}, guidance, cond_drop_rate=0.0)


def test_only_guidance_by_one_is_plain():
    assert is_plain({"name": "cfg", "scale": 1.0}) and is_plain({"name": "apg"})
    assert not is_plain(CFG) and not is_plain({"name": "cfg_pp", "scale": 1.0})


def test_retuning_shares_what_is_compiled(drawer_of, tiny_params):
    """Scale, interval and times are arguments of one compiled function; another number of steps is another."""
    guidance = {**CFG, "interval": {"low": 0.1, "high": 0.9}, "rescale": {"factor": 0.2}}
    first = drawer_of({"name": "ddim"}, guidance)

    def drawn(drawer):
        return drawer(tiny_params, np.arange(4), 4, seed=0)

    base = drawn(first)
    for sampler, other in (
        ({}, {**guidance, "scale": 4.0}),
        ({}, {**guidance, "interval": {"low": 0.6, "high": 0.9}}),
        ({}, {**guidance, "rescale": {"factor": 1.0}}),
        ({"grid": "leading"}, guidance),
    ):
        tuned = first.with_settings(sampler={"name": "ddim", "steps": 4, **sampler}, guidance=other)
        assert abs(drawn(tuned) - base).max() > 1e-4
    assert first.compilations == 1
    drawn(first.with_settings(sampler={"name": "ddim", "steps": 5}, guidance=guidance))
    assert first.compilations == 2


def test_the_mesh_does_not_change_samples(drawer_of, tiny_params):
    """Nor does a batch that is filled up to the devices; the sampler has noise, and a branch."""
    sampler = {"name": "predictor_corrector", "predictor": {"name": "ddim", "eta": 0.5}}
    drawers = [drawer_of(sampler, CFG, mesh=mesh) for mesh in ((1, 1, 1), (4, 2, 1))]
    one, eight = (drawer(tiny_params, np.arange(6), 6, seed=3) for drawer in drawers)
    np.testing.assert_allclose(eight, one, atol=1e-4 * abs(one).max())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--sweep: is empty"),
        ("step=1", "--sweep: 'step=1': wants NAME=value,value"),
        ("steps=1;steps=2", "--sweep: 'steps=2': wants NAME=value,value, each NAME once"),
        ("steps=1,,2", "--sweep: steps has an empty value"),
        ("steps=1;evaluations=2", "--sweep: steps follow from evaluations"),
    ],
)
def test_bad_sweeps_are_refused(text, message):
    with pytest.raises(InputError) as error:
        sampling_sweep.axes(text)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read: Expecting value"),
        ("[]", "must be a list, as in"),
        ("{}", "must be a list, as in"),
        ("[3]", r"no choice \[3\]; one of: sampler, grid"),
        ('[{"steps": 1}, {"step": 2}]', r"no choice \['step'\]; one of: sampler, grid"),
        ('[{"steps": 1, "evaluations": 2}]', "at steps=1 evaluations=2: steps follow from evaluations"),
    ],
)
def test_bad_lists_are_refused(content, message, tmp_path):
    (tmp_path / "points.json").write_text(content)
    with pytest.raises(InputError, match=f"^--sweep: .*{message}"):
        sampling_sweep.points(f"@{tmp_path}/points.json")


def test_a_list_of_points(tmp_path):
    (tmp_path / "points.json").write_text('[{"sampler": "ddim", "steps": 5}, {"guidance": 1.5}]')
    assert sampling_sweep.points(f"@{tmp_path}/points.json") == [{"sampler": "ddim", "steps": "5"}, {"guidance": "1.5"}]
    with pytest.raises(InputError, match=r"^--sweep: /nowhere cannot be read: No such file"):
        sampling_sweep.points("@/nowhere")


def test_the_last_axis_is_the_fastest():
    points = sampling_sweep.points("steps=10, 20;guidance=1,2")
    assert [sampling_sweep.spell(point) for point in points] == [
        "steps=10 guidance=1", "steps=10 guidance=2", "steps=20 guidance=1", "steps=20 guidance=2",
    ]  # fmt: skip
