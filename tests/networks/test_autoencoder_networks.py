"""Networks that are autoencoders: sizes, refusals, and closed forms of what is between the encoder and the decoder.

`encoders/test_autoencoder_folders.py` compares them with those of diffusers.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.layers.functional import split
from diffusion.networks.autoencoder_vq import Codebook, Rounding
from tests.refusals import refused

TRUNK = {"block_out_channels": (6, 12), "layers_per_block": 1, "norm_num_groups": 3}
KL = TRUNK | {"name": "autoencoder_kl", "latent_channels": 2}
VQ = TRUNK | {"name": "autoencoder_vq", "latent_channels": 3, "num_vq_embeddings": 16, "vq_embed_dim": 2}
TINY = {"name": "autoencoder_tiny"}


@pytest.mark.parametrize(
    ("name", "tensors", "parameters", "latent"),
    [
        ("autoencoder_kl", 248, 83_653_863, (8, 8, 4)),  # Stable Diffusion 1.5
        ("autoencoder_vq", 205, 55_322_782, (16, 16, 3)),  # VQ-f4 with attention in the middle
        ("autoencoder_tiny", 134, 2_445_063, (8, 8, 4)),  # TAESD
    ],
)
def test_the_defaults_have_the_published_sizes(name, tensors, parameters, latent):
    network = build("networks", name, shape=(64, 64, 3))
    params = jax.eval_shape(network.init, jax.random.key(0))
    leaves = jax.tree.leaves(params)
    assert (len(leaves), sum(math.prod(leaf.shape) for leaf in leaves)) == (tensors, parameters)
    assert network.apply.latent_shape == latent
    last = functools.reduce(lambda tree, key: tree[key], network.apply.last_layer, params)
    assert last["kernel"].shape[-1] == 3
    with refused("network.name"):
        network.apply(params, np.zeros((1, 64, 64, 3)), np.zeros(1), {})
    for size in ((65, 64, 3), (64, 64, 1)):
        with refused("network.x"):
            network.apply.encode(params, np.zeros((1, *size), np.float32))
    with refused("network.z"):
        network.apply.decode(params, np.zeros((1, 8, 8, 5), np.float32))


@pytest.mark.parametrize(
    ("section", "field"),
    [
        (KL | {"block_out_channels": ()}, "block_out_channels"),
        (KL | {"block_out_channels": (6,) * 4}, "block_out_channels"),  # 12 pixels
        (KL | {"norm_num_groups": 4}, "norm_num_groups"),
        (KL | {"layers_per_block": 0}, "layers_per_block"),
        (KL | {"latent_channels": 0}, "latent_channels"),
        (VQ | {"vq_embed_dim": 0}, "vq_embed_dim"),
        (VQ | {"num_vq_embeddings": 1}, "num_vq_embeddings"),
        (VQ | {"fsq_levels": (4, 1)}, "fsq_levels"),
        (VQ | {"fsq_levels": (4, 3, 2)}, "fsq_levels"),
        (TINY | {"encoder_block_out_channels": (4, 8)}, "encoder_block_out_channels"),
        (TINY | {"encoder_block_out_channels": (4, 4)}, "num_encoder_blocks"),
        (TINY | {"encoder_block_out_channels": (4, 4), "num_encoder_blocks": (1, 5000)}, "num_encoder_blocks"),
        (TINY | {"encoder_block_out_channels": (4, 4), "num_encoder_blocks": (1, 1)}, "decoder_block_out_channels"),
    ],
)
def test_an_invalid_option_is_named(section, field):
    with refused(f"networks.{field}"):
        build("networks", section, shape=(12, 8, 3))


def test_posterior():
    """z = mean + exp(log-variance / 2) eps, and the log-variance is limited to [-30, 20]."""
    moments = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    moments[0, 0, 0] = 0, 0, -100, 100
    mean, log_variance = moments[..., :2], np.clip(moments[..., 2:], -30, 20)
    key = jax.random.key(1)
    z = mean + np.exp(log_variance / 2.0) * np.asarray(jax.random.normal(key, mean.shape))
    sample = build("networks", KL, shape=(12, 8, 3)).apply.sample
    np.testing.assert_array_equal(sample(moments, None), mean)
    np.testing.assert_allclose(sample(moments, key), z, rtol=1e-5)


def test_the_nearest_code_replaces_a_vector():
    """The gradient passes it unchanged, and the codebook's gradient is that of the codes."""
    init, merge = split(lambda rngs: Codebook(16, 2, rngs=rngs))
    initial = init(jax.random.key(0))["embedding"]["embedding"]
    assert initial.shape == (16, 2) and 0.05 < abs(initial).max() <= 1 / 16  # uniform
    rng = np.random.default_rng(1)
    z, weights = (rng.normal(size=(2, 3, 4, 2)).astype(np.float32) / 4 for _ in range(2))
    codebook = rng.normal(size=(16, 2)).astype(np.float32) / 4
    nearest = np.argmin(((z[..., None, :] - codebook) ** 2).sum(-1), axis=-1)

    @jax.jit
    def results(codebook, z):
        def quantize(codebook, z):
            return merge({"embedding": {"embedding": codebook}})(z)

        _, pullback = jax.vjp(lambda codebook, z: quantize(codebook, z)[:2], codebook, z)
        zeros = jnp.zeros_like(weights)
        return quantize(codebook, z), pullback((weights, zeros)), pullback((zeros, weights))

    quantized, of_vectors, of_codes = results(codebook, z)
    np.testing.assert_array_equal(quantized.indices, nearest)
    np.testing.assert_array_equal(quantized.vectors, codebook[nearest])
    summed = np.zeros_like(codebook)
    np.add.at(summed, nearest, weights)
    for grads, to_codebook, to_z in ((of_vectors, 0 * summed, weights), (of_codes, summed, 0 * weights)):
        np.testing.assert_allclose(grads[0], to_codebook, atol=1e-6)
        np.testing.assert_array_equal(grads[1], to_z)


def test_rounding():
    """Every level of both components is reached, each pair has its number, and the gradient is that of tanh."""
    axis = np.linspace(-5, 5, 101, dtype=np.float32)
    z = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)

    @jax.jit
    def results(z):
        rounding = Rounding((4, 3))
        return rounding(z), jax.grad(lambda z: rounding(z).vectors.sum())(z)

    quantized, slopes = results(z)
    for component, levels in ((0, [-1, -0.5, 0, 0.5]), (1, [-1, 0, 1])):
        np.testing.assert_array_equal(np.unique(quantized.codes[..., component]), levels)
    codes = np.asarray(quantized.codes).reshape(-1, 2)
    pairs = {(int(number), *map(float, code)) for number, code in zip(np.ravel(quantized.indices), codes, strict=True)}
    assert len(pairs) == 12 and {pair[0] for pair in pairs} == set(range(12))
    np.testing.assert_array_equal(quantized.vectors, quantized.codes)
    half = 0.999 * np.array([1.5, 1.0])
    shift = np.tan([0.5 / half[0], 0])
    expected = half * (1 - np.tanh(z + shift) ** 2) / np.array([2, 1])
    np.testing.assert_allclose(slopes, expected, atol=1e-5)
