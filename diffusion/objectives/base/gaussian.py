"""The base of all objectives with Gaussian corruption, x_t = alpha x0 + sigma eps.

The network is trained to predict an affine combination of x0 and eps. Denoising diffusion and flow matching differ only
in their schedule, parameterization, time sampler and weighting.
"""

import dataclasses
import itertools
import logging
import reprlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.arrays import expand, flat_mean, mean_where, per_example
from diffusion.core.build import build
from diffusion.core.types import (
    PREVIOUS_X0,
    Apply,
    Array,
    Batch,
    Cond,
    Denoised,
    Denoiser,
    InputError,
    Network,
    Params,
    Schedule,
)
from diffusion.objectives.base import noise, uncertainty
from diffusion.process.parameterization import Coefficients, Parameterization
from diffusion.process.time_sampling import TimeSampler
from diffusion.process.weighting import Weighting

# A part's name, `{"name": ..., **keywords}`, or a callable that returns the part. The metadata of an alias is the
# family of the part and, if there are any, the keywords that the objective passes to it and no config may set.
PartSpec = str | Mapping[str, Any] | Callable[..., Any]
ScheduleSpec = Annotated[PartSpec, "schedules"]
ParameterizationSpec = Annotated[PartSpec, "parameterization"]
TimeSamplerSpec = Annotated[PartSpec, "time_sampling"]
WeightingSpec = Annotated[PartSpec, "weighting"]
DiscretizationSpec = Annotated[PartSpec, "discretization"]
ObjectiveSpec = Annotated[PartSpec, "objectives", ("schedule",)]

MOST_TERMINAL_SNR = 0.01  # above it, noise alone is not what the network has seen at t = 1
LARGEST_C_OUT = 10.0  # above it, an error of the output is so much enlarged in x0 that a network cannot read x0
LOG_SNR_EDGES = (-4, -2, 0, 2, 4)  # edges of the bins for which the loss is logged separately

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """What objectives share whose network predicts a combination of x0 and eps from x_t.

    Three attributes extend the protocol `Objective`. `init` checks the network against `outputs` and
    `scalar_conditions`, and `teacher.check_coefficients` compares the `parameterization` of student and teacher. An
    objective that does not derive from this class needs `parameterization` if its models serve as teachers, and neither
    of the others.

    Attributes:
      schedule: The noise schedule.
      parameterization: What the output F of the network stands for.
      frozen: Names of the networks that receive no gradient; see `Objective`.
    """

    schedule: Schedule
    parameterization: Parameterization
    frozen = ()

    @property
    def outputs(self) -> int:
        """The number of outputs per channel that the network must have."""
        return 1

    @property
    def scalar_conditions(self) -> tuple[str, ...]:
        """The scalar conditions that the network must accept; see `Network.scalar_conditions`."""
        return ()

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        if network.outputs != self.outputs:
            raise InputError("network.outputs", f"must be {self.outputs} for this objective, got {network.outputs}")
        for name in self.scalar_conditions:
            if name not in network.scalar_conditions:
                required = tuple(dict.fromkeys((*network.scalar_conditions, *self.scalar_conditions)))
                problem = f"must include {name!r} for this objective; set network.scalar_conditions = {required}"
                raise InputError("network.scalar_conditions", problem)
        return {"net": network.init(key)}

    def schedule_for(self, params: Mapping) -> Schedule:
        return self.schedule

    def initial_state(self, params: Mapping) -> Mapping[str, Array]:
        return {}

    def before_step(
        self,
        params: Mapping,
        ema_params: Mapping,
        batch: Batch,
        objective_state: Mapping[str, Array],
        key: Array,
        step: Array,
    ) -> tuple[dict[str, Params], Mapping[str, Array]]:
        return dict(params), objective_state

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        schedule = self.schedule_for(params)

        def denoise(x: Array, t: Array, cond: Cond) -> Denoised:
            coefficients = self.parameterization(schedule, per_example(t, x))
            return Denoised(coefficients.to_x0(apply_network(net, params["net"], x, coefficients, cond), x))

        return denoise


