"""Consistency models in continuous time (sCM; Lu & Song 2024, arXiv 2410.11081). The map f to the end of the ODE path
is trained so that its total derivative along the path, the tangent df/dtheta, becomes 0. There is no second time and no
solver. Without a teacher this is consistency training (sCT), with a teacher distillation (sCD).

The path is the schedule `trig` with its `sigma_data`, and theta = pi t / 2 is the paper's time. All derivatives here
are in theta. f(x, t) = cos(theta) x + sin(theta) sigma_data F(x / sigma_data, c_noise) is the parameterization `edm` on
that path; its F is that of the paper with the opposite sign.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import expand, flat_mean
from diffusion.core.types import Apply, Array, Batch, Cond, Denoised, Denoiser, Network, Params, Schedule
from diffusion.layers.attention import jvp
from diffusion.objectives.base import uncertainty
from diffusion.objectives.base.gaussian import Gaussian, apply_network, build_parts, corrupt
from diffusion.objectives.base.teacher import Teacher, check_coefficients, check_teacher, init_from_teacher
from diffusion.process.parameterization import Coefficients, Parameterization

SAMPLER = {"name": "consistency", "sigma_min": 0.0, "steps": 2}  # of a config without a sampler
Normalization = Literal["norm", "vector_norm", "clip"]
SOFTENING = 0.1  # c of the tangent normalisation g / (|g| + c)


@dataclasses.dataclass(frozen=True)
class ContinuousConsistency(Gaussian):
    """A consistency model in continuous time; see `make`.

    The dict of networks has `net`, `weight` if the weight is learned, and `teacher` if the loss follows one.
    """

    sigma_data: float = 1.0
    warmup: int = 0
    normalize: Normalization = "norm"
    adaptive: bool = True
    prior_weighting: bool = False
    teacher: Teacher | None = None

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        params = super().init(network, key)
        if self.adaptive:
            params["weight"] = uncertainty.init()
        if self.teacher is not None:
            teacher = self.teacher.init(key) if teacher is None else teacher
            params["net"] = init_from_teacher(params["net"], teacher["net"])
            if "teacher" in self.frozen:
                params["teacher"] = teacher
        return params

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Returns a loss with the paper's gradient (eq. 8). Its value is not informative: its minimum is unknown."""
        draws = batch["draws"]
        x0, t, eps = batch["x"], draws["t"], draws["eps"]
        x_t = corrupt(self.schedule, x0, eps, t)
        cos, sin = expand(self.schedule.alpha(t), x0), expand(self.schedule.sigma(t), x0) / self.sigma_data

        def network(params: Params) -> Callable[[Array, Array], Array]:
            def output(x: Array, t: Array) -> Array:
                return apply_network(net, params, x, self.parameterization(self.schedule, t), batch["cond"], key)

            return output

        fixed = jax.lax.stop_gradient(params)
        if "teacher" in self.frozen:  # the teacher's estimates of x0 and eps give the velocity of its ODE
            x0 = self.teacher.denoiser(fixed["teacher"])(x_t, t, batch["cond"]).x0
            eps = (x_t - cos * x0) / (self.sigma_data * sin)
        velocity = self.sigma_data * cos * eps - sin * x0
        ramp = jnp.minimum(1.0, step / self.warmup) if self.warmup else 1.0
        frozen, slope = tangent(network(fixed["net"]), self.schedule, self.sigma_data, x_t, t, velocity, ramp)
        target = normalized(cos * slope, self.normalize)
        error = flat_mean(jnp.square(network(params["net"])(x_t, t) - frozen + target))
        metrics = {"tangent_rms": jnp.mean(jnp.sqrt(flat_mean(jnp.square(cos * slope))))}
        if self.prior_weighting:
            error *= jnp.exp(self.schedule.log_snr(t) / 2)
        if self.adaptive:
            error = uncertainty.weighted(params["weight"], self.schedule, t, error)
        return draws["weight"] * error, metrics

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        """Returns f as a denoiser, which is the identity bit for bit at t = 0."""
        denoise = super().denoiser(net, params)

        def consistency(x: Array, t: Array, cond: Cond) -> Denoised:
            return dataclasses.replace(denoise(x, t, cond), kind="consistency")

        return consistency


