"""UniPC: a predictor like DPM-Solver++'s, and a corrector that costs no evaluation (Zhao et al. 2023, arXiv
2302.04867)."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from diffusion.core.types import Array, Denoised, Denoiser, InputError, Schedule
from diffusion.sampling.ode.exponential import Prediction, correction, in_steps, kernel, predicted, total
from diffusion.sampling.ode.first_order import Solver, first_order, half_log_snr
from diffusion.sampling.ode.multistep import History, check_steps, integrals


@dataclasses.dataclass(frozen=True)
class UniPC(Solver):
    """The value at the predicted point, once it is known, redoes the step that led there (UniC-p), and then leads on
    from the point so corrected (UniP-p); its own point is not asked again."""

    order: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    prediction: Prediction = "x0"

    def init(self, x: Array, times: Array) -> dict[str, Any]:
        steps = check_steps(times, self.order)
        return {
            "x": x,
            "start": (x, x, times[0]),  # x, x0 and t where the last step began
            "history": History.empty(self.order, x, times),
            "index": jnp.int32(0),
            # Towards the data, the last steps come down by one order each.
            "last": jnp.where(times[-1] == 0, steps, steps + self.order),
        }

    def step(self, carry: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> dict:
        x, history, index = carry["x"], carry["history"], carry["index"]
        x0 = denoise(x, t).x0.astype(x.dtype)
        value = predicted(self.prediction, schedule, x, x0, t)
        count = jnp.minimum(index, carry["last"] - index + 1)  # the order of the step that led here
        corrected = self._step(schedule, carry["start"], t, history, count, value)
        corrected = jnp.where(index > 0, corrected, x).astype(x.dtype)
        if self.prediction == "eps":
            # The value stays the one that the model gave; x0 is what it makes of the corrected point.
            alpha = jnp.where(index > 0, schedule.alpha(t), 1)
            x0 = jnp.where(index > 0, (corrected - schedule.sigma(t) * value) / alpha, x0)
        x = corrected

        history = history.push(value, half_log_snr(schedule, t))
        count = jnp.minimum(index + 1, carry["last"] - index)
        start = x, x0, t
        moved = self._step(schedule, start, s, history, count).astype(x.dtype)
        return {**carry, "x": moved, "start": start, "history": history, "index": index + 1}

    def _step(
        self,
        schedule: Schedule,
        start: tuple[Array, Array, Array],
        s: Array,
        history: History,
        count: Array,
        end: Array | None = None,
    ) -> Array:
        """x_s from the start of the step, by the polynomial through `count` values up to it (at most `order`), and
        through the value at its end if that is known."""
        x, x0, t = start
        h, nodes, finite = in_steps(history.nodes, half_log_snr(schedule, s))
        values = history.values
        valid = jnp.arange(self.order) < jnp.where(finite, jnp.clip(count, 1, self.order), 1)
        if end is not None:
            nodes, values = jnp.append(nodes, 1), jnp.concatenate([values, end[None]])
            valid = jnp.append(valid, finite)
        valid &= jnp.isfinite(nodes)
        weights = integrals(nodes, valid, lambda tau: kernel(self.prediction, h, tau))
        # With one value beside the first, the weight is B(h) / 2 over its node (section 3.1); with more, those of the
        # interpolating polynomial, in which B cancels.
        simple = (h if self.variant == "bh1" else total(self.prediction, h)) / 2
        beside = valid & (jnp.arange(len(nodes)) > 0)
        single = jnp.where(beside, simple / jnp.where(beside, nodes, 1), 0)
        weights = jnp.where(jnp.sum(beside) == 1, single, weights)
        moved = first_order(schedule, x, Denoised(x0), t, s)
        return moved + correction(self.prediction, schedule, s, values, weights)


def make(order: int = 2, variant: Literal["bh1", "bh2"] = "bh2", prediction: Literal["x0", "eps"] = "x0") -> UniPC:
    """One evaluation a step; the corrector raises the order of accuracy by one.

    Args:
      order: 1, 2 or 3; 2 is the authors' choice with guidance, 3 without.
      variant: B(h) = h (`bh1`) or e^h - 1 (`bh2`, better at few steps).
      prediction: what is interpolated, `x0` or the noise `eps`.
    """
    if not 1 <= order <= 3:
        raise InputError("order", f"must be 1, 2 or 3, got {order}")
    return UniPC(order, variant, prediction)