@dataclasses.dataclass(frozen=True)
class Gaussian(Predictor):
    """An `Objective` with the loss E[w(t) mean((F - target)^2)], the expectation over t and eps.

    Attributes:
      time_sampler: The distribution of t in training.
      weighting: The weight w(t) of the squared error of F.
      learned_weight: Whether the weight of each noise level is learned in addition, by the network `weight`; see
        `uncertainty`.
      offset_noise: The strength of the noise that is common to all pixels; see `noise.offset`.
      pyramid_noise: The discount of noise at lower resolutions, in [0, 1); see `noise.pyramid`.
      input_perturbation: The scale of the noise that is added to eps in the network's input, but not in its target
        (Ning et al. 2023, arXiv 2301.11706, algorithm 1).
      self_conditioning: Whether the network reads an earlier estimate of x0 (Chen et al. 2022, arXiv 2208.04202,
        algorithm 1). In training it is, without a gradient, the network's own for half of the examples, and 0 for the
        others. Sampling passes that of the last step.
    """

    time_sampler: TimeSampler
    weighting: Weighting
    frozen: tuple[str, ...] = ()
    learned_weight: bool = False
    offset_noise: float = 0.0
    pyramid_noise: float = 0.0
    input_perturbation: float = 0.0
    self_conditioning: bool = False

    def __post_init__(self):
        checks.at_least(0, offset_noise=self.offset_noise, input_perturbation=self.input_perturbation)
        checks.rate(pyramid_noise=self.pyramid_noise)
        if not self.self_conditioning:
            return
        with jax.ensure_compile_time_eval():
            c_out = self.parameterization(self.schedule, jnp.float32(1)).c_out
        if not abs(c_out) < LARGEST_C_OUT:
            problem = (
                "must be x0, v, velocity or edm with self_conditioning; with others x0 is only known near the data"
            )
            raise InputError("parameterization", problem)

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        if self.self_conditioning and not network.self_conditioning:
            raise InputError("network.self_conditioning", "must be True for an objective with self_conditioning")
        if network.self_conditioning and not self.self_conditioning:
            problem = "must be False, unless the objective has self_conditioning too; this one passes no estimate of x0"
            raise InputError("network.self_conditioning", problem)
        params = super().init(network, key)
        return {**params, "weight": uncertainty.init()} if self.learned_weight else params

    def initial_state(self, params: Mapping) -> Mapping[str, Array]:
        return self.time_sampler.initial_state()

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """Draws `t [B]`, its importance weight `weight [B]` and `eps [B, ...]`; with the options, also its
        `perturbation [B, ...]`, and which examples are conditioned on an estimate of x0, `self_conditioned [B]`."""
        key_t, key_eps = jax.random.split(key)
        t, weight = self.time_sampler.draw(self.schedule, key_t, batch["x"].shape[0], objective_state)
        eps = jax.random.normal(key_eps, batch["x"].shape, batch["x"].dtype)
        if self.pyramid_noise:
            eps = noise.pyramid(eps, jax.random.fold_in(key_eps, 0), self.pyramid_noise)
        if self.offset_noise:
            eps = noise.offset(eps, jax.random.fold_in(key_eps, 1), self.offset_noise)
        draws = {"t": t, "weight": weight, "eps": eps}
        if self.input_perturbation:
            more = jax.random.normal(jax.random.fold_in(key_eps, 2), eps.shape, eps.dtype)
            draws["perturbation"] = self.input_perturbation * more
        if self.self_conditioning:
            draws["self_conditioned"] = jax.random.bernoulli(jax.random.fold_in(key_eps, 3), shape=eps.shape[:1])
        return draws

    def update_state(
        self, objective_state: Mapping[str, Array], draws: Mapping[str, Array], loss: Array
    ) -> tuple[Mapping[str, Array], dict[str, Array]]:
        """Updates the time sampler's state.

        The metrics are the mean losses between consecutive LOG_SNR_EDGES.
        """
        t, loss = draws["t"], loss / draws["weight"]
        edges = np.array([-np.inf, *LOG_SNR_EDGES, np.inf])
        bins = jnp.digitize(self.schedule.log_snr(t), edges[1:-1])
        metrics = {
            f"loss_log_snr_{low:g}_{high:g}": mean_where(loss, bins == index)
            for index, (low, high) in enumerate(itertools.pairwise(edges))
        }
        return self.time_sampler.update_state(objective_state, t, loss), metrics

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        output, _, coefficients = self.forward(net, params["net"], batch, key)
        return batch["draws"]["weight"] * self.weighted_error(output, batch, coefficients, params), {}

    def forward(self, net: Apply, params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Coefficients]:
        """Returns the network's output at x_t, x_t `[B, ...]` and the coefficients at t; `params` are the network's."""
        draws = batch["draws"]
        eps = draws["eps"] + draws["perturbation"] if self.input_perturbation else draws["eps"]
        x_t = corrupt(self.schedule, batch["x"], eps, draws["t"])
        coefficients, cond = self.parameterization(self.schedule, draws["t"]), batch["cond"]
        if self.self_conditioning:
            first = apply_network(net, jax.lax.stop_gradient(params), x_t, coefficients, cond, key)
            x0 = coefficients.to_x0(first[..., : x_t.shape[-1]], x_t)
            cond = {**cond, PREVIOUS_X0: jnp.where(expand(draws["self_conditioned"], x0), x0, 0)}
        return apply_network(net, params, x_t, coefficients, cond, key), x_t, coefficients

    def weighted_error(self, output: Array, batch: Batch, coefficients: Coefficients, params: Mapping) -> Array:
        """Returns w(t) times the error of F, `[B]`; for t `[B, T]`, the mean of this over the frames."""
        t = batch["draws"]["t"]
        error = self.weighting(self.schedule, coefficients, t) * self.error(output, batch, coefficients)
        if self.learned_weight:
            error = uncertainty.weighted(params["weight"], self.schedule, t, error)
        return flat_mean(error)

    def error(self, output: Array, batch: Batch, coefficients: Coefficients) -> Array:
        """Returns mean((F - target)^2), with the shape of t."""
        draws = batch["draws"]
        return flat_mean(jnp.square(output - coefficients.target(batch["x"], draws["eps"])), keep=draws["t"].ndim)


