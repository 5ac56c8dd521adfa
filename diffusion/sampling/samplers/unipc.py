"""UniPC: a predictor, and a corrector without further evaluations (Zhao et al. 2023, arXiv 2302.04867).

With v_0 the value (x0 or eps) at x_t, v_m that of a previous point, r_m = (lambda_m - lambda_t) / h, D_m = v_m - v_0:

    x0   x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) v_0 + alpha_s B(h) sum_m a_m D_m / r_m
    eps  x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1)  v_0 - sigma_s B(h) sum_m a_m D_m / r_m

The predictor UniP-p sums over p - 1 previous points. The corrector UniC-p adds the value at the predicted x_s, with
r_p = 1, once the next step has evaluated it. a = (a_m) solves R_p(h) a B(h) = phi_p(h), so that the sum is the exact
integral of the interpolating polynomial for every B(h); `quadrature_weights` computes B(h) a_m / r_m. With a single D_m
the paper sets a_1 = 1/2 (section 3.1), and the choice of B(h) matters.
"""

from typing import Literal

from diffusion.core.types import InputError
from diffusion.sampling.ode.predict_correct import PredictCorrect


def make(
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    prediction: Literal["x0", "eps"] = "x0",
    lower_order_final: bool | None = None,
) -> PredictCorrect:
    """Makes UniPC, with one evaluation per step; the corrector raises the order of accuracy by one.

    Args:
      order: 1, 2 or 3; the authors use 2 with guidance and 3 without.
      variant: B(h): h for `bh1`; e^h - 1 for eps and 1 - e^-h for x0 with `bh2`, which is better at few steps.
      prediction: the interpolated quantity, `x0` or the noise `eps`.
      lower_order_final: whether the order falls to 1 at the end of a run, for stability. None stands for runs that end
        in data.
    """
    if not 1 <= order <= 3:
        raise InputError("order", f"must be 1, 2 or 3, got {order}")
    return PredictCorrect(order, order, variant, prediction, lower_order_final=lower_order_final)
