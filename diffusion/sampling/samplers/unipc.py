"""UniPC: a predictor, and a corrector without further evaluations (Zhao et al. 2023, arXiv 2302.04867).

With v_0 the value (x0 or eps) at x_t, v_m that of a previous point, r_m = (lambda_m - lambda_t) / h, D_m = v_m - v_0:

    x0   x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) v_0 + alpha_s B(h) sum_m a_m D_m / r_m
    eps  x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1)  v_0 - sigma_s B(h) sum_m a_m D_m / r_m

The predictor UniP-p sums over p - 1 previous points. The corrector UniC-p adds the value at the predicted x_s, with
r_p = 1, once the next step has evaluated it. a = (a_m) solves R_p(h) a B(h) = phi_p(h), so that the sum is the exact
integral of the interpolating polynomial for every B(h); `quadrature_weights` computes B(h) a_m / r_m. With a single D_m
the paper sets a_1 = 1/2 (section 3.1), and the choice of B(h) matters.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from diffusion.core.types import Array, Denoised, Denoiser, InputError, Schedule
from diffusion.sampling.ode.exponential import (
    Prediction,
    correction,
    interpolated_value,
    kernel,
    kernel_integral,
    relative_nodes,
)
from diffusion.sampling.ode.first_order import Solver, first_order, half_log_snr
from diffusion.sampling.ode.multistep import History, check_steps, quadrature_weights


@dataclasses.dataclass(frozen=True)
class UniPC(Solver):
    """Corrects each step with the value at its end (UniC-p), then predicts the next from the corrected point (UniP-p).

    The model is not evaluated at the corrected point: the value at the predicted point is used for both.
    """

    order: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    prediction: Prediction = "x0"

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        steps = check_steps(times, self.order)
        return {
            "start": (x, x, times[index]),  # x, x0 and t at the start of the previous step
            "history": History.empty(self.order, x, times),
            "index": jnp.int32(index),
            # In runs to the data, the order of the last steps decreases by one per step.
            "last": jnp.where(times[-1] == 0, steps, steps + self.order),
        }

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        history, left = state["history"], state["last"] - state["index"]
        x0 = evaluated = denoise(x, t).x0.astype(x.dtype)
        value = interpolated_value(self.prediction, schedule, x, x0, t)
        order = jnp.minimum(history.count, left + 1)  # of the previous step, which led here
        corrected = self._step(schedule, state["start"], t, history, order, value)
        corrected = jnp.where(history.count > 0, corrected, x).astype(x.dtype)
        if "replaced" in state:
            corrected = jnp.where(state["replaced"], x, corrected)
        if self.prediction == "eps":
            # eps remains the model's output; x0 is the one that it implies at the corrected point.
            alpha = jnp.where(history.count > 0, schedule.alpha(t), 1)
            x0 = jnp.where(history.count > 0, (corrected - schedule.sigma(t) * value) / alpha, x0)
        x = corrected

        history = history.push(value, half_log_snr(schedule, t))
        order = jnp.minimum(history.count, left)
        start = x, x0, t
        moved = self._step(schedule, start, s, history, order).astype(x.dtype)
        return moved, evaluated, {**state, "start": start, "history": history, "index": state["index"] + 1}

    def replace(self, state: dict, old: Array, new: Array) -> dict:
        # The correction of the step that led to x must leave what has been replaced.
        return {**state, "replaced": old != new}

    def _step(
        self,
        schedule: Schedule,
        start: tuple[Array, Array, Array],
        s: Array,
        history: History,
        order: Array,
        end: Array | None = None,
    ) -> Array:
        """Returns x_s from x, x0 and t at the start of the step.

        Args:
          order: the number of values of the history that are interpolated, clipped to 1 to `self.order`.
          end: the value at the end of the step, for the corrector.
        """
        x, x0, t = start
        h, nodes, finite = relative_nodes(history.nodes, half_log_snr(schedule, s))
        values = history.values
        valid = jnp.arange(self.order) < jnp.where(finite, jnp.clip(order, 1, self.order), 1)
        if end is not None:
            nodes, values = jnp.append(nodes, 1), jnp.concatenate([values, end[None]])
            valid = jnp.append(valid, finite)
        valid &= jnp.isfinite(nodes)
        weights = quadrature_weights(nodes, valid, lambda tau: kernel(self.prediction, h, tau))
        # The weight of a single difference, B(h) / 2 divided by its node.
        half_b = (h if self.variant == "bh1" else kernel_integral(self.prediction, h)) / 2
        others = valid & (jnp.arange(len(nodes)) > 0)
        single = jnp.where(others, half_b / jnp.where(others, nodes, 1), 0)
        weights = jnp.where(jnp.sum(others) == 1, single, weights)
        moved = first_order(schedule, x, Denoised(x0), t, s)
        return moved + correction(self.prediction, schedule, s, values, weights)


def make(order: int = 2, variant: Literal["bh1", "bh2"] = "bh2", prediction: Literal["x0", "eps"] = "x0") -> UniPC:
    """Makes UniPC, with one evaluation per step; the corrector raises the order of accuracy by one.

    Args:
      order: 1, 2 or 3; the authors use 2 with guidance and 3 without.
      variant: B(h): h for `bh1`; e^h - 1 for eps and 1 - e^-h for x0 with `bh2`, which is better at few steps.
      prediction: the interpolated quantity, `x0` or the noise `eps`.
    """
    if not 1 <= order <= 3:
        raise InputError("order", f"must be 1, 2 or 3, got {order}")
    return UniPC(order, variant, prediction)
