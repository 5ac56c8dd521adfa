"""The predictor-corrector scheme without further evaluations, which `unipc` and `sa_solver` share."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoised, Denoiser, Schedule
from diffusion.sampling.ode.exponential import (
    Prediction,
    correction,
    exponential_step,
    interpolated_value,
    kernel,
    kernel_integral,
    relative_nodes,
)
from diffusion.sampling.ode.first_order import Solver, half_log_snr
from diffusion.sampling.ode.multistep import History, highest_orders, quadrature_weights


@dataclasses.dataclass(frozen=True)
class PredictCorrect(Solver):
    """Corrects each step with the value at its end, then predicts the next step from the corrected point.

    The model is not evaluated at the corrected point: the value at the predicted point is used for both.

    Attributes:
      predictor_order: the number of values that the predictor interpolates.
      corrector_order: the number of previous values that the corrector interpolates together with the one at the end.
      single_weight: the weight of the difference where there is one: `bh1` and `bh2` are those of UniPC, with the step
        (1 + eta) h in place of h; `exact` is the integral of the polynomial.
      prediction: the interpolated quantity.
      tau: the square root of eta, the amount of noise: 1 for the reverse SDE, 0 for the ODE.
      low, high: the times between which tau is not 0. The noise of a correction is that of the prediction.
      lower_order_final: whether the order decreases by one per step at the end; by default in runs to the data.
    """

    predictor_order: int
    corrector_order: int
    single_weight: Literal["bh1", "bh2", "exact"] = "bh2"
    prediction: Prediction = "x0"
    tau: float = 0.0
    low: float = 0.0
    high: float = 1.0
    lower_order_final: bool | None = None

    @property
    def stochastic(self) -> bool:
        return self.tau > 0

    @property
    def _length(self) -> int:
        return max(self.predictor_order, self.corrector_order)

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        noise = jnp.zeros_like(x) if self.tau else None
        return {
            "start": (x, x, times[index], noise),  # of the previous step: x, x0 and t at its start, and its noise
            "history": History.empty(self._length, x, times),
            "index": jnp.int32(index),
            "orders": highest_orders(times, self._length, self.lower_order_final),
        }

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        history, index, orders = state["history"], state["index"], state["orders"]
        x0 = evaluated = denoise(x, t).x0.astype(x.dtype)
        value = interpolated_value(self.prediction, schedule, x, x0, t)
        # The step that led here is corrected.
        order = jnp.minimum(jnp.minimum(history.count, self.corrector_order), orders[jnp.maximum(index - 1, 0)])
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
        order = jnp.minimum(jnp.minimum(history.count, self.predictor_order), orders[index])
        start = x, x0, t, normal(keys, x.shape[1:], x.dtype) if self.tau else None
        moved = self._step(schedule, start, s, history, order).astype(x.dtype)
        return moved, evaluated, {**state, "start": start, "history": history, "index": index + 1}

    def replace(self, state: dict, old: Array, new: Array) -> dict:
        # The correction of the step that led to x must leave what has been replaced.
        return {**state, "replaced": old != new}

    def _step(
        self,
        schedule: Schedule,
        start: tuple[Array, Array, Array, Array | None],
        s: Array,
        history: History,
        order: Array,
        end: Array | None = None,
    ) -> Array:
        """Returns x_s from x, x0, t and the noise at the start of the step.

        Args:
          order: the number of values of the history that are interpolated, at least 1.
          end: the value at the end of the step, for the corrector.
        """
        x, x0, t, noise = start
        eta = jnp.where((t >= self.low) & (t <= self.high), self.tau**2, 0).astype(t.dtype) if self.tau else 0.0
        h, nodes, finite = relative_nodes(history.nodes, half_log_snr(schedule, s))
        values = history.values
        valid = jnp.arange(len(nodes)) < jnp.where(finite, jnp.maximum(order, 1), 1)
        if end is not None:
            nodes, values = jnp.append(nodes, 1), jnp.concatenate([values, end[None]])
            valid = jnp.append(valid, finite)
        valid &= jnp.isfinite(nodes)
        weights = quadrature_weights(nodes, valid, lambda tau: kernel(self.prediction, h, tau, eta))
        if self.single_weight != "exact":  # B(h) / 2 divided by the node
            half_b = ((1 + eta) * h if self.single_weight == "bh1" else kernel_integral(self.prediction, h, eta)) / 2
            others = valid & (jnp.arange(len(nodes)) > 0)
            single = jnp.where(others, half_b / jnp.where(others, nodes, 1), 0)
            weights = jnp.where(jnp.sum(others) == 1, single, weights)
        moved = exponential_step(self.prediction, schedule, x, Denoised(x0), t, s, eta, noise)
        return moved + correction(self.prediction, schedule, s, values, weights)
