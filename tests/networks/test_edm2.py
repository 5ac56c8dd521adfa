"""EDM2: parameter counts, magnitudes that only the gains change, and weights that stay normalised."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.core.build import build, defaults
from diffusion.core.types import Network
from diffusion.layers import attention
from diffusion.layers import magnitude as mp
from diffusion.networks import edm2
from diffusion.training import ema, optimizer
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.refusals import refused
from tests.tiers import slow_except

TINY = {
    "name": "edm2",
    "width": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "head_dim": 8,
}
PAPER = {"XS": (128, 125), "S": (192, 280), "M": (256, 498), "L": (320, 777), "XL": (384, 1119), "XXL": (448, 1523)}

SMALLER = {"channel_mult": (1,), "attention_resolutions": ()}  # one level


def drawn(network):
    """Returns parameters with nonzero gains, each drawn with a seed from its name (faster than compiling `init`)."""

    def draw(path, leaf):
        seed = zlib.crc32("/".join(key.key for key in path).encode())
        return np.asarray(np.random.RandomState(seed).randn(*leaf.shape) if leaf.ndim else 0.7, np.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(network.init, jax.random.key(0)))


@functools.cache
def tiny(**options):
    """A small compiled EDM2 for digits, and its parameters."""
    network = build("networks", {**TINY, **options}, shape=(8, 8, 1), num_classes=10)
    return jax.jit(network.apply), drawn(network)


RNG = np.random.default_rng(1)
X = RNG.normal(size=(3, 8, 8, 1)).astype(np.float32)
C_NOISE, COND = np.float32([-1, 0.1, 0.7]), {"label": np.array([0, 3, 9]), "keep": np.array([True, True, True])}


def rms(x, axis=None):
    return np.sqrt(np.mean(np.square(np.float64(x)), axis=axis))


def kernels(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params) if leaf.ndim]


def off_unit(params):
    """Returns the largest distance from RMS 1 among the output units of all weights."""
    return max(abs(rms(kernel, tuple(range(kernel.ndim - 1))) - 1).max() for kernel in kernels(params))


# The layers.


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.8])
def test_sums_and_concatenations_preserve_magnitude(t):
    a, b = RNG.normal(size=(1000, 10)), RNG.normal(size=(1000, 50))
    assert abs(rms(mp.mp_sum(a, b[:, :10], t)) - 1) < 0.03
    joined = np.asarray(mp.mp_cat(a, b, t))
    assert joined.shape == (1000, 60) and abs(rms(joined) - 1) < 0.03
    shares = np.sum(joined[:, :10] ** 2) / np.sum(joined[:, 10:] ** 2)
    np.testing.assert_allclose(shares, ((1 - t) / t) ** 2, rtol=0.06)
    assert np.corrcoef(joined[:, 0], a[:, 0])[0, 1] > 0.999


def test_balance_interpolates_from_the_first_to_the_second():
    a, b = jnp.array([1.0, 2.0]), jnp.array([-3.0, 5.0])
    np.testing.assert_allclose(mp.mp_sum(a, b, 0.0), a)
    np.testing.assert_allclose(mp.mp_sum(a, b, 1.0), b)
    np.testing.assert_allclose(mp.mp_cat(a, b, 0.5), jnp.concatenate([a, b]), rtol=1e-6)


def test_silu_preserves_magnitude():
    assert abs(rms(mp.mp_silu(RNG.normal(size=100_000))) - 1) < 0.01


@pytest.mark.parametrize("length", [1e-2, 1, 1e3])
def test_pixel_norm(length):
    x = np.float32(length * RNG.normal(size=(2, 5, 5, 16)))
    np.testing.assert_allclose(rms(mp.pixel_norm(x), -1), 1, rtol=0.03)
    cosines = np.sum(mp.pixel_norm(x) * x, -1) / (16 * rms(x, -1))
    np.testing.assert_allclose(cosines, 1, rtol=0.03)
    assert mp.pixel_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_pixel_norm_has_a_finite_gradient_at_zero():
    gradient = jax.grad(lambda x: jnp.sum(mp.pixel_norm(x)))(jnp.zeros((2, 4)).at[0].set(1.0))
    assert np.isfinite(gradient).all() and gradient[1].all()


@pytest.mark.parametrize("layer", [mp.MPLinear, mp.MPConv])
def test_layers_preserve_magnitude(layer):
    module = layer(32, 48, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = RNG.normal(size=(4, 12, 12, 32)).astype(np.float32)
    out = np.asarray(module(x))
    inside = out[:, 1:-1, 1:-1]  # at the border the convolution pads with zeros
    assert out.shape == (4, 12, 12, 48) and abs(rms(inside) - 1) < 0.03
    np.testing.assert_allclose(module(x, 0.25), out / 4, atol=1e-5)
    module.kernel[...] *= np.geomspace(0.1, 30, 48)  # the length of a unit's weight has no effect
    np.testing.assert_allclose(module(x), out, atol=5e-3)


def test_normalized_weights_have_orthogonal_gradients(x64):
    w = jnp.asarray(RNG.normal(size=(3, 3, 8, 5)))
    np.testing.assert_allclose(rms(mp.normalize(w), (0, 1, 2)), 1, atol=2e-4)
    weight = RNG.normal(size=w.shape)
    gradient = jax.grad(lambda w: jnp.sum(weight * mp.normalize(w)))(w)
    along = np.sum(gradient * w, (0, 1, 2)) / (72 * rms(gradient, (0, 1, 2)) * rms(w, (0, 1, 2)))
    assert abs(along).max() < 2e-4  # because of EPSILON
    straight = np.sum(weight * w, (0, 1, 2)) / (72 * rms(weight, (0, 1, 2)) * rms(w, (0, 1, 2)))
    assert abs(straight).max() > 0.1


# The network.


@pytest.mark.parametrize("size", slow_except(("S",), PAPER))
def test_the_papers_parameter_counts(size):
    width, millions = PAPER[size]
    network = build("networks", {"name": "edm2", "width": width}, shape=(64, 64, 4), num_classes=1000)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6) == millions


def test_output_is_zero_at_initialisation():
    network = build("networks", {**TINY, **SMALLER, "outputs": 2}, shape=(8, 8, 1), num_classes=10)
    params = jax.jit(network.init)(jax.random.key(0))
    assert all(isinstance(key.key, str) for path, _ in jax.tree.leaves_with_path(params) for key in path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert off_unit(params) < 1e-3
    out = jax.jit(network.apply)(params, X, C_NOISE, COND)
    assert out.shape == (3, 8, 8, 2) and out.dtype == jnp.float32 and not out.any()


def test_agrees_with_the_published_network():
    """The expected values are from the authors' PyTorch code with these weights (github.com/NVlabs/edm2)."""
    spec = {**TINY, "channel_mult": (1, 2, 2), "num_res_blocks": 2, "attention_resolutions": (4,)}
    network = build("networks", spec, shape=(16, 16, 3), num_classes=5)
    x = np.random.RandomState(0).randn(2, 16, 16, 3).astype(np.float32)
    out = jax.jit(network.apply)(drawn(network), x, np.float32([-1, 0.5]), {"label": np.array([1, 4])})
    expected = [-0.5567648, -0.6400307, 1.9052558, 0.8398219]
    np.testing.assert_allclose([out[0, 0, 0, 0], out[0, 7, 9, 2], out[1, 4, 4, 1], rms(out)], expected, rtol=1e-4)


