"""Consistency models in continuous time (sCM; Lu & Song 2024, arXiv 2410.11081): the map f to the end of the ODE's path
is trained so that its total derivative along the path, the tangent df/dtheta, becomes 0. There is no second time and no
solver. Without a teacher it is consistency training (sCT), with one distillation (sCD).

The path is the schedule `trig` with its `sigma_data`, theta = pi t / 2 the paper's time. All derivatives here are in
theta. f(x, t) = cos(theta) x + sin(theta) sigma_data F(x / sigma_data, c_noise) is the parameterization `edm` on that
path; its F is the paper's with the other sign.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core.arrays import expand, flat_mean
from diffusion.core.types import Apply, Array, Batch, Denoised, Denoiser, InputError, Network, Params, Schedule
from diffusion.layers.attention import forward_mode
from diffusion.layers.embeddings import fourier
from diffusion.objectives.base.gaussian import Gaussian, build_parts, corrupt
from diffusion.objectives.base.teacher import Teacher, begin, check_coefficients, check_teacher
from diffusion.process.parameterization import Coefficients, Parameterization

SOFTENING = 0.1  # c of the tangent's normalisation g / (|g| + c)
FEATURES = 128  # of the noise level, that the learned weight is linear in
NOISIEST = -50.0  # log-SNR down to which the features tell noise levels apart, for at t = 1 it is infinite


@dataclasses.dataclass(frozen=True)
class ContinuousConsistency(Gaussian):
    """See `make`. The dict of networks is `{"net"}`, `weight` if that is learned, `teacher` if one is followed."""

    sigma_data: float = 1.0
    warmup: int = 0
    normalize: Literal["norm", "clip"] = "norm"
    adaptive: bool = True
    teacher: Teacher | None = None

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        params = super().init(network, key)
        if self.adaptive:
            params["weight"] = {"kernel": jnp.zeros(FEATURES)}
        if self.teacher is not None:
            teacher = self.teacher.init(key) if teacher is None else teacher
            params["net"] = begin(params["net"], teacher["net"])
            if "teacher" in self.frozen:
                params["teacher"] = teacher
        return params

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The gradient is the paper's (eq. 8); the value says little, for its minimum is at no known number."""
        noise = batch["draws"]
        x0, t, eps = batch["x"], noise["t"], noise["eps"]
        x_t = corrupt(self.schedule, x0, eps, t)
        cos, sin = expand(self.schedule.alpha(t), x0), expand(self.schedule.sigma(t), x0) / self.sigma_data

        def network(params: Params) -> Callable[[Array, Array], Array]:
            def output(x: Array, t: Array) -> Array:
                row = self.parameterization(self.schedule, t)
                return net(params, expand(row.c_in, x) * x, row.c_noise, batch["cond"], key=key)

            return output

        fixed = jax.lax.stop_gradient(params)
        if "teacher" in self.frozen:  # x0 and the noise as the teacher sees them in x_t, so its ODE's velocity
            x0 = self.teacher.denoiser(fixed["teacher"])(x_t, t, batch["cond"]).x0
            eps = (x_t - cos * x0) / (self.sigma_data * sin)
        velocity = self.sigma_data * cos * eps - sin * x0
        ramp = jnp.minimum(1.0, step / self.warmup) if self.warmup else 1.0
        frozen, slope = tangent(network(fixed["net"]), self.schedule, self.sigma_data, x_t, t, velocity, ramp)
        wanted = normalized(cos * slope, self.normalize)
        error = flat_mean(jnp.square(network(params["net"])(x_t, t) - frozen + wanted))
        metrics = {"tangent_rms": jnp.mean(jnp.sqrt(flat_mean(jnp.square(cos * slope))))}
        if self.adaptive:
            log_weight = self.log_weight(params["weight"], t)
            return noise["weight"] * (jnp.exp(log_weight) * error - log_weight), metrics
        return noise["weight"] * error, metrics

    def log_weight(self, params: Params, t: Array) -> Array:
        """The learned w(t) of the loss e^w error - w, which makes the errors of all noise levels equal (Karras et al.
        2023, arXiv 2312.02696, appendix B.2), `[B]`."""
        label = -jnp.maximum(self.schedule.log_snr(t), NOISIEST) / 8  # log(sigma / alpha) / 4
        return fourier(label, FEATURES, scale=1.0) @ params["kernel"]

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        """f; it gives back x bit for bit at t = 0."""
        denoise = super().denoiser(net, params)

        def end(x: Array, t: Array, cond: Mapping[str, Array]) -> Denoised:
            return dataclasses.replace(denoise(x, t, cond), kind="consistency")

        return end


