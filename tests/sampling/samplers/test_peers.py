"""Compares samplers and grids with diffusers' schedulers in further cases, whose results are not stored.

It requires requirements-peers.txt; `make parity` installs it.
"""

import importlib.util
import itertools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, find
from diffusion.sampling.guidance import threshold
from diffusion.sampling.loop import bind, invert
from tests.golden.schedulers import BETAS, MULTI, ORACLE, SINGLE, UNIPC, Case, run_peer
from tests.sampling.samplers.test_golden import TOLERANCE, ours

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
SPACINGS = ("trailing", "leading")
STEPS = (1, 5, 10, 25)
PEER = {"dpm_solver": MULTI, "dpm_solver_pp": MULTI, "unipc": UNIPC, "deis": "DEISMultistepScheduler",
        "sa_solver": "SASolverScheduler"}  # fmt: skip


def vp(label, sampler, peer, steps, options, levels="ratio", betas="scaled_linear", **fields):
    schedule, options = {"name": "vp", "betas": betas}, {**BETAS[betas], **options}
    return Case(f"{label}-{steps}", schedule, sampler, steps, peer, options, levels, **fields)


def to_the_lowest_level():
    """Yields cases that end at the lowest point of the table, with and without lower orders at the end."""
    for steps, spacing, lower in itertools.product(STEPS, SPACINGS, (True, False)):
        # With `leading` and an offset of 1 the last step begins just above the lowest point.
        common = {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading"), "lower_order_final": lower}

        def case(name, options, lower=lower, spacing=spacing, steps=steps, common=common, **theirs):
            label = f"{name}-{'-'.join(map(str, options.values()))}-{spacing}-{lower}"
            sampler = {"name": name, **options, "lower_order_final": lower}
            return vp(label, sampler, PEER[name], steps, {**common, **theirs})

        for order, kind in itertools.product((1, 2), ("midpoint", "heun")):
            options = {"order": order, "solver_type": kind}
            theirs = {"solver_order": order, "solver_type": kind, **TO_SIGMA_MIN}
            yield case("dpm_solver", {**options, "sde": True, "singlestep": False}, **theirs,
                       algorithm_type="sde-dpmsolver")  # fmt: skip
            yield case("dpm_solver_pp", {**options, "sde": True}, **theirs, algorithm_type="sde-dpmsolver++")
        for order, variant, prediction in itertools.product((1, 2, 3), ("bh1", "bh2"), ("x0", "eps")):
            yield case("unipc", {"order": order, "variant": variant, "prediction": prediction}, solver_order=order,
                       solver_type=variant, predict_x0=prediction == "x0", **TO_SIGMA_MIN)  # fmt: skip
        for order in (1, 2, 3):
            yield case("deis", {"order": order}, solver_order=order)
        for order, corrector, prediction in itertools.product((1, 2, 3, 4), (2, 3, 4), ("x0", "eps")):
            options = {"predictor_order": order, "corrector_order": corrector}
            kind = {"x0": "data_prediction", "eps": "noise_prediction"}[prediction]
            for tau in (0.0, 0.6, 1.0):
                ours = {**options, "tau": tau, "low": 0.0, "high": 1.0, "prediction": prediction}
                yield case("sa_solver", ours, **options, algorithm_type=kind, tau_func=lambda t, tau=tau: tau)


def singlestep():
    """Yields cases whose inner points lie on the grid, as those of the peer always do."""
    for steps, order, kind, lower in itertools.product((9, 10, 11, 24), (2, 3), ("midpoint", "heun"), (True, False)):
        for label, name, theirs, sde in (
            ("pp", "dpm_solver_pp", {"algorithm_type": "dpmsolver++"}, False),
            ("pp-end", "dpm_solver_pp", {"algorithm_type": "dpmsolver++", **TO_SIGMA_MIN}, False),
            ("pp-sde", "dpm_solver_pp", {"algorithm_type": "sde-dpmsolver++", **TO_SIGMA_MIN}, True),
            ("eps", "dpm_solver", {"algorithm_type": "dpmsolver", **TO_SIGMA_MIN}, False),
        ):
            sampler = {"name": name, "order": order, "solver_type": kind, "singlestep": True, "sde": sde,
                       "inner_points": "grid", "lower_order_final": lower}  # fmt: skip
            options = {**theirs, "solver_order": order, "solver_type": kind, "lower_order_final": lower}
            yield vp(f"{label}-{order}-{kind}-{lower}", sampler, SINGLE, steps, options)


def others():
    for steps, spacing in itertools.product(STEPS, SPACINGS):
        options = {"timestep_spacing": spacing}
        yield vp(f"dpm_solver_pp_sde-{spacing}", {"name": "dpm_solver_pp_sde"}, "DPMSolverSDEScheduler", steps, options,
                 "scaled")  # fmt: skip
    for steps, gamma in itertools.product((1, 4, 8), (0.0, 0.3, 0.5, 1.0)):
        yield vp(f"tcd-{gamma}", {"name": "tcd", "gamma": gamma}, "TCDScheduler", steps, {}, "table",
                 step={"eta": gamma})  # fmt: skip
    for steps in STEPS:
        # At t = 1 the peer's x0 is 0, whatever the model returns, so it starts just below.
        betas = np.sin(np.linspace(0.98, 0, steps + 1) * np.pi / 2).tolist()
        yield Case(f"ipndm-{steps}", {"name": "trig"}, {"name": "ipndm"}, steps, "IPNDMScheduler",
                   {"trained_betas": betas}, "trig")  # fmt: skip
    for steps, eta, spacing in itertools.product(STEPS, (0.0, 0.7, 1.0), SPACINGS):
        for label, options, clipping in (
            ("clip", {}, {"limit": 1.0}),
            ("range", {"clip_sample_range": 0.6}, {"limit": 0.6}),
            ("static", {"thresholding": True, "dynamic_thresholding_ratio": 0.9}, {"percentile": 0.9,
                                                                                   "sample_max_value": 1.0}),
            ("dynamic", {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.3},
             {"percentile": 0.9, "sample_max_value": 1.3}),
        ):  # fmt: skip
            for kept in (True, False):
                step = {"eta": eta, "use_clipped_model_output": not kept}
                options = {"set_alpha_to_one": True, "timestep_spacing": spacing, **options}
                yield vp(f"ddim-{label}-{kept}-{eta}-{spacing}", {"name": "ddim", "eta": eta}, "DDIMScheduler", steps,
                         options, "table", step=step, threshold={**clipping, "keep_noise": kept})  # fmt: skip


# A part of each matrix, whose stride has no factor in common with the numbers of options.
PARTS = {to_the_lowest_level: 29, singlestep: 7, others: 5}
CASES = [case for cases, stride in PARTS.items() for case in itertools.islice(cases(), 0, None, stride)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peer(case, x64):
    peer = run_peer(case)
    found = ours(case, peer["times"], peer["start"])
    if case.name.startswith("pp-sde-3-heun"):
        assert abs(found - peer["x"]).max() > 1e-3 * abs(peer["x"]).max()
        with mended_third_order():
            peer = run_peer(case)
    np.testing.assert_allclose(found, peer["x"], atol=TOLERANCE * abs(peer["x"]).max())


def mended_third_order():
    """Adds the missing term to the third-order singlestep update of the SDE.

    With H = 2h, the weight of the second derivative in units of the step is the integral over the step of
    H e^(-H (1 - tau)) tau^2 / 2, which is (1 - e^-H) / H^2 - 1 / H + 1/2. The peer subtracts the 1/2.
    """
    from diffusers import DPMSolverSinglestepScheduler as Peer

    name = "singlestep_dpm_solver_third_order_update"
    wrong = getattr(Peer, name)

    def mended(self, values, **keywords):
        levels = np.array([float(level) for level in self.sigmas[self.step_index - 2 : self.step_index + 2]])
        place = -np.log(levels)
        first, second, _ = (place[1:] - place[0]) / (place[3] - place[0])
        slopes = (values[-2] - values[-3]) / first, (values[-1] - values[-3]) / second
        curvature = 2 * (slopes[1] - slopes[0]) / (second - first)
        return wrong(self, values, **keywords) + curvature / (1 + levels[3] ** 2) ** 0.5

    return mock.patch.object(Peer, name, mended)


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("clip", [False, True])
def test_inversion(steps, clip, x64):
    """Each step of the peer has the exact noise at its own level, but for the first, which has that of its end."""
    import torch
    from diffusers import DDIMInverseScheduler

    schedule = build("schedules", {"name": "vp", "betas": "scaled_linear"})
    peer = DDIMInverseScheduler(**BETAS["scaled_linear"], clip_sample=clip, set_alpha_to_one=True)
    peer.alphas_cumprod = torch.tensor(np.asarray(schedule.alpha(jnp.arange(1, 1001) / 1000) ** 2))
    peer.set_timesteps(steps)
    x0 = 0.3 * np.random.default_rng(0).normal(size=(8, 2))
    x, times, denoise = torch.tensor(x0), [0.0], ORACLE.denoiser(schedule)
    for step in peer.timesteps.tolist():
        t = times[-1] or (step + 1) / 1000
        alpha, sigma = (float(a) for a in (schedule.alpha(jnp.float64(t)), schedule.sigma(jnp.float64(t))))
        eps = (x.numpy() - alpha * np.asarray(denoise(jnp.asarray(x.numpy()), jnp.float64(t)).x0)) / sigma
        x = peer.step(torch.tensor(eps), step, x).prev_sample
        times.append((step + 1) / 1000)

    model = bind(threshold(lambda x, t, cond: denoise(x, t), keep_noise=True), {}) if clip else denoise
    found = invert(model, schedule, build("samplers", "ddim"), jnp.asarray(x0), jnp.array(times[::-1]), from_data=True)
    np.testing.assert_allclose(found, x, atol=TOLERANCE * abs(x.numpy()).max())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_preconditioning(prediction, x64):
    import torch
    from diffusers import EDMEulerScheduler

    schedule, t = build("schedules", "edm"), jnp.array([0.001, 0.02, 0.9])
    x, output = np.random.default_rng(0).normal(size=(2, 3, 2))
    spec = {"name": "edm", "sigma_data": 0.7, "negative": prediction == "v_prediction"}
    coefficients = build("parameterization", spec)(schedule, t)
    peer, sigma = EDMEulerScheduler(sigma_data=0.7, prediction_type=prediction), np.asarray(schedule.sigma(t))
    expected = peer.precondition_outputs(torch.tensor(x), torch.tensor(output), torch.tensor(sigma[:, None]))
    np.testing.assert_allclose(coefficients.to_x0(output, x), expected, rtol=1e-12)
    np.testing.assert_allclose(coefficients.c_noise, peer.precondition_noise(torch.tensor(sigma)), rtol=1e-12)


GRIDS = [
    ("beta_sigmas", {}, "EulerDiscreteScheduler", {"use_beta_sigmas": True, "timestep_spacing": "linspace"}),
    ("beta_sigmas", {}, MULTI, {"use_beta_sigmas": True}),
    ("karras", {}, "EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "linspace"}),
    ("leading", {"steps_offset": 1}, "EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("lattice", {"points": 50}, "LCMScheduler", {}),
    ("lattice", {"points": 30}, "TCDScheduler", {"original_inference_steps": 30}),
    ("to_sigma_min", {"grid": "trailing"}, UNIPC, {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}),
]


@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize(("name", "keywords", "peer", "options"), GRIDS)
def test_grid(name, keywords, peer, options, steps, x64):
    """The levels of re-spaced grids lie between those of the first and the last point that the peer selects."""
    import diffusers

    schedule = build("schedules", {"name": "vp", "betas": "scaled_linear"})
    scheduler = getattr(diffusers, peer)(**BETAS["scaled_linear"], **options)
    scheduler.set_timesteps(steps)
    if name == "lattice":
        times = find("grids", name, field="")(schedule, steps, **keywords)
        np.testing.assert_allclose(1000 * times[:-1] - 1, scheduler.timesteps, atol=1e-6)
        return
    sigmas = np.asarray(scheduler.sigmas, np.float64)[: steps + 1]
    if name in ("beta_sigmas", "karras"):
        keywords = {**keywords, "sigma_min": sigmas[-2], "sigma_max": sigmas[0] * (1 - 1e-6)}
    times = jnp.asarray(find("grids", name, field="")(schedule, steps, **keywords))
    np.testing.assert_allclose(np.exp(-schedule.log_snr(times) / 2), sigmas, rtol=1e-4, atol=1e-12)