def test_every_block_preserves_magnitude(monkeypatch):
    seen = []
    call = edm2.EDM2Block.__call__
    monkeypatch.setattr(
        edm2.EDM2Block, "__call__", lambda *args: seen.append(jnp.sqrt(jnp.mean((y := call(*args)) ** 2))) or y
    )
    spec = {**TINY, "width": 32, "attention_resolutions": (8,)}
    network = build("networks", spec, shape=(16, 16, 3), num_classes=10)
    params = jax.tree.map(lambda leaf: leaf if leaf.ndim else 0 * leaf, drawn(network))
    x = RNG.normal(size=(4, 16, 16, 3)).astype(np.float32)

    def magnitudes(params):
        seen.clear()
        out = network.apply(params, x, np.float32([-1, 0, 0.5, 1]), {"label": np.arange(4)})
        return jnp.stack(seen), out

    blocks, out = jax.jit(magnitudes)({**params, "out_gain": jnp.ones(())})
    assert blocks.shape == (10,) and (blocks > 0.7).all() and (blocks < 1.4).all()
    assert 0.7 < rms(out) < 1.4


def test_the_length_of_weights_has_no_effect():
    apply, params = tiny()
    longer = jax.tree.map(lambda leaf: leaf * RNG.uniform(1, 20, leaf.shape[-1:]) if leaf.ndim else leaf, params)
    out, same = (apply(p, X, C_NOISE, COND) for p in (params, longer))
    np.testing.assert_allclose(same, out, atol=5e-3 * abs(out).max())
    factors = np.array([3.0, 1, 1])[:, None, None, None]
    turned = {**params, "conv_in": {"kernel": params["conv_in"]["kernel"] * factors}}
    assert abs(apply(turned, X, C_NOISE, COND) - out).max() > 0.05


