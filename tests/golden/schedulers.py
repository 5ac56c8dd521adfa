"""Reference results of diffusers' schedulers ("peers") for a model in closed form, to which the samplers are compared.

    python -m tests.golden.schedulers       (requires requirements-peers.txt)

writes `schedulers.npz` next to this file. `CASES` and `lcm_scalings` require neither torch nor diffusers.

Only the update of a peer is compared. It receives the exact x0 at the noise level that its update uses, even if it
would pass a rounded timestep to a network; float32 is replaced by float64; and the stored runs end at sigma = 0. Other
deviations from the normal use of a peer are stated in its case.
"""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import pathlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import fold, normal, sample_keys
from diffusion.core.build import build
from diffusion.process.analytic import Mixture
from diffusion.sampling.ode.brownian import path_noise

PATH = pathlib.Path(__file__).with_suffix(".npz")
ORACLE = Mixture([[1, 0.5], [-1, 0.2], [0.2, -1]], [0.3, 0.2, 0.4], [0.5, 0.3, 0.2])
BATCH, TABLE = 8, 1000
NEARLY_ZERO = 1e-12  # value of sigma / alpha


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One run of a peer, and the equivalent sampler of this project.

    Attributes:
      name: Prefix of the keys in the file, `"<name>/times"` and so on.
      schedule, sampler: Specs for `build`.
      steps: Number of steps of this project's sampler.
      peer, options: The class in diffusers, and its keywords.
      levels: What the peer iterates over. `table`: indices of the table of betas. `ratio`: sigma / alpha. `scaled`:
        sigma / alpha, with x / alpha in place of x. `flow`: sigma = 1 - alpha, and the model predicts the velocity.
        `edm`: sigma with alpha = 1, and the model predicts EDM's raw F. `trig`: sigma on the circle, and the model
        predicts v.
      step: Further keywords of the peer's `step`.
      nearly_zero: Whether the peer's last step ends at `NEARLY_ZERO`, because at sigma = 0 it would divide 0 by 0 or
        multiply 0 by infinity.
      first_order_end: Whether the peer is forced to take its last step, to sigma = 0, at first order instead of at full
        order.
      peer_halves_second_derivative: Whether the peer's third-order multistep update contains only half of the correct
        second derivative of x0 (or of the noise) in log(alpha / sigma), which makes it second order. "/x" is its result
        as it is; "/mended" is its result with the other half added, as from a correct solver.
      threshold: Keywords of `threshold` that are equivalent to the peer's clipping of x0.
      lcm_boundary: Whether the peer uses c_out x0 + c_skip x as the model's x0; see `lcm_scalings`.
    """

    name: str
    schedule: Mapping[str, Any]
    sampler: Mapping[str, Any]
    steps: int
    peer: str
    options: Mapping[str, Any]
    levels: Literal["table", "ratio", "scaled", "flow", "edm", "trig"]
    step: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nearly_zero: bool = False
    first_order_end: bool = False
    peer_halves_second_derivative: bool = False
    threshold: Mapping[str, Any] | None = None
    lcm_boundary: bool = False


BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
# Peers that iterate over a list of sigmas work with any of the three spacings. The last cosine beta is 0.999. Solvers
# that use the noise and start there are far from the data after so few steps, so some start at a slightly lower level.
ANY = {"linear": "linspace", "scaled_linear": "leading", "cosine": "trailing"}
LOWER = {"linear": "trailing", "scaled_linear": "linspace", "cosine": "leading"}
# DDIM and PNDM always step by T // steps, so they are consistent only with timesteps that have the same spacing.
EVEN = {"linear": "trailing", "scaled_linear": "leading", "cosine": "trailing"}
EVEN_LOWER = {**EVEN, "cosine": "leading"}
# DDPM adds noise with the full variance beta in a last step that does not start at index 0.
FROM_ZERO = {"linear": "linspace", "scaled_linear": "leading", "cosine": "leading"}
NONE = dict.fromkeys(BETAS)

KARRAS = {"use_karras_sigmas": True}
EXPONENTIAL = {"use_exponential_sigmas": True}  # evenly spaced in log(sigma / alpha)
# The noise-prediction forms do not accept final_sigmas_type="zero"; euler_at_final has the same effect.
NOISE_FORM = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
NOISE_MULTI = {**NOISE_FORM, "euler_at_final": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
MULTI, SINGLE, UNIPC = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
HALVES = {"peer_halves_second_derivative": True}


def _vp_cases() -> Iterator[Case]:
    def cases(label, sampler, peer, options, levels, spacing, all_steps=(10, 25), **fields) -> Iterator[Case]:
        for betas, where in spacing.items():
            given = {**BETAS[betas], **options, **({"timestep_spacing": where} if where else {})}
            for steps in all_steps:
                name, schedule = f"{label}-{betas}-{steps}", {"name": "vp", "betas": betas}
                yield Case(name, schedule, sampler, steps, peer, given, levels, **fields)

    ddim = {"clip_sample": False, "set_alpha_to_one": True}
    yield from cases("ddim", {"name": "ddim", "eta": 0.0}, "DDIMScheduler", ddim, "table", EVEN)
    noisy = {"name": "ddim", "eta": 0.7}
    yield from cases("ddim-noisy", noisy, "DDIMScheduler", ddim, "table", EVEN, step={"eta": 0.7})
    for variance, theirs in (("beta_tilde", "fixed_small"), ("beta", "fixed_large")):
        ddpm = {"clip_sample": False, "variance_type": theirs}
        sampler = {"name": "ancestral", "variance": variance}
        yield from cases(f"ddpm-{variance}", sampler, "DDPMScheduler", ddpm, "table", FROM_ZERO)

    for name, peer, spacing in (
        ("euler", "EulerDiscreteScheduler", ANY),
        ("heun", "HeunDiscreteScheduler", LOWER),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", ANY),
        ("dpm2", "KDPM2DiscreteScheduler", LOWER),
        ("dpm2_ancestral", "KDPM2AncestralDiscreteScheduler", LOWER),
        ("lms", "LMSDiscreteScheduler", ANY),
    ):
        yield from cases(name, {"name": name}, peer, {}, "scaled", spacing)
        if name in ("euler", "heun"):
            yield from cases(f"{name}-karras", {"name": name}, peer, KARRAS, "scaled", LOWER)

    plus = {"name": "dpm_solver_pp"}
    for label, ours, theirs in (
        ("", {}, {}),
        ("-karras", {}, KARRAS),
        ("-heun", {"solver_type": "heun"}, {"solver_type": "heun"}),
        ("-sde", {"sde": True}, SDE),
    ):
        sampler, options = {**plus, "order": 2, **ours}, {"solver_order": 2, **theirs}
        yield from cases(f"dpm_solver_pp-2m{label}", sampler, MULTI, options, "ratio", ANY)
    for label, ours, theirs in (("", {}, {}), ("-sde", {"sde": True}, SDE)):
        sampler, options = {**plus, "order": 3, **ours}, {"solver_order": 3, **theirs}
        yield from cases(f"dpm_solver_pp-3m{label}", sampler, MULTI, options, "ratio", ANY, **HALVES)
    for order in (2, 3):
        sampler = {"name": "dpm_solver", "order": order, "singlestep": False}
        options, fields = {"solver_order": order, **NOISE_MULTI}, HALVES if order == 3 else {}
        yield from cases(f"dpm_solver-{order}m", sampler, MULTI, options, "ratio", ANY, nearly_zero=True, **fields)
    # The inner points of a singlestep solver are grid points in the peer, and equal parts of the step in the paper.
    # Both agree on a grid that is evenly spaced in log(sigma / alpha). On other grids the peer's "midpoint" of order 3
    # is not of third order, because it requires its last inner point at 2/3.
    for order, kind in ((2, "midpoint"), (3, "midpoint"), (3, "heun")):
        # Divided by 3, the steps 10, 11 and 12 have all remainders.
        steps, label = ((10, 25), "s") if order == 2 else ((10, 11, 12, 25), f"s-{kind}")
        options = {"solver_order": order, "solver_type": kind, "lower_order_final": True, **EXPONENTIAL}
        sampler = {**plus, "order": order, "singlestep": True, "solver_type": kind}
        yield from cases(f"dpm_solver_pp-{order}{label}", sampler, SINGLE, options, "ratio", NONE, steps)
        options, sampler = {**options, **NOISE_FORM}, {**sampler, "name": "dpm_solver"}
        yield from cases(f"dpm_solver-{order}{label}", sampler, SINGLE, options, "ratio", NONE, nearly_zero=True)

    for order in (1, 2, 3):
        for variant in ("bh1", "bh2"):
            sampler = {"name": "unipc", "order": order, "variant": variant}
            options = {"solver_order": order, "solver_type": variant, "lower_order_final": True}
            fields = {"nearly_zero": variant == "bh1"}  # the peer multiplies 0 by B(h) = h, which is infinite
            yield from cases(f"unipc-{order}-{variant}", sampler, UNIPC, options, "ratio", ANY, **fields)
    sampler = {"name": "unipc", "order": 2, "variant": "bh2", "prediction": "eps"}
    options = {"solver_order": 2, "solver_type": "bh2", "lower_order_final": True, "predict_x0": False}
    yield from cases("unipc-2-bh2-eps", sampler, UNIPC, options, "ratio", LOWER, nearly_zero=True)
    for order in (2, 3):
        sampler, options = {"name": "deis", "order": order}, {"solver_order": order}
        fields = {"nearly_zero": True, "first_order_end": True}
        yield from cases(f"deis-{order}", sampler, "DEISMultistepScheduler", options, "ratio", ANY, **fields)

    # With r = T // steps and the first index a, the model is evaluated at a, a-r, a-r, a-2r, a-3r, ...: steps + 1
    # times, with two evaluations in the first step. With Runge-Kutta it is evaluated at a, a-r/2, a-r/2, a-r; a-r,
    # a-3r/2, a-3r/2, a-2r; a-2r, a-5r/2, a-5r/2, a-3r; and a-3r, a-4r, ...: steps + 9 times, with four evaluations in
    # each of the first three steps.
    for label, ours, skip in (("", {}, True), ("-prk", {"prk": True}, False)):
        options = {"skip_prk_steps": skip, "set_alpha_to_one": True}
        yield from cases(f"pndm{label}", {"name": "pndm", **ours}, "PNDMScheduler", options, "table", EVEN_LOWER)
    options = {"original_inference_steps": 50}
    yield from cases("lcm", {"name": "lcm"}, "LCMScheduler", options, "table", NONE, (4, 8), lcm_boundary=True)


def _other_cases() -> Iterator[Case]:
    for steps in (10, 25):
        # Both flow peers shift their last sigma twice, which affects only the grid.
        for shift in (1.0, 3.0):
            for name, peer in (
                ("euler", "FlowMatchEulerDiscreteScheduler"),
                ("heun", "FlowMatchHeunDiscreteScheduler"),
            ):
                label = f"flow-{name}-{shift:g}-{steps}"
                yield Case(label, {"name": "flow"}, {"name": name}, steps, peer, {"shift": shift}, "flow")
        peer = "EDMEulerScheduler"
        yield Case(f"edm-euler-{steps}", {"name": "edm"}, {"name": "euler"}, steps, peer, {}, "edm")
        peer = "EDMDPMSolverMultistepScheduler"
        for label, order, ours, theirs in (("", 2, {}, {}), ("", 3, {}, {}), ("-sde", 2, {"sde": True}, SDE)):
            sampler, options = {"name": "dpm_solver_pp", "order": order, **ours}, {"solver_order": order, **theirs}
            name, fields = f"edm-dpm_solver_pp-{order}m{label}-{steps}", HALVES if order == 3 else {}
            yield Case(name, {"name": "edm"}, sampler, steps, peer, options, "edm", **fields)


CASES = (*_vp_cases(), *_other_cases())


def lcm_scalings(t):
    """Returns (c_skip, c_out) of the peer's LCM at times t; the peer computes them from the index into the table."""
    scaled = 10 * (t * TABLE - 1)
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5