def tangent(
    network: Callable[[Array, Array], Array],
    schedule: Schedule,
    sigma_data: float,
    x: Array,
    t: Array,
    velocity: Array,
    ramp: Array | float = 1.0,
) -> tuple[Array, Array]:
    """Returns F, and the derivative of f(x, t) = cos x + sigma_data sin F(x, t) along a path, in theta (Lu & Song 2024,
    eq. 6).

    Args:
      network: `(x [B, ...], t [B]) -> F [B, ...]`, which scales its input itself.
      schedule: `trig` with `sigma_data`.
      sigma_data: The standard deviation of the data.
      x, t: The points `[B, ...]` and times `[B]`.
      velocity: dx/dtheta of the path, `[B, ...]`.
      ramp: The factor in [0, 1] of the second term, sin (sigma_data dF/dtheta - x), which is unstable early in
        training. The first term alone is diffusion training.
    """
    output, d_output = jvp(network, (x, t), (velocity, jnp.full_like(t, 2 / math.pi)))
    cos, sin = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x) / sigma_data
    return output, cos * (velocity + sigma_data * output) + ramp * sin * (sigma_data * d_output - x)


def normalized(g: Array, kind: Normalization) -> Array:
    """Returns the tangent `[B, ...]` divided by its `norm`, the root mean square, plus 0.1, or clipped to [-1, 1].

    The paper's norm is the root of the sum of squares, `vector_norm`. The mean makes the size, relative to 0.1 too,
    independent of the resolution.
    """
    if kind == "clip":
        return jnp.clip(g, -1, 1)
    square = flat_mean(jnp.square(g)) * (math.prod(g.shape[1:]) if kind == "vector_norm" else 1)
    return g / (expand(jnp.sqrt(square), g) + SOFTENING)


def _exact(edm: Parameterization) -> Parameterization:
    """Returns `edm` with the coefficients that it has on this path in exact arithmetic, so that f(x, 0) is x."""

    def coefficients(schedule: Schedule, t: Array) -> Coefficients:
        return dataclasses.replace(edm(schedule, t), c_skip=schedule.alpha(t), c_out=schedule.sigma(t))

    return coefficients


def make(
    sigma_data: float = 1.0,
    c_noise: Literal["unit", "time"] = "unit",
    mean: float = -1.0,
    std: float = 1.4,
    warmup: int = 10_000,
    normalize: Normalization = "norm",
    adaptive: bool = True,
    prior_weighting: bool = False,
    teacher: Teacher | None = None,
    distill: bool = True,
) -> ContinuousConsistency:
    """Builds a consistency model in continuous time.

    Args:
      sigma_data: The standard deviation of the data.
      c_noise: The noise label: t itself, or 1000 t, which makes derivatives in t large.
      mean, std: The mean and standard deviation of log(sigma / alpha), which is normally distributed.
      warmup: The number of steps H over which the unstable term of the tangent is ramped up by min(1, step / H).
      normalize: The normalisation of the tangent, by its `norm`, `vector_norm` or `clip`; see `normalized`.
      adaptive: Whether the weight of each noise level is learned; otherwise it is 1.
      prior_weighting: Whether the error is multiplied by alpha / sigma = 1 / (sigma_data tan(theta)), in addition to
        the learned weight, as in NVIDIA's FastGen.
      teacher: A diffusion model whose weights the student starts from, on the schedule `trig` with this sigma_data and
        the parameterization `edm` with this sigma_data and c_noise.
      distill: Whether the path follows the teacher's velocity (sCD) or that of the example and its noise (sCT). If
        False, the teacher provides only the initial weights.
    """
    checks.positive(sigma_data=sigma_data, std=std)
    checks.at_least(0, warmup=warmup)
    parts = build_parts(
        {"name": "trig", "sigma_data": sigma_data},
        {"name": "edm", "sigma_data": sigma_data, "c_noise": c_noise},
        {"name": "log_normal", "mean": mean, "std": std},
        "simple",
    )
    parts["parameterization"] = _exact(parts["parameterization"])
    if teacher is not None:
        check_teacher(teacher, parts["schedule"])
        check_coefficients(teacher, parts["schedule"], parts["parameterization"])
    return ContinuousConsistency(
        **parts,
        frozen=("teacher",) if teacher is not None and distill else (),
        sigma_data=sigma_data,
        warmup=warmup,
        normalize=normalize,
        adaptive=adaptive,
        prior_weighting=prior_weighting,
        teacher=teacher,
    )
