"""Learned uncertainty weighting: the loss e^-u error + u, where u(t) is learned with the network (Karras et al. 2023,
arXiv 2312.02696, eq. 14).

The best u is the log of the mean error of a noise level, with which the gradients of all levels have the same size. It
is a linear function of random Fourier features of the noise level. Sampling does not use it.
"""

import jax.numpy as jnp

from diffusion.core.types import Array, Params, Schedule
from diffusion.layers.embeddings import fourier

FEATURES = 128  # Fourier features of the noise level
MAX_LOG_SNR = 50.0  # the features clip the log-SNR to this magnitude, because it is infinite at the ends


def init() -> Params:
    """Returns the parameters of u = 0."""
    return {"kernel": jnp.zeros(FEATURES)}


def log_error(params: Params, schedule: Schedule, t: Array) -> Array:
    """Returns u, the estimated log of the mean error at times t of any shape."""
    label = -jnp.clip(schedule.log_snr(t), -MAX_LOG_SNR, MAX_LOG_SNR) / 8  # log(sigma / alpha) / 4
    return -(fourier(jnp.ravel(label), FEATURES, scale=1.0) @ params["kernel"]).reshape(t.shape)


def weighted(params: Params, schedule: Schedule, t: Array, error: Array) -> Array:
    """Returns e^-u error + u for the errors at times t, which have its shape."""
    u = log_error(params, schedule, t)
    return jnp.exp(-u) * error + u
