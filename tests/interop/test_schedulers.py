"""Configurations of diffusers' schedulers can be read and are written back key by key, and what changes the result is
refused if it cannot be followed. With diffusers installed (`make parity`), samples agree."""

import contextlib
import importlib
import importlib.util
import inspect
import itertools
import pathlib
import re
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import fold, normal, sample_keys
from diffusion.core.build import build
from diffusion.interop import other_schedulers, schedulers
from diffusion.pipelines.generator import sampling_times
from diffusion.sampling.guidance import threshold
from diffusion.sampling.loop import bind, sample
from tests.refusals import refused

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING, TRAILING = {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}
KARRAS, SIGMA_MIN = {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
DYNAMIC = {"thresholding": True, "sample_max_value": 1.5}
CONFIGS = {
    "DDIMScheduler": [
        {}, {**ZERO_SNR, **TRAILING, "clip_sample": False}, {**SD, **LEADING, "set_alpha_to_one": False},
        {**DYNAMIC, "clip_sample": False}, {"clip_sample_range": 0.5, "prediction_type": "sample"},
        {"trained_betas": [0.001 * (1 + i) for i in range(20)], "num_train_timesteps": 20},
    ],
    "DDPMScheduler": [
        {}, {"variance_type": "fixed_large", **COSINE}, {"variance_type": "learned_range"},
        {"prediction_type": "sample"}, {**DYNAMIC, "clip_sample": False},
        {"beta_schedule": "sigmoid", "timestep_spacing": "linspace", "clip_sample": False},
    ],
    "PNDMScheduler": [{}, {**SD, **LEADING, "skip_prk_steps": True}, {"set_alpha_to_one": True, **TRAILING}],
    "EulerDiscreteScheduler": [
        {}, {**SD, **LEADING}, {**SD, **LEADING, **KARRAS}, {**TRAILING, "prediction_type": "v_prediction"},
        {"use_exponential_sigmas": True}, {"use_beta_sigmas": True, **SIGMA_MIN},
    ],
    "EulerAncestralDiscreteScheduler": [{}, {**SD, **TRAILING}],
    "HeunDiscreteScheduler": [{"clip_sample": True}, {**KARRAS, **LEADING}],
    "KDPM2DiscreteScheduler": [{}, KARRAS],
    "KDPM2AncestralDiscreteScheduler": [TRAILING],
    "LMSDiscreteScheduler": [{}, {**SD, **KARRAS}],
    "DPMSolverMultistepScheduler": [
        {}, {**SD, **LEADING}, {**TRAILING, "algorithm_type": "sde-dpmsolver++"}, {**KARRAS, **SIGMA_MIN},
        {"algorithm_type": "dpmsolver", "solver_order": 1, **SIGMA_MIN}, {"solver_type": "heun", **DYNAMIC},
        {"use_exponential_sigmas": True, "lower_order_final": False}, {"use_beta_sigmas": True},
    ],
    "DPMSolverSinglestepScheduler": [
        {"lower_order_final": True}, {"solver_order": 3, "solver_type": "heun", "lower_order_final": True, **KARRAS},
        {"algorithm_type": "dpmsolver", **SIGMA_MIN},
    ],
    "UniPCMultistepScheduler": [
        {}, {**SD, **LEADING, "solver_order": 3}, {"solver_type": "bh1", **SIGMA_MIN},
        {"predict_x0": False, **SD, **SIGMA_MIN}, KARRAS,
    ],
    "DEISMultistepScheduler": [{}, {**SD, **LEADING, "solver_order": 3}, KARRAS],
    "SASolverScheduler": [{}, {"algorithm_type": "noise_prediction", **TRAILING, "predictor_order": 3}],
    "LCMScheduler": [{}, {"original_inference_steps": 100, "clip_sample": True, "prediction_type": "v_prediction"}],
    "TCDScheduler": [{}],
    "FlowMatchEulerDiscreteScheduler": [{}, {"shift": 3.0}],
    "FlowMatchHeunDiscreteScheduler": [{"shift": 2.0}],
    "EDMEulerScheduler": [{}, {"prediction_type": "v_prediction", "sigma_schedule": "exponential", **SIGMA_MIN}],
    "EDMDPMSolverMultistepScheduler": [
        {}, {"sigma_max": 40.0, "sigma_data": 1.0, "algorithm_type": "sde-dpmsolver++", **DYNAMIC},
    ],
    "CMStochasticIterativeScheduler": [{}, {"num_train_timesteps": 20, "clip_denoised": False}],
}  # fmt: skip
CASES = [pytest.param(name, config, id=f"{name.removesuffix('Scheduler')}-{i}")
         for name, configs in CONFIGS.items() for i, config in enumerate(configs)]  # fmt: skip
CLASSES = {name: kind.defaults for name, kind in schedulers.CLASSES.items()} | other_schedulers.CLASSES


def outputs_of(config):
    return 2 if config.get("variance_type") == "learned_range" else 1


@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_key_is_written_back(name, config):
    outputs = outputs_of(config)
    sections = schedulers.read({"_class_name": name, **config}, outputs)
    written, exact = schedulers.write(sections, outputs, splits=False)
    assert exact and written.pop("_class_name") == name and written.pop("_diffusers_version")
    assert written == {**CLASSES[name], **config}


def test_defaults_are_those_of_the_class():
    """What is absent differs between classes: clipping, spacing and the betas."""
    ddim, euler = (schedulers.read({"_class_name": name}) for name in ("DDIMScheduler", "EulerDiscreteScheduler"))
    heun = schedulers.read({"_class_name": "HeunDiscreteScheduler"})
    assert ddim["guidance"]["threshold"] == {"percentile": 1.0, "limit": 1.0, "keep_noise": True}
    assert "threshold" not in euler["guidance"]
    assert ddim["sampler"]["grid"] == {"name": "leading", "steps_offset": 0}
    assert euler["sampler"]["grid"] == {"name": "linspace", "rounded": False}
    assert (euler["objective"]["schedule"]["beta_end"], heun["objective"]["schedule"]["beta_end"]) == (0.02, 0.012)


@pytest.mark.parametrize(
    ("name", "config", "timesteps"),
    [
        ("DDIMScheduler", {**SD, **LEADING}, [853, 711, 569, 427, 285, 143, 1]),
        ("EulerDiscreteScheduler", {**SD, **TRAILING}, [999, 749, 499, 249]),
        ("HeunDiscreteScheduler", SD, [999, 499.5, 0]),
        ("DPMSolverMultistepScheduler", SD, [999, 799, 599, 400, 200]),
        ("DPMSolverMultistepScheduler", {**SD, **LEADING}, [831, 665, 499, 333, 167]),
        ("DPMSolverMultistepScheduler", {**SD, **KARRAS}, [999, 786, 427, 59, 0]),  # rounded
        ("LCMScheduler", SD, [999, 759, 499, 259]),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, [999, 856.692, 601.151, 7.929]),  # 1000 sigma - 1
    ],
)
def test_timesteps_are_those_of_diffusers(name, config, timesteps):
    sections = schedulers.read({"_class_name": name, **config})
    schedule = build("schedules", sections["objective"]["schedule"])
    times = sampling_times(schedule, len(timesteps), sections["sampler"]["grid"])
    tolerance = 0.5 if config.get("use_karras_sigmas") else 1e-3
    np.testing.assert_allclose(1000 * times[:-1] - 1, timesteps, atol=tolerance)
    assert times[-1] == 0


