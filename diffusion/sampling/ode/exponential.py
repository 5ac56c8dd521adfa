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

The papers' second-order methods ("midpoint") have a simpler weight: with two nodes, w_1 is the integral of
kernel(tau) tau / tau_1, in which they replace tau by its mean over the step, 1/2. This gives w_1 = total / (2 tau_1),
where total = 1 - e^-h for x0 and e^h - 1 for eps.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoised, Denoiser, Schedule
from diffusion.process.posterior import posterior
from diffusion.sampling.ode.first_order import Solver, eps_of, first_order, half_log_snr
from diffusion.sampling.ode.multistep import History, check_steps, quadrature_weights, weighted_differences

Prediction = Literal["x0", "eps"]


def kernel(prediction: Prediction, h: Array, tau: Array) -> Array:
    """Returns the weight of x0 or eps at position tau of a step of size h, as in the module's docstring."""
    return h * jnp.exp((tau - 1 if prediction == "x0" else 1 - tau) * h)


def kernel_integral(prediction: Prediction, h: Array) -> Array:
    """Returns the integral of `kernel` over [0, 1]."""
    return -jnp.expm1(-h) if prediction == "x0" else jnp.expm1(h)


def interpolated_value(prediction: Prediction, schedule: Schedule, x: Array, x0: Array, t: Array) -> Array:
    """Returns the quantity that a solver interpolates, x0 or eps, from the denoiser's x0 at x_t."""
    return x0 if prediction == "x0" else eps_of(schedule, x, x0, t)


def relative_nodes(lambdas: Array, end: Array) -> tuple[Array, Array, Array]:
    """Expresses past evaluation points in units of the step from `lambdas[0]` to `end`.

    Returns:
      The step size h, the nodes `(lambdas - lambdas[0]) / h`, and whether the step is finite. A step from pure noise or
      to the data is infinite; it must be of first order, and h is then 1.
    """
    h = end - lambdas[0]
    finite = jnp.isfinite(h)
    h = jnp.where(finite, h, 1)
    return h, (lambdas - lambdas[0]) / h, finite


def correction(prediction: Prediction, schedule: Schedule, s: Array, values: Array, weights: Array) -> Array:
    """Returns the term that is added to the first-order step to s, for values `[K, B, ...]` and weights `[K]`."""
    scale = schedule.alpha(s) if prediction == "x0" else -schedule.sigma(s)
    return scale * weighted_differences(values, weights)


@dataclasses.dataclass(frozen=True)
class Multistep(Solver):
    """The multistep solver, which interpolates the values at previous points of the grid.

    See the samplers `dpm_solver`, `dpm_solver_pp` and `deis` for the formulas.

    Attributes:
      prediction: the interpolated quantity.
      order: the number of interpolated values.
      sde: whether the reverse SDE is solved; only for `x0`.
      midpoint: whether the second order uses the papers' simpler weight.
    """

    prediction: Prediction
    order: int
    sde: bool = False
    midpoint: bool = True

    @property
    def stochastic(self) -> bool:
        return self.sde

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        steps = check_steps(times, self.order)
        # In short runs to the data the order decreases by one per step at the end, as published, for stability.
        falling = np.minimum(self.order, steps - np.arange(steps))
        return {
            "history": History.empty(self.order, x, times),
            "orders": jnp.where((times[-1] == 0) & (steps < 15), falling, self.order),
            "index": jnp.int32(index),
        }

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        x0 = denoise(x, t).x0.astype(x.dtype)
        value = interpolated_value(self.prediction, schedule, x, x0, t)
        history = state["history"].push(value, half_log_snr(schedule, t))
        order = jnp.minimum(history.count, state["orders"][state["index"]])
        h, nodes, finite = relative_nodes(history.nodes, half_log_snr(schedule, s))
        valid = (jnp.arange(self.order) < jnp.where(finite, order, 1)) & jnp.isfinite(nodes)
        # The kernel of the SDE is that of the ODE for a step of size 2h.
        span = 2 * h if self.sde else h
        weights = quadrature_weights(nodes, valid, lambda tau: kernel(self.prediction, span, tau))
        if self.midpoint and self.order > 1:
            half = kernel_integral(self.prediction, span) / 2 / jnp.where(valid[1], nodes[1], 1)
            weights = weights.at[1].set(jnp.where((order == 2) & valid[1], half, weights[1]))
        if self.sde:
            reverse = posterior(schedule, t, s)
            moved = reverse.from_x * x + reverse.from_x0 * x0
            moved += jnp.sqrt(reverse.beta_tilde) * normal(keys, x.shape[1:], x.dtype)
        else:
            moved = first_order(schedule, x, Denoised(x0), t, s)
        moved += correction(self.prediction, schedule, s, history.values, weights)
        return moved.astype(x.dtype), x0, {**state, "history": history, "index": state["index"] + 1}


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

    Every stage starts again from x at lambda_0. `_stage_table` assigns the intervals of a grid to stages. For the
    formulas see the samplers `dpm_solver` and `dpm_solver_pp`.

    Attributes:
      prediction: the interpolated quantity.
      order: the number of stages.
      midpoint: whether the papers' weights are used; otherwise each stage interpolates all values before it.
    """

    prediction: Prediction
    order: int
    midpoint: bool = True

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        steps = check_steps(times, self.order)
        # The list may turn, as where noise is added; a Runge-Kutta step ends there at the latest.
        intervals, directions = np.arange(steps), jnp.sign(jnp.diff(times))
        turns = (directions != directions[index]) & (intervals > index)
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
        stage, stages, end = _stage(state["index"] - first, last - first, self.order, from_noise, to_end)
        end += first

        t = state["t"]  # the time of an inner stage is not on the grid
        x0 = denoise(x, t).x0.astype(x.dtype)
        values = state["values"].at[stage].set(interpolated_value(self.prediction, schedule, x, x0, t))
        start = tuple(jnp.where(stage == 0, new, old) for new, old in zip((x, x0, t), state["start"], strict=True))
        x_start, x0_start, t_start = start

        # This stage goes from lambda_start over h = whole * (stage + 1) / stages.
        lambda_start, lambda_end = half_log_snr(schedule, t_start), half_log_snr(schedule, times[end])
        whole = jnp.where(jnp.isfinite(lambda_end - lambda_start), lambda_end - lambda_start, 1)
        h = whole * (stage + 1) / stages
        inner = schedule.time(2 * (jnp.where(jnp.isfinite(lambda_start), lambda_start, 0) + h))
        s = jnp.where(stage + 1 == stages, times[end], inner).astype(times.dtype)

        slots = jnp.arange(self.order)
        nodes = (slots / (stage + 1)).astype(times.dtype)
        # The papers interpolate only the first value and the newest one.
        valid = (slots == 0) | (slots == stage) | ((slots < stage) & (not self.midpoint))
        weights = quadrature_weights(nodes, valid, lambda tau: kernel(self.prediction, h, tau))
        if self.midpoint:
            # The second stage's newer node is 1/2, for which total / (2 tau_1) is the integral of the kernel.
            weights = jnp.where((slots == 1) & (stage == 1), kernel_integral(self.prediction, h), weights)
        moved = first_order(schedule, x_start, Denoised(x0_start), t_start, s)
        moved += correction(self.prediction, schedule, s, values, weights)
        state = {**state, "t": s, "start": start, "values": values, "index": state["index"] + 1}
        return moved.astype(x.dtype), x0, state

    def time(self, state: dict, t: Array) -> Array:
        return state["t"]


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
