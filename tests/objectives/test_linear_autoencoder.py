"""Linear autoencoders, trained by the objective on data of a known covariance, reach their optima in closed form.

Without KL it is the reconstruction from the first principal components. With KL and kl_weight = 2 sigma^2 the loss is
-2 sigma^2 times the evidence lower bound of a decoder with the variance sigma^2, up to a constant; its maximum is
the likelihood of probabilistic PCA (Tipping & Bishop 1999; Lucas et al. 2019, arXiv 1911.02469).
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Network
from diffusion.layers.autoencoder import AutoencoderApply
from diffusion.networks import autoencoder_kl
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.state import init_state
from diffusion.training.step import make_step

SHAPE, D, B = (2, 4, 1), 8, 256
VARIANCES = np.array([4.0, 2.0, 1.0, 0.3, 0.2, 0.1, 0.05, 0.02])  # of the principal components


def linear(variational):
    """Returns the functions of an affine encoder and decoder of flattened images; the variances are constant."""

    def merge(params):
        def encode(x):
            z = x.reshape(len(x), 1, 1, D) @ params["A"] + params["a"]
            return jnp.concatenate([z, jnp.broadcast_to(params["log_variance"], z.shape)], -1) if variational else z

        return types.SimpleNamespace(
            encode=encode, features=lambda z: z, output=lambda h: (h @ params["W"] + params["w"]).reshape(-1, *SHAPE)
        )

    kind, width = (autoencoder_kl.Apply, 4) if variational else (AutoencoderApply, 3)

    def init(key):
        keys = jax.random.split(key)
        params = {"A": jax.random.normal(keys[0], (D, width)) / D, "W": jax.random.normal(keys[1], (width, D)) / D}
        return params | {"a": jnp.zeros(width), "w": jnp.zeros(D), "log_variance": jnp.zeros(width)}

    return Network(init, kind("linear", merge, SHAPE, (1, 2, width), ()))


@pytest.fixture(scope="module")
def data():
    """Rows whose mean and covariance, with its eigenvectors, are exact."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(B, D))
    white -= white.mean(0)
    white @= np.linalg.inv(np.linalg.cholesky(white.T @ white / B)).T
    directions = np.linalg.qr(rng.normal(size=(D, D)))[0]
    mean = rng.normal(size=D)
    return mean + white * np.sqrt(VARIANCES) @ directions.T, mean, directions


def trained(network, x, steps, learning_rate, **options):
    """Returns the parameters and the last metrics."""
    objective = build("objectives", {"name": "autoencoder", "loss": "l2", **options})
    optimizer = make_optimizer(steps=steps, name="adam", learning_rate=learning_rate, schedule="cosine", clip=None)
    averages = make_ema(decays=(0.9,))
    step = make_step(objective, network, optimizer, averages, seed=0)
    batch = {"x": jnp.asarray(x.reshape(-1, *SHAPE), jnp.float32), "cond": {}}

    @jax.jit
    def run():
        state = init_state(objective, network, optimizer, averages, jax.random.key(0))
        return jax.lax.scan(lambda state, _: step(state, batch), state, length=steps)

    state, metrics = run()
    return jax.tree.map(np.float64, state.params["net"]), jax.tree.map(lambda values: values[-1], metrics)


def test_principal_components(data):
    x, mean, directions = data
    params, metrics = trained(linear(False), x, 2000, 0.03)
    np.testing.assert_allclose(metrics["error"], VARIANCES[3:].sum() / D, rtol=1e-4)
    projection = params["A"] @ params["W"]
    np.testing.assert_allclose(projection, directions[:, :3] @ directions[:, :3].T, atol=2e-3)
    np.testing.assert_allclose(params["a"] @ params["W"] + params["w"], mean - mean @ projection, atol=2e-3)


def test_probabilistic_principal_components(data):
    """The components with less variance than sigma^2 are not used: the fourth latent has its prior as posterior."""
    x, mean, directions = data
    noise = 0.5
    params, metrics = trained(linear(True), x, 2000, 0.03, kl_weight=2 * noise)
    z, variance = x @ params["A"] + params["a"], np.exp(params["log_variance"])
    error = ((x - z @ params["W"] - params["w"]) ** 2).sum(1) + variance @ (params["W"] ** 2).sum(1)
    kl = 0.5 * (z**2 + variance - 1 - np.log(variance)).sum(1)
    np.testing.assert_allclose([metrics["error"], metrics["kl"]], [error.mean(), kl.mean()], rtol=0.05)
    bound = -np.mean(error / (2 * noise) + D / 2 * np.log(2 * np.pi * noise) + kl)
    covariance = directions * np.maximum(VARIANCES * (np.arange(D) < 3), noise) @ directions.T
    _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
    likelihood = -(log_det + np.einsum("bi,ij,bj->b", x - mean, np.linalg.inv(covariance), x - mean).mean()) / 2
    assert 0 <= likelihood - bound <= 1e-3
    order = np.argsort(variance)
    np.testing.assert_allclose(variance[order], [*(noise / VARIANCES[:3]), 1], rtol=0.02)
    # W is that of probabilistic PCA without a rotation, which only diagonal posteriors leave out.
    columns = params["W"][order] * np.sign((params["W"][order] * directions[:, :4].T).sum(1))[:, None]
    expected = np.sqrt(np.maximum(VARIANCES[:4] - noise, 0))[:, None] * directions[:, :4].T
    np.testing.assert_allclose(columns, expected, atol=0.03)