OPTIONS = [{}, {"dtype": "bfloat16"}, {**SMALLER, "outputs": 2}]


@pytest.mark.parametrize("options", slow_except(OPTIONS[2:], OPTIONS), ids=str)
def test_every_input_matters(options):
    apply, params = tiny(**options)
    out = apply(params, X, C_NOISE, COND)
    assert out.shape == (3, 8, 8, options.get("outputs", 1)) and out.dtype == jnp.float32
    assert np.isfinite(out).all()
    for other in (
        apply(params, X[::-1], C_NOISE, COND),
        apply(params, X, C_NOISE + 0.3, COND),
        apply(params, X, C_NOISE, {**COND, "label": COND["label"][::-1]}),
        apply(params, X, C_NOISE, {**COND, "keep": ~COND["keep"]}),
    ):
        assert abs(out - other).max() > 1e-2


def test_keep_selects_the_null_class():
    """The label has an effect where `keep` is True and none where it is False."""
    apply, params = tiny()
    x, c_noise, keep = np.broadcast_to(X[:1], (3, 8, 8, 1)), np.zeros(3, np.float32), np.array([True, True, False])
    out = apply(params, x, c_noise, {"label": np.array([3, 7, 3]), "keep": keep})
    assert abs(out[0] - out[1]).max() > 1e-2 and abs(out[0] - out[2]).max() > 1e-2
    other = apply(params, x, c_noise, {"label": np.array([3, 3, 7]), "keep": keep})
    assert abs(out[1] - other[1]).max() > 1e-2
    np.testing.assert_allclose(other[2], out[2], atol=1e-5)
    absent = apply(params, x, c_noise, {"label": np.array([3, 7, 3])})
    np.testing.assert_allclose(absent[:2], out[:2], atol=1e-5)
    np.testing.assert_allclose(absent[2], out[0], atol=1e-5)


def test_without_classes():
    network = build("networks", TINY, shape=(8, 8, 1))
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert "emb_label" not in params
    assert jax.eval_shape(network.apply, params, X, C_NOISE, {}).shape == X.shape


def test_bandwidth_scales_the_noise_label():
    (wide, params), (narrow, _) = tiny(**SMALLER), tiny(**SMALLER, bandwidth=0.001)
    out = wide(params, X, C_NOISE, COND)
    np.testing.assert_allclose(narrow(params, X, 1000 * C_NOISE, COND), out, atol=1e-3 * abs(out).max())