def build_parts(
    schedule: ScheduleSpec,
    parameterization: ParameterizationSpec,
    time_sampler: TimeSamplerSpec,
    weighting: WeightingSpec,
    *,
    learned: bool = False,
) -> dict[str, Any]:
    """Builds the parts of a `Gaussian` from their specs and checks that they are compatible.

    Args:
      learned: Whether the objective trains its schedule.

    Raises:
      InputError: The parameterization is undefined on the schedule, or the time sampler lacks information.
    """
    parts = {
        **build_path(schedule, parameterization, learned=learned),
        "time_sampler": build("time_sampling", time_sampler, field="time_sampler"),
        "weighting": build("weighting", weighting, field="weighting"),
    }
    # Trace a draw, so that a time sampler that needs a table of steps is rejected here.
    jax.eval_shape(
        lambda key: parts["time_sampler"].draw(parts["schedule"], key, 1, parts["time_sampler"].initial_state()),
        jax.random.key(0),
    )
    return parts


def build_path(
    schedule: ScheduleSpec, parameterization: ParameterizationSpec, *, learned: bool = False
) -> dict[str, Any]:
    """Builds the parts of a `Predictor`; the arguments and errors are those of `build_parts`."""
    path = build("schedules", schedule, field="schedule")
    prediction = build("parameterization", parameterization, field="parameterization")
    if learned != hasattr(path, "at"):
        problem = (
            "must be learned for this objective" if learned else "must not be learned, except for the vdm objective"
        )
        raise InputError("schedule.name", problem)
    for name, value in vars(prediction(path, jnp.float32(1))).items():
        if not np.isfinite(value):
            raise InputError(
                "parameterization",
                f"{parameterization!r} is undefined at t = 1 of schedule {reprlib.repr(schedule)}: {name} is {value}; "
                + ("use c_noise = 'time'" if name == "c_noise" else "use v, x0 or velocity"),
            )
    snr = terminal_snr(path)
    if snr > MOST_TERMINAL_SNR:
        logger.warning("the noise schedule ends at a signal-to-noise ratio of %.3g, not near 0: samples start from a "
                       "normal law with the moments of noised data; set zero_terminal_snr", snr)  # fmt: skip
    return {"schedule": path, "parameterization": prediction}


def terminal_snr(schedule: Schedule) -> float:
    """Returns alpha^2 / sigma^2 at t = 1, where sampling starts; 0 for a learned schedule, which is not known yet."""
    return 0.0 if hasattr(schedule, "at") else float(jnp.exp(schedule.log_snr(jnp.float32(1))))


def corrupt(schedule: Schedule, x0: Array, eps: Array, t: Array) -> Array:
    """Returns x_t `[B, ...]` at t `[B]`, or `[B, T]` for a time per frame."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def apply_network(
    net: Apply, params: Params, x_t: Array, coefficients: Coefficients, cond: Cond, key: Array | None = None
) -> Array:
    """Returns the output F of the network at x_t `[B, ...]`."""
    return net(params, expand(coefficients.c_in, x_t) * x_t, coefficients.c_noise, cond, key=key)
