"""The loss on held-out data at several noise levels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.arrays import expand, flat_mean, fold, normal, sample_keys
from diffusion.core.types import Array, Cond, InputError, Model, Params, Source
from diffusion.evaluation.reference import first_of


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOutLoss:
    """A `ModelMetric`; see `make`."""

    held_out: Source
    num: int
    log_snr: tuple[float, ...]
    batch_size: int
    kind = "model"

    @property
    def names(self) -> tuple[str, ...]:
        return ("held_out_loss", *(f"held_out_loss/log_snr_{level:g}" for level in self.log_snr))

    def __call__(self, model: Model, params: Params, key: Array) -> dict[str, float]:
        x0, cond = first_of(self.held_out, self.num)
        losses = []
        for start in range(0, len(x0), self.batch_size):
            # The last batch is filled up with the last example, so that all have one compiled size.
            indices = np.minimum(np.arange(start, start + min(self.batch_size, len(x0))), len(x0) - 1)
            batch = x0[indices], jax.tree.map(lambda value, rows=indices: value[rows], cond)
            losses.append(np.asarray(self._losses(model, params, *batch, sample_keys(key, jnp.asarray(indices)))))
        means = np.concatenate(losses, axis=1)[:, : len(x0)].mean(axis=1, dtype=np.float64)
        return {name: float(value) for name, value in zip(self.names, (means.mean(), *means), strict=True)}

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _losses(self, model: Model, params: Params, x0: Array, cond: Cond, keys: Array) -> Array:
        """Returns the loss at each noise level, `[levels, B]`."""
        denoise, schedule = model(params)
        lowest = schedule.log_snr(jnp.float32(1))

        def loss(level: tuple[Array, Array]) -> Array:
            index, log_snr = level
            t = schedule.time(jnp.maximum(log_snr, lowest))
            eps = normal(fold(keys, index), x0.shape[1:])
            x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
            ratio = expand(schedule.alpha(t) / schedule.sigma(t), x0)
            return flat_mean((ratio * (x0 - denoise(x_t, t, cond).x0)) ** 2)

        return jax.lax.map(loss, (jnp.arange(len(self.log_snr)), jnp.asarray(self.log_snr, jnp.float32)))


def make(
    train: Source,
    held_out: Source,
    num: int = 1000,
    log_snr: tuple[float, ...] = (6.0, 3.0, 0.0, -3.0, -6.0),
    batch_size: int = 250,
) -> HeldOutLoss:
    """Builds the metric: the mean squared error of eps, (alpha / sigma)^2 |x0 - D(x_t)|^2 per dimension.

    It is comparable between objectives and parameterizations. The noise is the same at every call, so that differences
    between checkpoints are not noise. `held_out_loss` is the mean over the levels.

    Args:
      num: Number of held-out examples; the first ones are used.
      log_snr: The noise levels, log(alpha^2 / sigma^2). Those below the schedule's last one are replaced by it.
      batch_size: Number of examples computed at once.
    """
    checks.at_least(1, num=num, batch_size=batch_size)
    if not log_snr or len(set(log_snr)) < len(log_snr):
        raise InputError("log_snr", f"must be one or more different numbers, got {log_snr}")
    return HeldOutLoss(held_out, num, log_snr, batch_size)
