"""Exponential integrators of the probability-flow ODE: DPM-Solver, DPM-Solver++ and DEIS are special cases.

With lambda = log(alpha / sigma), a step from t to s has the size h = lambda_s - lambda_t, and tau in [0, 1] is the
position within it. The linear part of the ODE is solved exactly (Lu et al. 2022, arXiv 2206.00927, eq. 3.4, and arXiv
2211.01095, eq. 8):

    x_s = (sigma_s / sigma_t) x_t + alpha_s  integral over [0, 1] of h e^(-h (1 - tau)) x0(tau)
    x_s = (alpha_s / alpha_t) x_t - sigma_s  integral over [0, 1] of h e^( h (1 - tau)) eps(tau)

The solvers replace x0(tau) or eps(tau) by the polynomial through known values v_k at nodes tau_k, where v_0 is the
value at the start of the step, tau_0 = 0. The integrals are then sums, whose weights w_k `quadrature_weights` computes.
They add up to the integral of the kernel, so that the sum separates into the first-order step (DDIM) and a correction:

    x_s = first_order(x_t, t, s) + alpha_s sum_k w_k (v_k - v_0)        for x0
    x_s = first_order(x_t, t, s) - sigma_s sum_k w_k (v_k - v_0)        for eps

The reverse SDE with eta times the noise of the forward process (SA-Solver, Xue et al. 2023, arXiv 2309.05019, eq. 9 and
20, has eta = tau^2) keeps this form. With z standard normal noise, eps is multiplied by 1 + eta, and so is h of x0:

    x_s = (sigma_s / sigma_t) e^(-eta h) x_t + alpha_s  integral of (1 + eta) h e^(-(1 + eta) h (1 - tau)) x0(tau)
          + sigma_s sqrt(1 - e^(-2 eta h)) z
    x_s = (alpha_s / alpha_t) x_t - sigma_s  integral of (1 + eta) h e^(h (1 - tau)) eps(tau)
          + sigma_s sqrt(eta (e^(2h) - 1)) z

The papers' second-order methods ("midpoint") have a simpler weight: with two nodes, w_1 is the integral of
kernel(tau) tau / tau_1, in which they replace tau by its mean over the step, 1/2. This gives w_1 = total / (2 tau_1),
where total is the integral of the kernel: 1 - e^-h for x0 and e^h - 1 for eps without noise.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import fold, normal
from diffusion.core.types import Array, Denoised, Denoiser, InputError, Schedule
from diffusion.sampling.ode.brownian import path_noise
from diffusion.sampling.ode.first_order import Solver, eps_of, first_order, half_log_snr, x0_of_eps
from diffusion.sampling.ode.multistep import History, highest_orders, quadrature_weights, weighted_differences

Prediction = Literal["x0", "eps"]


def kernel(prediction: Prediction, h: Array, tau: Array, eta: Array | float = 0.0) -> Array:
    """Returns the weight of x0 or eps at position tau of a step of size h, as in the module's docstring."""
    if prediction == "x0":
        return (1 + eta) * h * jnp.exp((tau - 1) * (1 + eta) * h)
    return (1 + eta) * h * jnp.exp((1 - tau) * h)


def kernel_integral(prediction: Prediction, h: Array, eta: Array | float = 0.0) -> Array:
    """Returns the integral of `kernel` over [0, 1]."""
    return -jnp.expm1(-(1 + eta) * h) if prediction == "x0" else (1 + eta) * jnp.expm1(h)


