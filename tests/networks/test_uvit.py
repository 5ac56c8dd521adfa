"""U-ViT: parameter counts, its parts, and the order of its long skip connections."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from tests.refusals import refused
from tests.tiers import slow_except

TINY = {"name": "uvit", "patch_size": 2, "width": 16, "depth": 7, "num_heads": 2}
PAPER = {
    "CIFAR-10": (32, 3, 0, {}, 44),
    "ImageNet-64 S (deep)/4": (64, 3, 1000, {"patch_size": 4, "depth": 17}, 58),
    "ImageNet-64 M/4": (64, 3, 1000, {"patch_size": 4, "width": 768, "depth": 17, "num_heads": 12}, 131),
    "ImageNet-256 L/2": (32, 4, 1000, {"width": 1024, "depth": 21, "num_heads": 16}, 287),
    "ImageNet-256 H/2": (32, 4, 1000, {"width": 1152, "depth": 29, "num_heads": 16}, 501),
}
MORE = {"time_mlp": True, "qkv_bias": True}
X = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
C_NOISE, COND = np.float32([10, 300, 900]), {"label": np.array([0, 3, 9])}


@functools.cache
def tiny(num_classes=10, **options):
    """A small compiled U-ViT for digits, and parameters of which none is zero."""
    network = build("networks", {**TINY, **options}, shape=(8, 8, 1), num_classes=num_classes)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    for name in ("norm", "in_blocks", "out_blocks"):
        params[name] = jax.tree.map_with_path(lambda path, leaf: leaf + (path[-1].key == "scale"), params[name])
    return jax.jit(network.apply), params


@pytest.mark.parametrize("size", slow_except(("CIFAR-10",), PAPER))
def test_the_papers_parameter_counts(size):
    side, channels, num_classes, options, millions = PAPER[size]
    network = build("networks", {"name": "uvit", **options}, shape=(side, side, channels), num_classes=num_classes)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6) == millions


def test_initial_parameters():
    network = build("networks", TINY, shape=(8, 8, 1), num_classes=10)
    params = jax.jit(network.init)(jax.random.key(0))
    assert all(isinstance(key.key, str) for path, _ in jax.tree.leaves_with_path(params) for key in path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    kernels = params["in_blocks"]["blocks"]["up"]["kernel"]
    assert kernels.shape == (4, 16, 64) and abs(kernels[0] - kernels[1]).max() > 0.02
    assert params["out_blocks"]["blocks"]["skip"]["kernel"].shape == (3, 32, 16)
    for drawn in (kernels, params["positions"], params["patches_out"]["kernel"]):
        np.testing.assert_allclose(jnp.std(drawn), 0.02, rtol=0.3)
    for kernel, fan_in in ((params["patches_in"]["kernel"], 4), (params["smooth"]["kernel"], 9)):
        assert 0.6 < abs(kernel).max() * fan_in**0.5 <= 1


def test_options_add_parameters():
    plain, without, more = (tiny(**options)[1] for options in ({}, {"conv": False}, MORE))
    assert plain.keys() - without.keys() == {"smooth"}
    assert more.keys() - plain.keys() == {"time_inner", "time_outer"}
    for stack in ("in_blocks", "out_blocks"):
        assert "bias" in more[stack]["blocks"]["qkv"] and "bias" not in plain[stack]["blocks"]["qkv"]


OPTIONS = [{}, MORE, {"outputs": 2, "patch_size": 4}, {"kernel": "chunked"}, {"dtype": "bfloat16", "conv": False}]


@pytest.mark.parametrize("options", slow_except(OPTIONS[4:], OPTIONS), ids=str)
def test_every_input_matters(options):
    apply, params = tiny(**options)
    out = apply(params, X, C_NOISE, {**COND, "keep": np.full(3, True)})
    assert out.shape == (3, 8, 8, options.get("outputs", 1)) and out.dtype == jnp.float32
    assert np.isfinite(out).all()
    for x, c_noise, label, keep in (
        (np.roll(X, 1, axis=0), C_NOISE, COND["label"], True),
        (X, C_NOISE + 100, COND["label"], True),
        (X, C_NOISE, COND["label"] // 2 + 1, True),
        (X, C_NOISE, COND["label"], False),
    ):
        other = apply(params, x, c_noise, {"label": label, "keep": np.full(3, keep)})
        assert (abs(out - other).max((1, 2, 3)) > 1e-3).all()


def test_keep_selects_the_null_class():
    apply, params = tiny()
    kept, dropped = (apply(params, X, C_NOISE, {**COND, "keep": np.full(3, keep)}) for keep in (True, False))
    np.testing.assert_allclose(apply(params, X, C_NOISE, COND), kept, atol=1e-5)
    other = apply(params, X, C_NOISE, {"label": COND["label"][::-1], "keep": np.full(3, False)})
    np.testing.assert_array_equal(other, dropped)


UNCONDITIONAL = {**MORE, "num_classes": 0, "patch_size": 4}


@pytest.mark.parametrize("options", slow_except([{}], [{}, UNCONDITIONAL]), ids=str)
def test_agrees_with_a_loop_over_blocks(options):
    """The reference is the paper's network in float64, without a scan."""
    apply, params = tiny(**options)
    out = apply(params, X, C_NOISE, COND)
    expected = by_hand(params, X, C_NOISE, COND["label"], options.get("patch_size", 2), TINY["num_heads"])
    np.testing.assert_allclose(out, expected, atol=1e-5 * abs(expected).max())


