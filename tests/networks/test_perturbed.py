"""Networks with perturbed blocks: which blocks change, and how."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Perturbation
from diffusion.layers.attention import attend, attention, blur_matrix
from tests.refusals import refused
from tests.tiers import slow_except

X = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype(np.float32)
INPUTS = X, np.float32([10, 300]), {"label": np.array([0, 2])}
U_NET = {"width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "head_dim": 8}
OPTIONS = {
    "unet": U_NET,
    "edm2": U_NET,
    "dit": {"width": 8, "depth": 3, "num_heads": 2, "patch_size": 2},
    "uvit": {"width": 8, "depth": 3, "num_heads": 2, "patch_size": 2},
}
# The blocks in the order of the forward pass: the path of the parameters, and the index in their stack.
U_NET_BLOCKS = [(("down", "1_0"), ...), (("middle", "first"), ...), (("up", "1_0"), ...), (("up", "1_1"), ...)]
BLOCKS = {
    "unet": [((*path, "attention"), index) for path, index in U_NET_BLOCKS],
    "edm2": U_NET_BLOCKS,
    "dit": [(("blocks", "blocks"), index) for index in range(3)],
    "uvit": [(("in_blocks", "blocks"), 0), (("in_blocks", "blocks"), 1), (("out_blocks", "blocks"), 0)],
}
MIDDLE = 1  # of each of them


def built(name, **options):
    return build("networks", {"name": name, **OPTIONS[name], **options}, shape=(8, 8, 1), num_classes=3)


@functools.cache
def network_of(name):
    """Returns a small network and parameters of which none is zero."""
    network = built(name)
    rng = np.random.default_rng(0)
    params = jax.jit(network.init)(jax.random.key(0))
    return network, jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)


def kernel_of(params, name, number):
    """Returns the kernel of queries, keys and values of a block, `[C, 3, C]`."""
    path, index = BLOCKS[name][number]
    leaves = functools.reduce(dict.__getitem__, (*path, "qkv"), params)
    kernel = np.asarray(leaves["kernel" if "kernel" in leaves else "weight"])[index]
    return kernel.reshape(kernel.shape[0], 3, -1)


@pytest.mark.parametrize(
    ("name", "layers"),
    slow_except([("dit", (0, 2))], [(name, layers) for name in OPTIONS for layers in ((), (0, 2))]),
)
def test_identity_ignores_queries_and_keys_of_its_blocks_alone(name, layers):
    network, params = network_of(name)
    apply = network.perturbed(Perturbation("identity", layers))
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(apply(params, *INPUTS) ** 2)))(params)
    for number in range(len(BLOCKS[name])):
        to_queries, to_keys, to_values = (abs(kernel_of(gradient, name, number)[:, part]).max() for part in range(3))
        assert to_values > 0
        changed = number in (layers or (MIDDLE,))
        assert (to_queries == 0) == changed and (to_keys == 0) == changed, number


@pytest.mark.parametrize("name", slow_except(["uvit"], OPTIONS))
def test_blur_changes_its_block_alone(name):
    """A blur that is too narrow to reach the neighbours changes nothing; a wide one does."""
    network, params = network_of(name)

    def of(sigma, layers):
        return jax.jit(network.perturbed(Perturbation("blur", layers, sigma)))(params, *INPUTS)

    plain = jax.jit(network.apply)(params, *INPUTS)
    np.testing.assert_allclose(of(0.1, (0, 2)), plain, rtol=1e-4, atol=1e-4 * abs(plain).max())
    wide = [of(math.inf, (number,)) for number in range(3)]
    for number, found in enumerate(wide):
        assert abs(found - plain).max() > 1e-4 * abs(plain).max()
        assert abs(found - wide[number - 1]).max() > 1e-4 * abs(plain).max()
    np.testing.assert_array_equal(of(math.inf, ()), wide[MIDDLE])


@pytest.mark.parametrize("layers", slow_except([((0, 2),)], [((1,),), ((0, 2),)]))
def test_a_skipped_block_is_one_that_is_not_there(layers):
    network, params = network_of("dit")
    shallow = built("dit", depth=3 - len(layers))
    kept = np.delete(np.arange(3), layers)
    rest = {**params, "blocks": jax.tree.map(lambda leaf: leaf[kept], params["blocks"])}
    found = jax.jit(network.perturbed(Perturbation("skip", layers)))(params, *INPUTS)
    np.testing.assert_allclose(found, jax.jit(shallow.apply)(rest, *INPUTS), rtol=1e-5, atol=1e-5)


def test_a_skipped_block_of_a_uvit_passes_its_input_on():
    """The first block without effect: its last layers are 0."""
    network, params = network_of("uvit")
    blocks = params["in_blocks"]["blocks"]
    silent = {name: jax.tree.map(lambda leaf: leaf.at[0].set(0), blocks[name]) for name in ("out", "down")}
    without = {**params, "in_blocks": {"blocks": {**blocks, **silent}}}
    found = jax.jit(network.perturbed(Perturbation("skip", (0,))))(params, *INPUTS)
    np.testing.assert_allclose(found, jax.jit(network.apply)(without, *INPUTS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "layers"),
    [
        ("unet", "identity", (4,)),
        ("dit", "skip", (3,)),
        ("dit", "blur", (-1,)),
        ("unet", "skip", ()),
        ("edm2", "skip", (0,)),
    ],
)
def test_rejects_blocks_that_do_not_exist_or_cannot_be_skipped(name, kind, layers):
    with refused("layers"):
        built(name).perturbed(Perturbation(kind, layers))


def test_a_u_net_without_attention_in_the_middle_has_no_default():
    network = built("unet", middle_attention=False)
    network.perturbed(Perturbation("identity", (2,)))
    for layers in ((), (3,)):
        with refused("layers"):
            network.perturbed(Perturbation("identity", layers))


def test_an_mlp_cannot_be_perturbed():
    assert build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=(8, 8, 1)).perturbed is None


def test_an_adapted_network_can_be_perturbed():
    """At initialisation an adapter changes nothing."""
    network, params = network_of("dit")
    adapted = build("adapters", {"name": "lora", "rank": 2}, network=network)
    both = {**jax.jit(adapted.init)(jax.random.key(0)), "base": params}
    skip = Perturbation("skip", (1,))
    found, expected = jax.jit(adapted.perturbed(skip)), jax.jit(network.perturbed(skip))
    np.testing.assert_allclose(found(both, *INPUTS), expected(params, *INPUTS), rtol=1e-6, atol=1e-6)
    assert build("adapters", "lora", network=dataclasses.replace(network, perturbed=None)).perturbed is None


# The attention of a perturbed block.

Q, K, V = (np.random.default_rng(2).normal(size=(2, 13, 2, 4)).astype(np.float32) for _ in range(3))
SIZE, EXTRA = (3, 4), 1


def test_identity_returns_the_values():
    assert attention(Perturbation("identity"), SIZE, EXTRA)(Q, K, V) is V
    assert attention(None, SIZE, EXTRA) is attend


@pytest.mark.parametrize("sigma", [0.4, 1.0, 50.0, math.inf])
def test_blur_smooths_the_products_over_the_image(sigma):
    """Section 4 of arXiv 2408.00760: to blur the queries is to blur the attention weights before the softmax."""
    products = np.einsum("bnhf,bmhf->bhnm", np.float64(Q), K) / 2
    expected = products.copy()
    for b, h, m in np.ndindex(2, 2, 13):
        expected[b, h, 1:, m] = blurred(products[b, h, 1:, m].reshape(SIZE), sigma).ravel()
    weights = np.exp(expected) / np.exp(expected).sum(axis=-1, keepdims=True)
    found = attention(Perturbation("blur", sigma=sigma), SIZE, EXTRA)(Q, K, V)
    np.testing.assert_allclose(found, np.einsum("bhnm,bmhf->bnhf", weights, V), rtol=1e-4, atol=1e-5)


def blurred(image, sigma):
    """Blurs an image pixel by pixel; beyond the edge it is mirrored at the last pixel."""
    if math.isinf(sigma):
        return np.full_like(image, image.mean())
    ranges = [range(-h, h + 1) for h in (min(math.ceil(6 * sigma) // 2, n // 2) for n in image.shape)]

    def inside(i, n):
        i = abs(i)
        return i if i < n else 2 * (n - 1) - i

    out, total = np.zeros_like(image), 0.0
    for dr in ranges[0]:
        for dc in ranges[1]:
            weight = math.exp(-(dr**2 + dc**2) / (2 * sigma**2))
            total += weight
            for r, c in np.ndindex(image.shape):
                out[r, c] += weight * image[inside(r + dr, image.shape[0]), inside(c + dc, image.shape[1])]
    return out / total


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_a_blur_preserves_constants(length):
    for sigma in (0.3, 2.0, 1e6, math.inf):
        np.testing.assert_allclose(blur_matrix(length, sigma).sum(axis=1), 1, rtol=1e-6)