def test_examples_do_not_mix():
    apply, params = tiny()
    out = apply(params, X, C_NOISE, COND)
    changed = np.concatenate([X[:2], X[:1]]), C_NOISE * np.float32([1, 1, 0]), {**COND, "label": np.array([0, 3, 4])}
    other = apply(params, *changed)
    np.testing.assert_allclose(other[:2], out[:2], atol=1e-5)
    assert abs(other[2] - out[2]).max() > 1e-2


def test_outputs_of_a_block_are_clipped():
    options = {"width": 4, "channel_mult": (1,), "attention_resolutions": (), "head_dim": 4}
    config = edm2.EDM2Config(**defaults(edm2.make) | options, shape=(4, 4, 1))
    block = edm2.EDM2Block(4, 4, config, side="dec", rngs=nnx.Rngs(0))
    out = block(jnp.array([1e4, -1e4, 1e4, -1e4]) * jnp.ones((1, 4, 4, 4)), jnp.ones((1, 4)), None)
    assert out.max() == 256 and out.min() == -256


def test_attention_uses_the_chosen_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "attend", lambda q, k, v, *, kernel: calls.append((kernel, q.shape)) or v)
    apply, params = tiny(kernel="chunked")
    jax.eval_shape(apply, params, X, C_NOISE, COND)
    assert calls == [("chunked", (3, 16, 2, 8))] * 4  # one block on the way down, one in the middle, two on the way up


def test_bfloat16_is_close_to_float32():
    outs = [apply(params, X, C_NOISE, COND) for apply, params in (tiny(), tiny(dtype="bfloat16"))]
    gap = abs(outs[0] - outs[1]).max()
    assert 1e-6 < gap < 0.05 * abs(outs[0]).max()


@pytest.mark.slow
def test_remat_changes_neither_loss_nor_gradients():
    """The gradients are those of the gains and of the noise label."""

    def of_gains(remat):
        apply, params = tiny(**SMALLER, remat=remat, dropout=0.3)
        leaves, tree = jax.tree.flatten(params)

        def loss(gains, c_noise):
            remaining = iter(gains)
            params = jax.tree.unflatten(tree, [leaf if leaf.ndim else next(remaining) for leaf in leaves])
            return jnp.sum(apply(params, X, c_noise, COND, key=jax.random.key(0)) ** 2)

        gains = jnp.stack([leaf for leaf in leaves if not leaf.ndim])
        assert str(jax.make_jaxpr(loss)(gains, C_NOISE)).count("remat") == (
            0 if remat == "none" else 5
        )  # one per block
        loss, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(gains, C_NOISE)
        return loss, *gradients

    for a, b in zip(of_gains("none"), of_gains("full"), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4 * abs(a).max())


def test_dropout_needs_a_key():
    apply, params = tiny(**SMALLER, dropout=0.5)
    args = (params, X, C_NOISE, COND)
    np.testing.assert_array_equal(apply(*args), apply(*args))
    first, second = (apply(*args, key=jax.random.key(i)) for i in (0, 1))
    assert abs(first - second).max() > 1e-2 and abs(first - apply(*args)).max() > 1e-2


# Training.


@pytest.mark.slow
def test_training_keeps_weights_normalised():
    """Without `project` they do not stay normalised. An EMA of decay 0 shows that averages follow the projection."""
    network = build("networks", {**TINY, **SMALLER}, shape=(8, 8, 1), num_classes=10)
    params = network.project(drawn(network))
    objective = build("objectives", {"name": "denoising", "parameterization": "v"})
    opt, averages = (
        optimizer.make_optimizer(steps=3, name="adam", learning_rate=0.05),
        ema.make_ema(decays=(0.0,), warmup=False),
    )

    @jax.jit
    def step(state, on):
        """The train step with or without `project`, in one compilation."""

        def project(params):
            return jax.tree.map(lambda new, old: jnp.where(on, new, old), network.project(params), params)

        switched = dataclasses.replace(network, project=project)
        return make_step(objective, switched, opt, averages, seed=0)(state, {"x": X, "cond": COND})[0]

    def after_steps(on):
        fixed = dataclasses.replace(network, init=lambda key: params)
        state = init_state(objective, fixed, opt, averages, jax.random.key(0))
        for _ in range(3):
            state = step(state, on)
        return state

    state = after_steps(True)
    moved = [abs(a - b).mean() for a, b in zip(kernels(params), kernels(state.params), strict=True)]
    assert np.mean(moved) > 0.02 and abs(state.params["net"]["out_gain"] - 0.7) > 0.02
    assert off_unit(state.params) < 1e-3 and off_unit(state.ema["0"]) < 1e-3
    assert off_unit(after_steps(False).params) > 5e-3