def exponential_step(
    prediction: Prediction,
    schedule: Schedule,
    x: Array,
    denoised: Denoised,
    t: Array,
    s: Array,
    eta: Array | float = 0.0,
    noise: Array | None = None,
) -> Array:
    """Returns the first-order step of the module's docstring, finite for every s and for every t except 0.

    For eta = 0 it is `first_order` for both predictions. A step to the data is deterministic, and a step from pure
    noise is that of x0, because that of eps is infinite.

    Args:
      noise: z, standard normal noise like x; None for eta = 0.
    """
    if noise is None:
        return first_order(schedule, x, denoised, t, s)
    alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    ratio = sigma_s * alpha_t / (alpha_s * sigma_t)  # e^-h
    from_eps = sigma_s * ratio**eta
    std = sigma_s * jnp.sqrt(1 - ratio ** (2 * eta))
    if prediction == "eps":
        regular = (alpha_t > 0) & (sigma_s > 0)
        level = alpha_s * sigma_t / jnp.where(alpha_t > 0, alpha_t, 1)  # sigma_s e^h
        from_eps = jnp.where(regular, sigma_s - eta * (level - sigma_s), from_eps)
        std = jnp.where(regular, jnp.sqrt(eta * jnp.maximum(level**2 - sigma_s**2, 0)), std)
    x0 = denoised.x0 if denoised.x0_for_eps is None else denoised.x0_for_eps
    return alpha_s * denoised.x0 + from_eps / sigma_t * (x - alpha_t * x0) + std * noise


def interpolated_value(prediction: Prediction, schedule: Schedule, x: Array, x0: Array, t: Array) -> Array:
    """Returns the quantity that a solver interpolates, x0 or eps, from the denoiser's x0 at x_t."""
    return x0 if prediction == "x0" else eps_of(schedule, x, x0, t)


def relative_nodes(lambdas: Array, end: Array) -> tuple[Array, Array, Array]:
    """Expresses past evaluation points in units of the step from `lambdas[0]` to `end`.

    Returns:
      The step size h, the nodes `(lambdas - lambdas[0]) / h`, and whether h is finite and not 0. A step from pure noise
      or to the data is infinite. It must be of first order, as a step of length 0, and h is then 1.
    """
    h = end - lambdas[0]
    finite = jnp.isfinite(h) & (h != 0)
    h = jnp.where(finite, h, 1)
    return h, (lambdas - lambdas[0]) / h, finite


def correction(prediction: Prediction, schedule: Schedule, s: Array, values: Array, weights: Array) -> Array:
    """Returns the term that is added to the first-order step to s, for values `[K, B, ...]` and weights `[K]`."""
    scale = schedule.alpha(s) if prediction == "x0" else -schedule.sigma(s)
    return scale * weighted_differences(values, weights)


@dataclasses.dataclass(frozen=True)
class Multistep(Solver):
    """The multistep solver, which interpolates the values at previous points of the grid.

    See the samplers `dpm_solver`, `dpm_solver_pp` and `deis` for the formulas. With CFG++ it interpolates the values of
    the unconditional x0, and the first-order step is that of CFG++.

    Attributes:
      prediction: the interpolated quantity.
      order: the number of interpolated values.
      eta: the amount of noise; 1 is the reverse SDE, 0 the ODE.
      midpoint: whether the second order uses the papers' simpler weight.
      lower_order_final: whether the order falls in the last steps of a run of fewer than 15; see `highest_orders`.
      brownian: whether the noise is that of a Brownian path instead of independent noise at each step.
    """

    prediction: Prediction
    order: int
    eta: float = 0.0
    midpoint: bool = True
    lower_order_final: bool | None = None
    brownian: bool = False
    uses_separate_eps = True

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        return {
            "history": History.empty(self.order, x, times),
            "orders": highest_orders(times, self.order, self.lower_order_final, fewer_than=15),
            "first": jnp.int32(index),
            "index": jnp.int32(index),
        }

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        denoised = denoise(x, t)
        value = interpolated_value(self.prediction, schedule, x, x0_of_eps(denoised).astype(x.dtype), t)
        history = state["history"].push(value, half_log_snr(schedule, t))
        order = jnp.minimum(history.count, state["orders"][state["index"]])
        h, nodes, finite = relative_nodes(history.nodes, half_log_snr(schedule, s))
        valid = (jnp.arange(self.order) < jnp.where(finite, order, 1)) & jnp.isfinite(nodes)
        weights = quadrature_weights(nodes, valid, lambda tau: kernel(self.prediction, h, tau, self.eta))
        if self.midpoint and self.order > 1:
            half = kernel_integral(self.prediction, h, self.eta) / 2 / jnp.where(valid[1], nodes[1], 1)
            weights = weights.at[1].set(jnp.where((order == 2) & valid[1], half, weights[1]))
        noise = None
        if self.brownian:
            noise = path_noise(fold(keys, state["first"]), schedule, t, s, x)
        elif self.eta:
            noise = normal(keys, x.shape[1:], x.dtype)
        moved = exponential_step(self.prediction, schedule, x, denoised, t, s, self.eta, noise)
        moved += correction(self.prediction, schedule, s, history.values, weights)
        return moved.astype(x.dtype), denoised.x0, {**state, "history": history, "index": state["index"] + 1}