def run_peer(case: Case) -> dict[str, np.ndarray]:
    """Runs a peer and returns its results in this project's conventions, in float64.

    Returns:
      `times [steps + 1]`, `start [8, 2]`, `x [8, 2]`, and `mended [8, 2]` if the peer halves the second derivative.
    """
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers deprecates the noise-prediction forms
        result = _run(case)
        if case.peer_halves_second_derivative:
            result["mended"] = _run(case, mend=True)["x"]
    return result


@functools.cache
def _module(peer: str) -> types.ModuleType:
    """Returns the module of a peer."""
    import diffusers

    if peer != "DPMSolverSDEScheduler":
        return importlib.import_module(getattr(diffusers, peer).__module__)
    # It requires torchsde for its noise alone, which `_path_noise` replaces.
    with mock.patch.dict(sys.modules, torchsde=types.ModuleType("torchsde")):
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")


def _run(case: Case, mend: bool = False) -> dict[str, np.ndarray]:
    import torch

    with _in_float64(case):
        scheduler = getattr(_module(case.peer), case.peer)(**case.options)
        scheduler.set_timesteps(case.steps)
        if case.levels != "table":
            scheduler.set_begin_index(0)
            scheduler.is_scale_input_called = True  # x is already scaled
        if case.nearly_zero:
            scheduler.sigmas[-1] = NEARLY_ZERO
        if mend:
            _mend_third_order(scheduler)
        if case.threshold:
            dynamic = scheduler._threshold_sample  # which requires three axes
            scheduler._threshold_sample = lambda x: dynamic(x[..., None])[..., 0]
        if case.peer == "DPMSolverSDEScheduler":
            scheduler.noise_sampler = _path_noise(build("schedules", case.schedule))

        grid = _grid(case, scheduler)
        alpha, sigma = _alpha_sigma(case, grid[0])
        start = sigma * np.random.default_rng(0).normal(size=(BATCH, 2))
        scaled = case.levels == "scaled"
        x = torch.tensor(start / alpha if scaled else start)
        for k, timestep in enumerate(scheduler.timesteps):
            if case.first_order_end and k == len(scheduler.timesteps) - 1:
                scheduler.lower_order_nums = 0  # discards the history
            alpha, sigma = _alpha_sigma(case, _level(case, scheduler, k))
            output = _network(case, x.numpy() * (alpha if scaled else 1), alpha, sigma)
            x = scheduler.step(torch.tensor(output), timestep, x, **case.step).prev_sample
        assert x.dtype == torch.float64
    return {"times": _times(case, grid), "start": start, "x": x.numpy()}