def by_hand(params, x, c_noise, label, patch, heads):
    params = jax.tree.map(np.float64, params)
    width = params["norm"]["scale"].shape[0]
    half = np.exp(-math.log(10_000) * np.arange(width // 2) / (width // 2)) * c_noise[:, None]
    time = np.concatenate([np.cos(half), np.sin(half)], axis=1)
    if "time_inner" in params:
        inner = linear(params["time_inner"], time)
        time = linear(params["time_outer"], inner / (1 + np.exp(-inner)))
    corners = [(i, j) for i in range(0, x.shape[1], patch) for j in range(0, x.shape[2], patch)]
    tokens = [linear(params["patches_in"], x[:, i : i + patch, j : j + patch].reshape(len(x), -1)) for i, j in corners]
    tokens = [time, *tokens]
    if "label" in params:
        tokens = [params["label"]["embedding"][label], *tokens]
    h = np.stack(tokens, axis=1) + params["positions"]
    in_blocks, out_blocks = (unstacked(params[name]["blocks"]) for name in ("in_blocks", "out_blocks"))
    skips = []
    for p in in_blocks[:-1]:
        h = block_by_hand(p, h, heads)
        skips.append(h)
    h = block_by_hand(in_blocks[-1], h, heads)
    for p in out_blocks:
        h = block_by_hand(p, linear(p["skip"], np.concatenate([h, skips.pop()], axis=-1)), heads)
    h = linear(params["patches_out"], norm(params["norm"], h))[:, -len(corners) :]
    image = np.zeros((*x.shape[:3], h.shape[-1] // patch**2))
    for n, (i, j) in enumerate(corners):
        image[:, i : i + patch, j : j + patch] = h[:, n].reshape(len(x), patch, patch, -1)
    padded, size = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0))), x.shape[1]
    kernel = params["smooth"]["kernel"]
    terms = [padded[:, i : i + size, j : j + size] @ kernel[i, j] for i in range(3) for j in range(3)]
    return sum(terms) + params["smooth"]["bias"]


def unstacked(blocks):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(len(blocks["out"]["bias"]))]


def block_by_hand(p, h, heads):
    q, k, v = np.split(linear(p["qkv"], norm(p["norm1"], h)), 3, axis=-1)
    mixed = []
    for head in np.split(np.arange(h.shape[-1]), heads):
        logits = q[..., head] @ k[..., head].swapaxes(1, 2) / len(head) ** 0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ v[..., head])
    h = h + linear(p["out"], np.concatenate(mixed, axis=-1))
    inner = linear(p["up"], norm(p["norm2"], h))
    return h + linear(p["down"], inner * (1 + np.vectorize(math.erf)(inner / 2**0.5)) / 2)


def linear(p, h):
    return h @ p["kernel"] + p.get("bias", 0)