@dataclasses.dataclass(frozen=True)
class Singlestep(Solver):
    """The singlestep solver: each of its steps is a Runge-Kutta step of `order` stages, with one evaluation per stage.

    A Runge-Kutta step covers `order` intervals of the grid and performs one stage per interval. It reads only the first
    and the last of their times: the inner stages lie at even parts of the step in lambda. For order 3, from lambda_0 to
    lambda_0 + h, with v_k the value that stage k evaluates:

        grid intervals    |------ i ------|---- i + 1 ----|---- i + 2 ----|
        stage                     0               1               2
        evaluates at       lambda_0        lambda_0 + h/3  lambda_0 + 2h/3
        interpolates       v_0             v_0, v_1        v_0, v_2 (without `midpoint`: v_0, v_1, v_2)
        moves x to         lambda_0 + h/3  lambda_0 + 2h/3 lambda_0 + h

    Every stage starts again from x at lambda_0. `_stage` assigns the intervals of a grid to stages. For the formulas
    see the samplers `dpm_solver` and `dpm_solver_pp`.

    Attributes:
      prediction: the interpolated quantity.
      order: the number of stages.
      eta: the amount of noise; 1 is the reverse SDE, 0 the ODE. The noise of each stage is independent.
      midpoint: whether the papers' weights are used; otherwise each stage interpolates all values before it.
      on_grid: whether the inner stages lie at the times of the grid instead.
      lower_order_final: whether the last interval is a step by itself if the intervals are divisible by the order; by
        default if the run ends at t = 0 or 1.
    """

    prediction: Prediction
    order: int
    eta: float = 0.0
    midpoint: bool = True
    on_grid: bool = False
    lower_order_final: bool | None = None

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        steps = len(times) - 1
        # The list may turn, as where noise is added; a Runge-Kutta step ends there at the latest.
        intervals, directions = np.arange(steps), jnp.sign(jnp.diff(times))
        turns = (directions * directions[index] < 0) & (intervals > index)
        return {
            "start": (x, x, times[index]),  # x, x0 and t at the start of the current Runge-Kutta step
            "values": jnp.zeros((self.order, *x.shape), x.dtype),  # v_k of the current step, by stage
            "t": times[index],
            "times": times,
            "first": jnp.int32(index),
            "last": jnp.min(jnp.where(turns, intervals, steps)).astype(jnp.int32),
            "index": jnp.int32(index),
        }

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        times, first, last = state["times"], state["first"], state["last"]
        # A step from pure noise, or to either end of time, may be infinite in lambda, and can only be of first order.
        from_noise = ~jnp.isfinite(schedule.log_snr(times[first]))
        to_end = (times[last] == 0) | (times[last] == 1)
        divisible = (last - first - from_noise) % self.order == 0
        last_alone = to_end | (divisible & bool(self.lower_order_final))
        stage, stages, end = _stage(state["index"] - first, last - first, self.order, from_noise, last_alone)
        end += first

        t = state["t"]  # the time of an inner stage is not on the grid
        x0 = denoise(x, t).x0.astype(x.dtype)
        values = state["values"].at[stage].set(interpolated_value(self.prediction, schedule, x, x0, t))
        start = tuple(jnp.where(stage == 0, new, old) for new, old in zip((x, x0, t), state["start"], strict=True))
        x_start, x0_start, t_start = start

        # This stage goes from lambda_start over h = whole * (stage + 1) / stages, or to the next time of the grid.
        lambda_start, lambda_end = half_log_snr(schedule, t_start), half_log_snr(schedule, times[end])
        slots = jnp.arange(self.order)
        if self.on_grid:
            lambdas = half_log_snr(schedule, times[jnp.minimum(state["index"] - stage + slots, last)])
            h, nodes, finite = relative_nodes(lambdas, half_log_snr(schedule, s))
            nodes = jnp.where(finite & (slots <= stage), nodes, 0)
        else:
            whole = jnp.where(jnp.isfinite(lambda_end - lambda_start), lambda_end - lambda_start, 1)
            h = whole * (stage + 1) / stages
            inner = schedule.time(2 * (jnp.where(jnp.isfinite(lambda_start), lambda_start, 0) + h))
            s = jnp.where(stage + 1 == stages, times[end], inner).astype(times.dtype)
            nodes = (slots / (stage + 1)).astype(times.dtype)

        # The papers interpolate only the first value and the newest one.
        valid = (slots == 0) | (slots == stage) | ((slots < stage) & (not self.midpoint))
        weights = quadrature_weights(nodes, valid, lambda tau: kernel(self.prediction, h, tau, self.eta))
        if self.midpoint:
            half = kernel_integral(self.prediction, h, self.eta) / 2 / jnp.where((slots == 1) & (nodes > 0), nodes, 1)
            weights = jnp.where((slots == 1) & (stage == 1), half, weights)
        noise = normal(keys, x.shape[1:], x.dtype) if self.eta else None
        moved = exponential_step(self.prediction, schedule, x_start, Denoised(x0_start), t_start, s, self.eta, noise)
        moved += correction(self.prediction, schedule, s, values, weights)
        state = {**state, "t": s, "start": start, "values": values, "index": state["index"] + 1}
        return moved.astype(x.dtype), x0, state

    def time(self, state: dict, t: Array) -> Array:
        return state["t"]