def _grid(case: Case, scheduler) -> np.ndarray:
    """Returns the levels at which this project's steps begin, and the last one's end, `[steps + 1]`."""
    if case.levels == "trig":
        return scheduler.betas.numpy()
    if case.levels == "table":
        # PNDM has several `timesteps` per step, but one of the increasing `_timesteps` per step.
        indices = scheduler._timesteps[::-1] if case.peer == "PNDMScheduler" else scheduler.timesteps.numpy()
        end = _ratio(scheduler, 0) if case.peer == "TCDScheduler" else 0
        return np.array([*(_ratio(scheduler, index) for index in indices), end])
    sigmas = scheduler.sigmas.numpy()
    if scheduler.order == 2:  # all but the first appear twice
        sigmas = np.append(sigmas[0], sigmas[1::2])
    return np.append(sigmas[: case.steps], 0 if case.nearly_zero else sigmas[case.steps])


def _level(case: Case, scheduler, k: int) -> float:
    """Returns the level of the peer's k-th update."""
    if case.levels == "table":
        return _ratio(scheduler, scheduler.timesteps[k])
    if case.peer.startswith("KDPM2") and not scheduler.state_in_first_order:
        return float(scheduler.sigmas_interpol[k - ("Ancestral" in case.peer)])
    if case.peer == "DPMSolverSDEScheduler" and not scheduler.state_in_first_order:
        return float(scheduler.mid_point_sigma)
    if case.levels == "trig":
        return float(scheduler.betas[k])
    return float(scheduler.sigmas[k])