def norm(p, h):
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def test_skips_are_used_in_reverse_order():
    """If out-block i passes only its skip on and all others only x, the output depends on the in-blocks up to depth - 1
    - i and on no later ones."""
    apply, params = tiny()
    width, depth = TINY["width"], TINY["depth"] // 2
    take_x, take_skip = (np.concatenate(pair) for pair in ((np.eye(width), np.zeros((width, width))),
                                                          (np.zeros((width, width)), np.eye(width))))  # fmt: skip

    @jax.jit
    @functools.partial(jax.grad, argnums=0)
    def influence(in_blocks, skip_kernels):
        out_blocks = {**params["out_blocks"]["blocks"], "skip": {"kernel": skip_kernels, "bias": np.zeros((3, width))}}
        changed = {**params, "in_blocks": in_blocks, "out_blocks": {"blocks": out_blocks}}
        return jnp.sum(apply(changed, X, C_NOISE, COND) ** 2)

    for i in range(depth):
        kernels = np.float32([take_skip if j == i else take_x for j in range(depth)])
        reached = jnp.any(influence(params["in_blocks"], kernels)["blocks"]["down"]["bias"] != 0, axis=1)
        assert list(reached) == [True] * (depth - i) + [False] * (i + 1)


def test_examples_do_not_mix():
    apply, params = tiny()
    changed = X.copy()
    changed[1:] += 1
    out, other = (np.array(apply(params, x, C_NOISE, COND)) for x in (X, changed))
    np.testing.assert_allclose(other[:1], out[:1], atol=1e-6 * abs(out).max())
    assert abs(other[1:] - out[1:]).max() > 1e-3


def test_positions_matter():
    """Exchanging two patches of the input does more than exchange them in the output."""
    apply, params = tiny()
    centre = np.zeros((3, 3, 1, 1), np.float32)
    centre[1, 1] = 1
    params = {**params, "smooth": {"kernel": centre, "bias": np.zeros(1)}}
    swapped = X.copy()
    swapped[:, :2, :2], swapped[:, 4:6, 2:4] = X[:, 4:6, 2:4], X[:, :2, :2]
    out, other = (np.array(apply(params, x, C_NOISE, COND)) for x in (X, swapped))
    back = other.copy()
    back[:, :2, :2], back[:, 4:6, 2:4] = other[:, 4:6, 2:4], other[:, :2, :2]
    assert abs(back - out).max() > 1e-3


@pytest.mark.slow
def test_remat_changes_no_gradient():
    def gradient(remat):
        apply, params = tiny(remat=remat, depth=5)
        return jax.grad(lambda params: jnp.sum(apply(params, X, C_NOISE, COND) ** 2)), params

    for remat, blocks in (("none", 0), ("full", 2), ("dots_saveable", 2)):  # one per stack
        f, params = gradient(remat)
        assert min(str(jax.make_jaxpr(f)(params)).count("remat"), 2) == blocks
    plain, full = (jax.jit(f)(params) for f, params in map(gradient, ("none", "full")))
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * abs(b).max())


def test_program_size_does_not_depend_on_depth():
    def lines(depth):
        network = build("networks", {**TINY, "depth": depth}, shape=(8, 8, 1), num_classes=10)
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        return len(jax.jit(network.apply).lower(shapes, X, C_NOISE, COND).as_text().splitlines())

    assert lines(25) == lines(5)


def test_bfloat16_is_close_to_float32():
    (apply, params), (rough, _) = tiny(), tiny(dtype="bfloat16")
    out, other = (f(params, X, C_NOISE, COND) for f in (apply, rough))
    assert 1e-4 < abs(other - out).max() / abs(out).max() < 0.1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"patch_size": 3}, "patch_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"width": 15, "num_heads": 3}, "width"),
        ({"num_heads": 3}, "width"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"depth": 6}, "depth"),
        ({"depth": 1}, "depth"),
        ({"kernel": "fast"}, "kernel"),
        ({"remat": "some"}, "remat"),
        ({"dtype": "float16"}, "dtype"),
        ({"shape": (8, 8)}, "shape"),
        ({"shape": (8, 7, 1)}, "patch_size"),
        ({"shape": (2,)}, "shape"),
    ],
)
def test_bad_options(options, field):
    spec = {**TINY, **options}
    shape = spec.pop("shape", (8, 8, 1))
    with refused(f"networks.{field}"):
        build("networks", spec, shape=shape, num_classes=10)