def exponential_solver(
    prediction: Prediction,
    order: int,
    sde: bool,
    singlestep: bool,
    solver_type: Literal["midpoint", "heun"],
    inner_points: Literal["even", "grid"],
    lower_order_final: bool | None,
    brownian: bool = False,
) -> Multistep | Singlestep:
    """Returns the solver of `dpm_solver` or `dpm_solver_pp`, whose options these are."""
    if not 1 <= order <= 3:
        raise InputError("order", f"must be 1, 2 or 3, got {order}")
    if inner_points == "grid" and not singlestep:
        raise InputError("inner_points", "must be 'even' unless singlestep = true; the multistep solver has none")
    eta, midpoint = float(sde), solver_type == "midpoint"
    if singlestep:
        return Singlestep(prediction, order, eta, midpoint, inner_points == "grid", lower_order_final)
    return Multistep(prediction, order, eta, midpoint, lower_order_final, brownian)


def _stage(index: Array, steps: Array, order: int, first_alone: Array, last_alone: Array) -> tuple[Array, Array, Array]:
    """Returns which stage of which Runge-Kutta step an interval of a grid is.

    The grid of `steps` intervals is divided into Runge-Kutta steps of `order` intervals and a shorter last one. The
    first interval may be a step by itself, and so may the last one. For order 3 and 8 intervals:

        neither     [0 1 2][3 4 5][6 7]          first alone  [0][1 2 3][4 5 6][7]
        last alone  [0 1 2][3 4 5][6][7]         both         [0][1 2 3][4 5 6][7]

    Returns:
      The stage, the number of stages of its step, and the index of the time at which its step ends, int32.
    """
    offset = jnp.asarray(first_alone, jnp.int32)
    stage = (index - offset) % order
    begin = index - stage
    stages = jnp.minimum(order, steps - begin)
    splits = last_alone & (begin + stages == steps) & (stages > 1)  # the step loses its last interval
    alone = ((offset == 1) & (index == 0)) | (splits & (index == steps - 1))
    stage, stages, begin = (jnp.where(alone, *pair) for pair in ((0, stage), (1, stages - splits), (index, begin)))
    return stage, stages, begin + stages