@pytest.mark.parametrize(
    ("name", "config", "field"),
    [
        ("ScoreSdeVeScheduler", {}, "_class_name"),
        ("IPNDMScheduler", {}, "_class_name"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "variance_type"),
        ("DDPMScheduler", {"beta_schedule": "exp"}, "beta_schedule"),
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("DDIMScheduler", {"prediction_type": "flow"}, "prediction_type"),
        ("DDIMScheduler", {"timestep_spacing": "even"}, "timestep_spacing"),
        ("DDIMScheduler", {"trained_betas": [0.1]}, "trained_betas"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "last"}, "final_sigmas_type"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("DPMSolverMultistepScheduler", {**COSINE, "lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ("DPMSolverMultistepScheduler", {"euler_at_final": True, **SIGMA_MIN}, "euler_at_final"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "other"}, "algorithm_type"),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector"),
        ("LCMScheduler", {"timestep_scaling": 1.0}, "timestep_scaling"),
        ("TCDScheduler", {"clip_sample": True}, "clip_sample"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("EDMEulerScheduler", {"sigma_schedule": "beta"}, "sigma_schedule"),
        ("CMStochasticIterativeScheduler", {"s_noise": 0.5}, "s_noise"),
    ],
)
def test_what_cannot_be_followed_is_refused(name, config, field):
    with refused(f"scheduler_config.json.{field}"):
        schedulers.read({"_class_name": name, **config})


# Another value of each key, and what else an effect of it depends on.
OTHER = {
    "num_train_timesteps": (50, {}), "beta_start": (0.01, {}), "beta_end": (0.5, {}),
    "beta_schedule": ("scaled_linear", {"beta_schedule": "linear"}), "trained_betas": ([0.1] * 1000, {}),
    "prediction_type": ("v_prediction", {}), "timestep_spacing": ("trailing", {}), "steps_offset": (2, LEADING),
    "thresholding": (True, {}), "dynamic_thresholding_ratio": (0.9, {}), "sample_max_value": (2.0, {}),
    "clip_sample_range": (2.0, {}),
    "original_inference_steps": (25, {}), "timestep_scaling": (1.0, {}), "final_sigmas_type": ("sigma_min", {}),
    "solver_order": (1, {}), "predictor_order": (1, {}), "corrector_order": (1, {}), "flow_shift": (2.0, {}),
    "lambda_min_clipped": (-1e3, {}), "interpolation_type": ("log_linear", {}), "timestep_type": ("continuous", {}),
    "sigma_min": (0.1, {}), "sigma_max": (9.0, {}), "sigma_data": (1.0, {}), "rho": (3.0, {}), "s_noise": (0.5, {}),
    "sigma_schedule": ("exponential", {}), "shift": (3.0, {}), "shift_terminal": (0.1, {}), "base_shift": (1.0, {}),
    "max_shift": (2.0, {}), "base_image_seq_len": (2, {}), "max_image_seq_len": (9, {}), "solver_p": ("euler", {}),
    "time_shift_type": ("linear", {}), "tau_func": ("other", {}), "disable_corrector": ([0], {}),
}  # fmt: skip
OTHER_TYPE = {"DPMSolverMultistepScheduler": "dpmsolver", "DPMSolverSinglestepScheduler": "dpmsolver",
              "SASolverScheduler": "noise_prediction", "EDMDPMSolverMultistepScheduler": "sde-dpmsolver++",
              "DEISMultistepScheduler": "other"}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, defaults in CLASSES.items() for key in defaults])