def tangent(
    network: Callable[[Array, Array], Array],
    schedule: Schedule,
    sigma_data: float,
    x: Array,
    t: Array,
    velocity: Array,
    ramp: Array | float = 1.0,
) -> tuple[Array, Array]:
    """F, and the derivative of f(x, t) = cos x + sigma_data sin F(x, t) along a path, in theta (Lu & Song 2024, eq. 6).

    Args:
      network: `(x [B, ...], t [B]) -> F [B, ...]`, its input not yet scaled.
      schedule: `trig` with `sigma_data`.
      velocity: dx/dtheta of the path, `[B, ...]`.
      ramp: in [0, 1], the share that the warm-up lets in of the second term, sin (sigma_data dF/dtheta - x), which is
        the unstable one: the first alone is diffusion training.
    """
    with forward_mode():
        output, d_output = jax.jvp(network, (x, t), (velocity, jnp.full_like(t, 2 / math.pi)))
    cos, sin = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x) / sigma_data
    return output, cos * (velocity + sigma_data * output) + ramp * sin * (sigma_data * d_output - x)


def normalized(g: Array, kind: Literal["norm", "clip"]) -> Array:
    """The tangent `[B, ...]` brought to about unit size: over its root mean square plus 0.1, or clipped to [-1, 1]. The
    paper's norm is the root of the sum; with the mean, resolution changes neither the size nor what 0.1 is to it."""
    if kind == "clip":
        return jnp.clip(g, -1, 1)
    return g / (expand(jnp.sqrt(flat_mean(jnp.square(g))), g) + SOFTENING)


def _exact(edm: Parameterization) -> Parameterization:
    """The row `edm` with the coefficients that it has on this path without their rounding, so f(x, 0) is x itself."""

    def row(schedule: Schedule, t: Array) -> Coefficients:
        return dataclasses.replace(edm(schedule, t), c_skip=schedule.alpha(t), c_out=schedule.sigma(t))

    return row


def make(
    sigma_data: float = 1.0,
    c_noise: Literal["unit", "time"] = "unit",
    mean: float = -1.0,
    std: float = 1.4,
    warmup: int = 10_000,
    normalize: Literal["norm", "clip"] = "norm",
    adaptive: bool = True,
    teacher: Teacher | None = None,
    distill: bool = True,
) -> ContinuousConsistency:
    """A consistency model in continuous time.

    Args:
      sigma_data: the data's standard deviation.
      c_noise: what the network is told: t itself, or 1000 t, through which derivatives in t are large.
      mean, std: log(sigma / alpha) is normal.
      warmup: steps H over which the unstable part of the tangent comes in: min(1, step / H) of it.
      normalize: the tangent's, by its `norm` or by `clip`; see `normalized`.
      adaptive: a weight for each noise level is learned; else it is 1.
      teacher: a diffusion model that the student begins with the weights of: on the schedule `trig` with this
        sigma_data and the parameterization `edm` with this sigma_data and c_noise.
      distill: along the teacher's velocity (sCD). False: along that of the example and its noise (sCT), so that the
        teacher is but the beginning.
    """
    for name, value in (("sigma_data", sigma_data), ("std", std)):
        if value <= 0:
            raise InputError(name, f"must be positive, got {value}")
    if warmup < 0:
        raise InputError("warmup", f"must be at least 0, got {warmup}")
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
        teacher=teacher,
    )