def _ratio(scheduler, index: int) -> float:
    alpha_bar = float(scheduler.alphas_cumprod[index])
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def _alpha_sigma(case: Case, level: float) -> tuple[float, float]:
    if case.levels == "flow":
        return 1 - level, level
    if case.levels == "trig":
        return (1 - level**2) ** 0.5, level
    alpha = 1.0 if case.levels == "edm" else (1 + level**2) ** -0.5
    return alpha, level * alpha


def _times(case: Case, grid: np.ndarray) -> np.ndarray:
    """Returns the times of the levels."""
    schedule = build("schedules", case.schedule)
    alpha, sigma = np.array([_alpha_sigma(case, level) for level in grid if level > 0]).T
    with np.errstate(divide="ignore"):  # alpha of `flow` is 0 at t = 1
        times = np.asarray(schedule.time(2 * np.log(alpha / sigma)), np.float64)
    return np.append(times, np.zeros(len(grid) - len(times)))


_denoise = jax.jit(ORACLE.denoise)


def _network(case: Case, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """Returns the network output that corresponds to the exact x0."""
    x0 = np.asarray(_denoise(x, alpha, sigma))
    if case.levels == "edm":
        data = 0.5  # EDM's sigma_data
        return (x0 - data**2 / (sigma**2 + data**2) * x) * (sigma**2 + data**2) ** 0.5 / (sigma * data)
    eps = (x - alpha * x0) / sigma
    if case.levels == "trig":
        return alpha * eps - sigma * x0
    return eps - x0 if case.levels == "flow" else eps


def _noise() -> Iterator:
    """Yields the noise that this project's samplers draw, step by step."""
    import torch

    keys = sample_keys(jax.random.key(0), jnp.arange(BATCH))
    for i in itertools.count():
        yield torch.tensor(np.asarray(normal(fold(keys, i + 1), (2,), jnp.float64)))


def _path_noise(schedule) -> Callable:
    """Returns a noise sampler of k-diffusion with this project's Brownian path, for x of alpha = 1."""
    import torch

    keys = fold(sample_keys(jax.random.key(0), jnp.arange(BATCH)), 0)

    @jax.jit
    def noise(levels):
        return path_noise(keys, schedule, *schedule.time(-2 * jnp.log(levels)), jnp.zeros((BATCH, 2), jnp.float64))

    return lambda start, end: torch.tensor(np.asarray(noise(jnp.array([float(start), float(end)]))))


@contextlib.contextmanager
def _in_float64(case: Case) -> Iterator[None]:
    """Replaces float32 by float64 and the random numbers by `_noise` in the peer's module.

    All peers draw once per step, in order.
    """
    import torch

    module = _module(case.peer)
    draws = _noise()
    patches = {
        "torch": _Double(torch),
        "np": _Double(np),
        "randn_tensor": lambda *args, **kwargs: next(draws),
    }
    default = torch.get_default_dtype()
    with mock.patch.multiple(module, create=True, **patches):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


class _Double:
    """A module whose float32 is its float64."""

    def __init__(self, module: types.ModuleType):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


def _mend_third_order(scheduler) -> None:
    """Adds the missing term to the third-order multistep update.

    Let f be the predicted quantity (x0 or the noise), h the step in l = log(alpha / sigma), and f'' the second
    derivative from the three known values. A correct update contains `w f''`, where w is the integral over the step of
    the solver's kernel times (l - l_s)^2 / 2. The peer has `w f'' / 2`. For the SDE its w is also too small by
    alpha h^2, because it subtracts 1/2 instead of adding it, and its samples are too widely spread.
    """
    peer = scheduler.multistep_dpm_solver_third_order_update

    def mended(values, sample, **noise):
        k, kind = scheduler.step_index, scheduler.config.algorithm_type
        levels = [scheduler._sigma_to_alpha_sigma_t(level) for level in scheduler.sigmas[k - 2 : k + 2]]
        alpha, sigma = np.array([[float(a), float(s)] for a, s in levels]).T
        place = np.log(alpha / sigma)
        h = place[3] - place[2]
        slopes = [(values[j + 1] - values[j]) / (place[j + 1] - place[j]) for j in (0, 1)]
        second = 2 * (slopes[1] - slopes[0]) / (place[2] - place[0])
        if kind == "dpmsolver++":
            lack = alpha[3] * (h**2 / 2 - h - np.expm1(-h)) / 2
        elif kind == "dpmsolver":
            lack = -sigma[3] * (np.expm1(h) - h - h**2 / 2) / 2
        else:
            lack = alpha[3] * ((h**2 - h) / 2 - np.expm1(-2 * h) / 4 + h**2) / 2
        return peer(values, sample=sample, **noise) + lack * second

    scheduler.multistep_dpm_solver_third_order_update = mended


def main() -> None:
    import diffusers
    import torch

    arrays = {"versions": np.array([f"torch {torch.__version__}", f"diffusers {diffusers.__version__}"])}
    for case in CASES:
        arrays |= {f"{case.name}/{key}": value for key, value in run_peer(case).items()}
    np.savez_compressed(PATH, **arrays)
    print(f"{len(CASES)} cases, {PATH.stat().st_size / 1024:.0f} KiB: {PATH}")


if __name__ == "__main__":
    main()