def test_another_value_has_the_effect_that_is_said(name, key):
    value, base = OTHER.get(key, (not CLASSES[name][key], {}))
    if key == "algorithm_type":
        value, base = OTHER_TYPE[name], {} if name.startswith("EDM") else SIGMA_MIN
    if key == "solver_type":
        value = {"UniPCMultistepScheduler": "bh1", "DEISMultistepScheduler": "other"}.get(name, "heun")
    if key == "variance_type":
        value = "fixed_large" if name == "DDPMScheduler" else "learned_range"
    if key == "predict_x0" or (key == "lower_order_final" and name == "DPMSolverSinglestepScheduler"):
        base = SIGMA_MIN
    what = schedulers.treatment(name)[key]
    if what == "read" and key in ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"):
        base = {"clip_sample": True} if key.startswith("clip") else {"thresholding": True}
    if what == "default":
        with refused(f"scheduler_config.json.{key}"):
            schedulers.read({"_class_name": name, **base, key: value})
        return
    before, after = (schedulers.read({"_class_name": name, **base, **more}) for more in ({}, {key: value}))
    assert (before == after) == (what == "ignored")


def test_every_key_is_in_the_table_of_the_documentation():
    words = {"read": "read", "no effect": "ignored", "default only": "default"}
    lines = (pathlib.Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8").splitlines()
    begin = lines.index("| key | classes | what becomes of it |") + 2
    general, special = {}, {}
    for line in itertools.takewhile(bool, lines[begin:]):
        keys, classes, text = (part.strip() for part in line.strip("|").split("|"))
        what = words[re.match("|".join(words), text)[0]]
        for key in re.findall(r"`(\w+)`", keys):
            names = re.findall(r"`(\w+)`", classes)
            new = {(f"{name}Scheduler", key): what for name in names} if names else {key: what}
            table = special if names else general
            assert not table.keys() & new.keys(), line
            table |= new
    expected = {(name, key): what for name in CLASSES for key, what in schedulers.treatment(name).items()}
    assert special.keys() <= expected.keys() and general.keys() <= {key for _, key in expected}
    assert {place: special.get(place, general.get(place[1])) for place in expected} == expected


def test_entries_that_no_class_has_are_named(caplog):
    schedulers.read({"_class_name": "DDIMScheduler", "_diffusers_version": "0", "skip_prk_steps": True})
    assert not caplog.records
    schedulers.read({"_class_name": "DDIMScheduler", "skip_prk": True})
    schedulers.read({"_class_name": "EDMEulerScheduler", "use_rho": True})
    assert [record.args[1] for record in caplog.records] == ["skip_prk", "use_rho"]


def test_keys_of_other_classes_are_ignored():
    plain = schedulers.read({"_class_name": "EulerDiscreteScheduler"})
    assert schedulers.read({"_class_name": "EulerDiscreteScheduler", "clip_sample": True, "skip_prk_steps": 1}) == plain


@pytest.mark.parametrize(
    ("sections", "splits", "expected"),
    [
        ({"sampler": {"name": "rk45"}}, False, "DDPMScheduler"),
        ({"sampler": {"name": "ddim", "grid": "karras"}}, True, "DDIMScheduler"),
        ({"sampler": {"name": "ddim", "eta": 0.5, "grid": "leading"}}, False, "DDPMScheduler"),
        ({"sampler": {"name": "unipc"}, "guidance": {"threshold": {"limit": 2.0}}}, False, "UniPCMultistepScheduler"),
    ],
)
def test_samplers_that_diffusers_lacks_become_a_usual_one(sections, splits, expected):
    objective = {"name": "denoising", "parameterization": {"name": "eps", "c_noise": "index"}}
    written, exact = schedulers.write({"objective": objective, **sections}, 1, splits=splits)
    assert written["_class_name"] == expected and not exact


# Comparison with diffusers.

peer = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
BATCH, SHAPE = 2, (2, 2, 3)


@pytest.mark.peers
@peer
@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_diffusers(name):
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    expected = {key: p.default for key, p in parameters.items() if key != "self"}
    assert CLASSES[name] == {key: expected[key] for key in CLASSES[name]} and expected.keys() == CLASSES[name].keys()


def network(numpy, x, label, outputs, axis):
    """Stands for a network: a smooth function of x and the noise label."""
    out = x * numpy.sin(label / 640) + 0.1 * numpy.sin(2 * x + label / 300)
    return out if outputs == 1 else numpy.concatenate([out, 0.3 * numpy.cos(x)], axis)


def native_samples(sections, steps, noise, keys, outputs):
    objective = build("objectives", sections["objective"])
    options = {key: value for key, value in sections["sampler"].items() if key not in ("steps", "grid")}
    times = sampling_times(objective.schedule, steps, sections["sampler"]["grid"])

    def apply(params, x, c_noise, cond, *, key=None):
        return network(jnp, x, c_noise.reshape(-1, 1, 1, 1), outputs, -1)

    denoise = objective.denoiser(apply, {"net": {}})
    if sections["guidance"].get("threshold"):
        denoise = threshold(denoise, **sections["guidance"]["threshold"])
    start = noise * np.asarray(objective.schedule.sigma(times[0]))
    x = sample(bind(denoise, {}), objective.schedule, build("samplers", options), start, times, keys)
    alpha = [float(objective.schedule.alpha(t)) for t in (times[0], times[-1])]
    return start, np.asarray(x), alpha


def peer_samples(name, config, steps, start, alpha, keys, outputs):
    import diffusers
    import torch

    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        kind = getattr(diffusers, name)
        scheduler = kind(**config)
        draws = (torch.tensor(np.array(normal(fold(keys, i + 1), SHAPE)).transpose(0, 3, 1, 2)) for i in range(1000))
        module = importlib.import_module(kind.__module__)
        draw = lambda *args, **kwargs: next(draws)  # noqa: E731
        stack.enter_context(mock.patch.object(module, "randn_tensor", draw, create=True))
        scheduler.set_timesteps(steps)
        if any(value is True for key, value in config.items() if key.startswith("use_")):
            # Some of the classes round the noise label, but not the noise level.
            table = np.log(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).numpy() ** 0.5)
            levels = scheduler.sigmas[: len(scheduler.timesteps)].numpy().copy()
            if name.startswith("KDPM2"):
                levels[1::2] = scheduler.sigmas_interpol[1 : len(levels) : 2]
            scheduler.timesteps = torch.tensor(np.array([scheduler._sigma_to_t(sigma, table) for sigma in levels]))
            scheduler.set_begin_index(0)
        scaled = name.startswith(("Euler", "Heun", "KDPM2", "LMS"))
        x = torch.tensor((start / (alpha[0] if scaled else 1)).transpose(0, 3, 1, 2))
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            out = network(np, inputs.numpy(), float(t), outputs, 1).astype(np.float32)
            x = scheduler.step(torch.tensor(out), t, x)[0]
    return x.numpy().transpose(0, 2, 3, 1) * (alpha[1] if scaled else 1)


@pytest.mark.peers
@peer
@pytest.mark.parametrize(("name", "config"), CASES)
def test_samples_agree(name, config, steps=10):
    outputs = outputs_of(config)
    keys = sample_keys(jax.random.key(0), jnp.arange(BATCH))
    noise = np.random.default_rng(1).normal(size=(BATCH, *SHAPE)).astype(np.float32)
    sections = schedulers.read({"_class_name": name, **config}, outputs)
    start, x, alpha = native_samples(sections, steps, noise, keys, outputs)
    expected = peer_samples(name, config, steps, start, alpha, keys, outputs)
    np.testing.assert_allclose(x, expected, atol=1e-4 * max(1, abs(expected).max()))
