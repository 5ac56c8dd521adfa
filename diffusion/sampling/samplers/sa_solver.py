"""SA-Solver: stochastic Adams predictor and corrector on the reverse SDE (Xue et al. 2023, arXiv 2309.05019).

With v_k the values of x0 at the last points (a corrector adds v_-1, at the end of the step, predicted), l_k the
Lagrange basis through their lambda_k, and tau the amount of noise, constant in a step:

    x_s = (sigma_s / sigma_t) e^(-tau^2 h) x_t + sum_k b_k v_k + sigma_s sqrt(1 - e^(-2 tau^2 h)) z
    b_k = alpha_s  integral from lambda_t to lambda_s of (1 + tau^2) e^(-(1 + tau^2) (lambda_s - lambda)) l_k(lambda)

(eq. 14 to 17). The corrector repeats the step with the same z. With two values, the weight of their difference is
(1 + tau^2) h / 2 in units of the distance, instead of the integral, as in the published code. tau = 0 is UniPC's
scheme.
"""

from typing import Literal

from diffusion.core import checks
from diffusion.core.types import InputError
from diffusion.sampling.ode.predict_correct import PredictCorrect


def make(
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    low: float = 0.2,
    high: float = 0.8,
    prediction: Literal["x0", "eps"] = "x0",
    lower_order_final: bool | None = None,
) -> PredictCorrect:
    """Makes SA-Solver, with one evaluation per step.

    Args:
      predictor_order: from 1 to 4: the number of interpolated values.
      corrector_order: from 2 to 4: the same with the value at the end of the step.
      tau: 1 is the noise of the reverse SDE, 0 the ODE.
      low, high: the times in [0, 1] between which the step adds noise; elsewhere tau is 0.
      prediction: the interpolated quantity, `x0` or the noise `eps`.
      lower_order_final: as in `unipc`.
    """
    if not 1 <= predictor_order <= 4:
        raise InputError("predictor_order", f"must be 1, 2, 3 or 4, got {predictor_order}")
    if not 2 <= corrector_order <= 4:
        raise InputError("corrector_order", f"must be 2, 3 or 4, got {corrector_order}")
    checks.at_least(0, tau=tau)
    if not 0 <= low <= high <= 1:
        raise InputError("low", f"must be at least 0 and at most high, which is at most 1; got {low} and {high}")
    single_weight = "bh1" if prediction == "x0" else "exact"
    return PredictCorrect(
        predictor_order, corrector_order - 1, single_weight, prediction, tau, low, high, lower_order_final
    )
