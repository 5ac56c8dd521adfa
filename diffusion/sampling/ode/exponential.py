"""Exponential integrators of the probability-flow ODE: the linear part of a step in log(alpha / sigma) is solved
exactly, and x0 or the noise is taken for a polynomial of it. DPM-Solver, DPM-Solver++ and DEIS are their cases.

With h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t) (Lu et al. 2022, arXiv 2206.00927, eq. 3.4, and arXiv
2211.01095, eq. 8):

    x_s = (sigma_s / sigma_t) x_t + alpha_s  integral over [0, 1] of h e^(-h (1 - tau)) x0(tau)
    x_s = (alpha_s / alpha_t) x_t - sigma_s  integral over [0, 1] of h e^( h (1 - tau)) eps(tau)
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoised, Denoiser, Schedule
from diffusion.process.posterior import posterior
from diffusion.sampling.ode.first_order import Solver, eps_of, first_order, half_log_snr
from diffusion.sampling.ode.multistep import History, check_steps, differences, integrals

Prediction = Literal["x0", "eps"]


def kernel(prediction: Prediction, h: Array, tau: Array) -> Array:
    """What x0 or the noise is weighted with over a step of size h."""
    return h * jnp.exp((tau - 1 if prediction == "x0" else 1 - tau) * h)


def total(prediction: Prediction, h: Array) -> Array:
    """The integral of `kernel`."""
    return -jnp.expm1(-h) if prediction == "x0" else jnp.expm1(h)


def predicted(prediction: Prediction, schedule: Schedule, x: Array, x0: Array, t: Array) -> Array:
    """What is taken for a polynomial."""
    return x0 if prediction == "x0" else eps_of(schedule, x, x0, t)


def in_steps(nodes: Array, end: Array) -> tuple[Array, Array, Array]:
    """The step from `nodes[0]` to `end`, the nodes counted in it from its start, and whether it is finite. An
    infinite one, from pure noise or to the data, is of first order, and its size is given as 1."""
    h = end - nodes[0]
    finite = jnp.isfinite(h)
    h = jnp.where(finite, h, 1)
    return h, (nodes - nodes[0]) / h, finite


def correction(prediction: Prediction, schedule: Schedule, s: Array, values: Array, weights: Array) -> Array:
    """What is added to the first-order step to s for values that differ from the first of them, `[K, B, ...]`."""
    scale = schedule.alpha(s) if prediction == "x0" else -schedule.sigma(s)
    return scale * differences(values, weights)


@dataclasses.dataclass(frozen=True)
class Multistep(Solver):
    """Order 2 and 3 from the values at the points before. See `make` of `dpm_solver`, `dpm_solver_pp` and `deis`."""

    prediction: Prediction
    order: int
    sde: bool = False
    midpoint: bool = True

    @property
    def stochastic(self) -> bool:
        return self.sde

    def init(self, x: Array, times: Array) -> dict[str, Any]:
        steps = check_steps(times, self.order)
        index = np.arange(steps)
        rising = np.minimum(self.order, index + 1)
        # Towards the data short runs come down by one order a step, as published for stability.
        falling = np.minimum(rising, steps - index if steps < 15 else self.order)
        return {
            "x": x,
            "history": History.empty(self.order, x, times),
            "orders": jnp.where(times[-1] == 0, falling, rising),
            "index": jnp.int32(0),
        }

    def step(self, carry: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> dict:
        x, order = carry["x"], carry["orders"][carry["index"]]
        x0 = denoise(x, t).x0.astype(x.dtype)
        value = predicted(self.prediction, schedule, x, x0, t)
        history = carry["history"].push(value, half_log_snr(schedule, t))
        h, nodes, finite = in_steps(history.nodes, half_log_snr(schedule, s))
        valid = (jnp.arange(self.order) < jnp.where(finite, order, 1)) & jnp.isfinite(nodes)
        span = 2 * h if self.sde else h
        weights = integrals(nodes, valid, lambda tau: kernel(self.prediction, span, tau))
        if self.midpoint and self.order > 1:
            half = total(self.prediction, span) / 2 / jnp.where(valid[1], nodes[1], 1)
            weights = weights.at[1].set(jnp.where((order == 2) & valid[1], half, weights[1]))
        if self.sde:
            reverse = posterior(schedule, t, s)
            moved = reverse.from_x * x + reverse.from_x0 * x0
            moved += jnp.sqrt(reverse.beta_tilde) * normal(keys, x.shape[1:], x.dtype)
        else:
            moved = first_order(schedule, x, Denoised(x0), t, s)
        moved += correction(self.prediction, schedule, s, history.values, weights)
        return {**carry, "x": moved.astype(x.dtype), "history": history, "index": carry["index"] + 1}


@dataclasses.dataclass(frozen=True)
class Singlestep(Solver):
    """One step of the method goes over `order` steps of the grid, with one evaluation in each: at its start, and at
    inner points that stand at even parts of it in log-SNR, wherever the grid has them. See `make` of `dpm_solver` and
    `dpm_solver_pp`."""

    prediction: Prediction
    order: int
    midpoint: bool = True

    def init(self, x: Array, times: Array) -> dict[str, Any]:
        steps = check_steps(times, self.order)

        # A last step to either end of time may be infinite in log-SNR, and then can be but of first order.
        to_end = (times[-1] == 0) | (times[-1] == 1)

        def groups(steps: int) -> Array:
            return jnp.where(to_end, self._groups(steps, True), self._groups(steps, False))

        return {
            "x": x,
            "start": (x, x, times[0]),  # x, x0 and t where the step in progress began
            "values": jnp.zeros((self.order, *x.shape), x.dtype),  # of its points
            "t": times[0],
            "times": times,
            "groups": groups(steps),
            "groups_from_noise": jnp.concatenate([jnp.array([[0, 1]]), groups(steps - 1) + jnp.array([0, 1])]),
            "index": jnp.int32(0),
        }

    def _groups(self, steps: int, last_alone: bool) -> np.ndarray:
        """Of each step of the grid, its place in its group and the index of the time where that group ends, `[steps,
        2]`. If the last stands alone, the group it is cut from is a shorter one."""
        lengths = [self.order] * (steps // self.order) + [steps % self.order] * (steps % self.order > 0)
        if last_alone and lengths and lengths[-1] > 1:
            lengths[-1:] = [lengths[-1] - 1, 1]
        ends = np.cumsum(lengths)
        rows = [(place, end) for length, end in zip(lengths, ends, strict=True) for place in range(length)]
        return np.array(rows, np.int32).reshape(steps, 2)

    def step(self, carry: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> dict:
        index, times = carry["index"], carry["times"]
        # From pure noise the first step is infinite too, and stands alone.
        noise = ~jnp.isfinite(schedule.log_snr(times[0]))
        groups = jnp.where(noise, carry["groups_from_noise"], carry["groups"])
        place, end = groups[index]
        x, t = carry["x"], carry["t"]
        x0 = denoise(x, t).x0.astype(x.dtype)
        values = carry["values"].at[place].set(predicted(self.prediction, schedule, x, x0, t))
        start = tuple(jnp.where(place == 0, new, old) for new, old in zip((x, x0, t), carry["start"], strict=True))

        first, last = half_log_snr(schedule, start[2]), half_log_snr(schedule, times[end])
        length = end - index + place
        whole = jnp.where(jnp.isfinite(last - first), last - first, 1)
        inner = schedule.time(2 * (jnp.where(jnp.isfinite(first), first, 0) + whole * (place + 1) / length))
        s = jnp.where(index + 1 == end, times[end], inner).astype(times.dtype)

        h, slots = whole * (place + 1) / length, jnp.arange(self.order)
        nodes = (slots / (place + 1)).astype(times.dtype)
        # The paper's interpolants go through the first value and the newest alone.
        valid = (slots == 0) | (slots == place) | ((slots < place) & (not self.midpoint))
        weights = integrals(nodes, valid, lambda tau: kernel(self.prediction, h, tau))
        if self.midpoint:
            weights = jnp.where((slots == 1) & (place == 1), total(self.prediction, h), weights)
        moved = first_order(schedule, start[0], Denoised(start[1]), start[2], s)
        moved += correction(self.prediction, schedule, s, values, weights)
        return {**carry, "x": moved.astype(x.dtype), "t": s, "start": start, "values": values, "index": index + 1}
