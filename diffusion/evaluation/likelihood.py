"""The likelihood of held-out data under a model, by the probability-flow ODE and by the variational bound."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.types import Array, Cond, InputError, Model, Params, Source
from diffusion.evaluation import log_likelihood
from diffusion.evaluation.reference import first_of


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """A `ModelMetric`: the mean of -log p, in nats per dimension, or in bits per dimension if the data is discrete.

    Its values are
      nll: By the probability-flow ODE.
      bound: The variational upper bound.
      entropy: By the true density of the data, if the data has a `log_density`.
    """

    held_out: Source
    num: int
    steps: int
    bound_steps: int
    trace: Literal["exact", "hutchinson"]
    levels: int | None
    log_snr: tuple[float, float]
    kind = "model"

    @property
    def names(self) -> tuple[str, ...]:
        return ("nll", "bound", "entropy") if hasattr(self.held_out, "log_density") else ("nll", "bound")

    def __call__(self, model: Model, params: Params, key: Array) -> dict[str, float]:
        x0, cond = first_of(self.held_out, self.num)
        _, schedule = model(params)
        high, low = self.log_snr
        end = jnp.maximum(schedule.log_snr(jnp.float32(1)), low)
        times = schedule.time(jnp.linspace(high, end, self.bound_steps + 1))
        measured = self._measure(model, float(jnp.std(x0)), params, x0, cond, times, key)
        nll, bound = (np.asarray(value, np.float64) for value in measured)
        unit = np.log(2) if self.levels else 1.0
        results = {"nll": nll.mean() / unit, "bound": bound.mean() / unit}
        if "entropy" in self.names:
            results["entropy"] = -np.mean(self.held_out.log_density(x0)) / x0[0].size
        return {name: float(value) for name, value in results.items()}

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def _measure(
        self, model: Model, data_std: float, params: Params, x0: Array, cond: Cond, times: Array, key: Array
    ) -> tuple[Array, Array]:
        """Returns the negative log-likelihood by the ODE and the bound, in nats per dimension, `[B]`."""
        denoise, schedule = model(params)
        dims = x0[0].size
        key_spread, key_trace, key_bound = jax.random.split(key, 3)
        spread, offset = x0, 0.0
        if self.levels:
            spread, offset = log_likelihood.dequantize(x0, key_spread, self.levels)
        density = log_likelihood.ode_log_likelihood(
            lambda x, t: denoise(x, t, cond), schedule, spread, key_trace, steps=self.steps, trace=self.trace,
            data_std=data_std, log_snr=self.log_snr,
        )  # fmt: skip
        bound = log_likelihood.variational_bound(
            lambda x, t: denoise(x, t, cond), schedule, x0, key_bound, times, levels=self.levels
        )
        return -density / dims - offset, bound["total"] / dims


def make(
    train: Source,
    held_out: Source,
    num: int = 2000,
    steps: int = 200,
    bound_steps: int = 1000,
    trace: Literal["exact", "hutchinson"] = "exact",
    levels: int | None = None,
    log_snr: tuple[float, float] = (9.0, -10.0),
) -> Likelihood:
    """Builds the metric.

    Args:
      num: Number of held-out examples; the first ones are used.
      steps: Number of steps of the ODE solver.
      bound_steps: Number of steps of the variational bound's chain.
      trace: How to compute the trace of the ODE's Jacobian: `exact` for few dimensions, `hutchinson` for images.
      levels: Number of values of a channel of discrete data, evenly spaced from -1 to 1; None for a density.
      log_snr: Log-SNRs at which x is treated as clean and as pure noise. For a density with details of scale s, the
        first causes an error of about (exp(-log_snr) / s^2)^2 / 4 nats per dimension.
    """
    checks.at_least(1, num=num, steps=steps, bound_steps=bound_steps)
    checks.at_least(2, levels=levels)
    if log_snr[0] <= log_snr[1]:
        raise InputError("log_snr", f"must be decreasing, from clean to noisy, got {log_snr}")
    return Likelihood(held_out, num, steps, bound_steps, trace, levels, log_snr)