@dataclasses.dataclass(frozen=True)
class Several:
    """An objective with a network, a critic and a frozen teacher of the same structure, and a learned schedule."""

    frozen: tuple[str, ...] = ("teacher",)

    def init(self, network, key, teacher=None):
        return {"net": network.init(key), "critic": {"w": jnp.ones(2)}, "teacher": {"w": jnp.full(2, 5.0)},
                "gamma": {"ends": jnp.full(2, 3.0)}}  # fmt: skip

    def initial_state(self, params):
        return {}

    def before_step(self, params, ema_params, batch, objective_state, key, step):
        return params, objective_state

    def draw(self, batch, key, step, objective_state):
        return {}

    def update_state(self, objective_state, draws, loss):
        return objective_state, {}

    def loss(self, net, params, ema_params, batch, key, step):
        total = sum(jnp.sum(leaf * jnp.array([1.0, 2.0])) for leaf in jax.tree.leaves(params))
        return batch["x"] * total, {}


def test_which_parameters_are_projected():
    """Trained copies of the network are, after the step and before the EMA; frozen copies and the schedule are not."""
    norm = np.linalg.norm
    network = Network(lambda key: {"w": jnp.ones(2)}, None, project=lambda p: {"w": p["w"] / jnp.linalg.norm(p["w"])})
    opt, averages = (
        optimizer.make_optimizer(steps=9, name="sgd", learning_rate=0.1, clip=None),
        ema.make_ema((0.5,), warmup=False),
    )
    state = init_state(Several(), network, opt, averages, jax.random.key(0))
    state, _ = make_step(Several(), network, opt, averages, seed=0)(state, {"x": jnp.ones(4), "cond": {}})
    moved = np.array([0.9, 0.8])
    np.testing.assert_allclose(state.params["net"]["w"], moved / norm(moved), rtol=1e-6)
    np.testing.assert_allclose(state.params["critic"]["w"], moved / norm(moved), rtol=1e-6)
    np.testing.assert_allclose(state.params["gamma"]["ends"], 3 - np.array([0.1, 0.2]), rtol=1e-6)
    np.testing.assert_allclose(state.params["teacher"]["w"], 5)
    np.testing.assert_allclose(state.ema["0.5"]["net"]["w"], (1 + moved / norm(moved)) / 2, rtol=1e-6)
    np.testing.assert_allclose(state.ema["0.5"]["gamma"]["ends"], 3 - np.array([0.1, 0.2]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"width": 0}, "width"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 1, 1, 1, 1)}, "channel_mult"),
        ({"attention_resolutions": (5,)}, "attention_resolutions"),
        ({"head_dim": 5}, "head_dim"),
        ({"channel_mult": (1, 3), "attention_resolutions": (8,), "head_dim": 12}, "head_dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"res_balance": 1.5}, "res_balance"),
        ({"concat_balance": -0.1}, "concat_balance"),
        ({"remat": "some"}, "remat"),
        ({"kernel": "torch"}, "kernel"),
        ({"dtype": "float16"}, "dtype"),
        ({"shape": (8, 8)}, "shape"),
    ],
)
def test_bad_options(options, field):
    spec = {**TINY, **options}
    shape = spec.pop("shape", (8, 8, 1))
    with refused(f"networks.{field}"):
        build("networks", spec, shape=shape, num_classes=10)
