"""Training of autoencoders: each loss term in closed form, whose gradient goes where, and what is refused.

The formulas are tested with a linear autoencoder: z = x A, features = z (or its codes), y = features K.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core import trees
from diffusion.core.build import build
from diffusion.core.types import Network
from diffusion.distributed import sharding
from diffusion.encoders.vision import lpips
from diffusion.layers.autoencoder import AutoencoderApply
from diffusion.networks import autoencoder_kl, autoencoder_vq
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.players import gradients
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.encoders import vgg
from tests.objectives.drawing import with_draws
from tests.refusals import refused
from tests.tiers import slow_except

SHAPE, B = (8, 8, 1), 4
CRITIC = {"disc_weight": 0.5, "disc_layers": 1, "disc_width": 2}
TRUNK = {"block_out_channels": (2, 4), "layers_per_block": 1, "norm_num_groups": 1, "mid_block_add_attention": False}
NETWORKS = {
    "kl": TRUNK | {"name": "autoencoder_kl", "latent_channels": 2},
    "vq": TRUNK | {"name": "autoencoder_vq", "latent_channels": 2, "num_vq_embeddings": 8},
    "fsq": TRUNK | {"name": "autoencoder_vq", "latent_channels": 2, "fsq_levels": (8, 8)},
    "tiny": {"name": "autoencoder_tiny", "encoder_block_out_channels": (2, 2), "num_encoder_blocks": (1, 1),
             "decoder_block_out_channels": (2, 2), "num_decoder_blocks": (1, 0)},
}  # fmt: skip


def objective_of(**options):
    return build("objectives", {"name": "autoencoder", **options}, field="objective")


def linear(kind, shape=SHAPE):
    """Returns the functions of a linear autoencoder with a latent of each pixel."""

    def merge(params):
        def quantize(z):
            codebook = params["quantize"]["embedding"]["embedding"]
            indices = jnp.argmin(jnp.sum((z[..., None, :] - codebook) ** 2, -1), -1)
            return autoencoder_vq.Quantized(autoencoder_vq.straight_through(z, codebook[indices]), codebook[indices],
                                            indices)  # fmt: skip

        return types.SimpleNamespace(
            encode=lambda x: x @ params["A"], quantize=quantize, output=lambda h: h @ params["last"]["kernel"],
            features=lambda z: quantize(z).vectors if kind == "vq" else z,
        )  # fmt: skip

    parts = {"kl": autoencoder_kl.Apply, "vq": autoencoder_vq.Apply, "tiny": AutoencoderApply}
    return parts[kind](kind, merge, shape, (*shape[:2], 3), ("last",))


def params_of(kind, objective, shape=SHAPE):
    rng = np.random.default_rng(0)
    net = {"A": rng.normal(size=(1, 6 if kind == "kl" else 3)), "last": {"kernel": rng.normal(size=(3, 1))}}
    if kind == "vq":
        codes = np.array([[-1.5], [-0.3], [0.3], [1.5]]) @ net["A"] + 0.1 * rng.normal(size=(4, 3))
        net["quantize"] = {"embedding": {"embedding": codes}}
    params = objective.init(Network(lambda key: jax.tree.map(jnp.asarray, net), linear(kind, shape)), jax.random.key(0))
    dtype = jax.dtypes.canonicalize_dtype(float)
    # Logits on both sides of the hinges.
    scaled = lambda w: 6 * w.astype(dtype)  # noqa: E731
    return params | {name: jax.tree.map(scaled, params[name]) for name in params.keys() - {"net"}}


@pytest.fixture
def batch(x64):
    return {"x": jax.random.normal(jax.random.key(3), (B, *SHAPE), jnp.float64), "cond": {}}


def run(kind, batch, step=0, **options):
    """Returns the objective, the networks, the batch with draws, the loss or losses, and the metrics."""
    objective = objective_of(**options)
    params, batch = params_of(kind, objective), with_draws(objective, batch, jax.random.key(1))
    function = objective.loss if objective.players is None else objective.losses
    return objective, params, batch, *function(linear(kind), params, params, batch, None, step)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_terms_of_a_variational_autoencoder(loss, batch):
    """The error is a sum over pixels, and KL that between Gaussians; the latent is a sample of the posterior."""
    _, params, batch, total, metrics = run("kl", batch, loss=loss, kl_weight=0.3)
    x, net = np.asarray(batch["x"]), params["net"]
    mean, log_variance = np.split(np.asarray(x @ net["A"]), 2, -1)
    noise = np.stack([jax.random.normal(key, mean.shape[1:]) for key in batch["draws"]["keys"]])
    assert (noise[0] != noise[1]).all()
    difference = x - (mean + np.exp(log_variance / 2) * noise) @ net["last"]["kernel"]
    error = (np.abs(difference) if loss == "l1" else difference**2).sum((1, 2, 3))
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum((1, 2, 3))
    np.testing.assert_allclose(total, error + 0.3 * kl, rtol=1e-12)
    np.testing.assert_allclose([metrics["error"], metrics["kl"]], [error.mean(), kl.mean()], rtol=1e-12)


@pytest.mark.parametrize("legacy", [True, False])
def test_terms_of_a_codebook(legacy, batch):
    """The gradient of the error passes the quantiser unchanged, and beta is on one of the terms of the codebook loss:
    on that of the codes in the legacy form, and on that of the latents in the other."""
    objective, params, batch, total, metrics = run("vq", batch, loss="l2", codebook_weight=2.0, legacy=legacy)
    x, net = np.asarray(batch["x"]), jax.tree.map(np.asarray, params["net"])
    codebook, kernel = net["quantize"]["embedding"]["embedding"], net["last"]["kernel"]
    z = x @ net["A"]
    indices = ((z[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)
    codes = codebook[indices]
    difference = codes @ kernel - x
    mean = lambda a: a.mean((1, 2, 3))  # noqa: E731
    np.testing.assert_allclose(total, mean(difference**2) + 2 * 1.25 * mean((z - codes) ** 2), rtol=1e-12)
    share = np.bincount(indices.ravel(), minlength=4) / indices.size
    np.testing.assert_allclose(metrics["perplexity"], np.prod(share**-share), rtol=1e-12)
    assert (share > 0).sum() > 2

    def loss(net):
        return jnp.sum(objective.loss(linear("vq"), {"net": net}, {}, batch, None, 0)[0])

    grad = jax.grad(loss)(params["net"])
    of_codes, of_latents = (0.25, 1.0) if legacy else (1.0, 0.25)
    apart = 2 * 2 * (z - codes) / z[0].size
    of_z = 2 * difference / x[0].size @ kernel.T + of_latents * apart  # straight-through
    np.testing.assert_allclose(grad["A"], np.einsum("bhwi,bhwo->io", x, of_z), rtol=1e-10)
    expected = np.zeros_like(codebook)
    np.add.at(expected, indices, -of_codes * apart)
    np.testing.assert_allclose(grad["quantize"]["embedding"]["embedding"], expected, rtol=1e-10)
    of_kernel = np.einsum("bhwi,bhwo->io", codes, 2 * difference / x[0].size)
    np.testing.assert_allclose(grad["last"]["kernel"], of_kernel, rtol=1e-10)


def test_equivariance(batch):
    """The latents are turned and halved as the images are, each example with its own number of quarter turns."""
    objective = objective_of(equivariance=3.0)
    params, many = params_of("tiny", objective), with_draws(objective, {"x": np.zeros(64)}, jax.random.key(1))
    assert np.bincount(many["draws"]["turns"]).min() > 8
    turns = np.arange(4)
    batch["draws"] = {"keys": jax.random.split(jax.random.key(0), B), "turns": jnp.asarray(turns)}
    total, metrics = objective.loss(linear("tiny"), params, params, batch, None, 0)
    x, net = np.asarray(batch["x"]), params["net"]

    def t(images):
        turned = np.stack([np.rot90(image, k) for image, k in zip(images, turns, strict=True)])
        return (turned[:, ::2] + turned[:, 1::2])[:, :, ::2] / 4 + (turned[:, ::2] + turned[:, 1::2])[:, :, 1::2] / 4

    kernel, z = np.asarray(net["last"]["kernel"]), x @ np.asarray(net["A"])
    plain, moved = (np.abs(a).mean((1, 2, 3)) for a in (x - z @ kernel, t(x) - t(z) @ kernel))
    np.testing.assert_allclose(total, plain + 3 * moved, rtol=1e-12)
    np.testing.assert_allclose(metrics["equivariance"], moved.mean(), rtol=1e-12)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_adversarial_game(kind, batch):
    """lambda is the ratio of gradients that are computed explicitly, the critic has the hinge loss, and each loss moves
    the networks of its player alone."""
    objective, params, batch, losses, metrics = run(kind, batch, kl_weight=0.1, codebook_weight=0.2, **CRITIC)
    net, x = linear(kind), batch["x"]

    def outputs(own):
        encoded = net.encode(own, x)
        return net.decode(own, jax.vmap(net.sample)(encoded, batch["draws"]["keys"]))

    def kernel_norm(function):
        grad = jax.grad(lambda own: function(outputs(own)))(params["net"])["last"]["kernel"]
        return jnp.sqrt(jnp.sum(grad**2))

    def fooled(y):
        return -jnp.mean(objective.judge(params["critic"], y))

    of_error = kernel_norm(lambda y: jnp.mean(objective.distance(net, params, x, y)[0]))
    expected = 0.5 * of_error / (kernel_norm(fooled) + 1e-4)
    np.testing.assert_allclose(metrics["adaptive_weight"], expected, rtol=1e-10)

    plain, _ = objective.loss(net, params, params, batch, None, 0)
    y = outputs(params["net"])
    logits = [np.asarray(objective.judge(params["critic"], images)) for images in (x, y)]
    np.testing.assert_allclose(losses["generator"], plain - expected * logits[1].mean((1, 2)), rtol=1e-10)
    hinge = (np.maximum(0, 1 - logits[0]).mean((1, 2)) + np.maximum(0, 1 + logits[1]).mean((1, 2))) / 2
    np.testing.assert_allclose(losses["critic"], hinge, rtol=1e-10)
    for values, edge in zip(logits, (1, -1), strict=True):
        assert values.min() < edge < values.max()

    def means(learned):
        losses, _ = objective.losses(net, learned, {}, batch, None, 0)
        return {name: jnp.mean(loss).astype(jnp.float32) for name, loss in losses.items()}, None

    grads, _ = gradients(means, params, objective.players)

    def generator(own):
        loss, _ = objective.loss(net, {"net": own}, {}, batch, None, 0)
        return jnp.mean(loss) + expected * fooled(outputs(own))

    def critic(own):
        real, fake = (objective.judge(own, images) for images in (x, y))
        return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2

    wanted = {"net": jax.grad(generator)(params["net"]), "critic": jax.grad(critic)(params["critic"])}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), grads, wanted)


@pytest.mark.parametrize(
    ("kind", "options", "reached"),
    [
        ("tiny", {}, {"net/A", "net/last/kernel"}),
        ("kl", {"kl_weight": 1.0}, {"net/A"}),
        ("vq", {"codebook_weight": 1.0, "beta": 0.0}, {"net/A"}),
        ("vq", {"codebook_weight": 1.0, "beta": 0.0, "legacy": False}, {"net/quantize/embedding/embedding"}),
        ("vq", {"codebook_weight": 1.0, "codebook": "ema"}, {"net/A"}),
        ("tiny", {"equivariance": 1.0}, {"net/A", "net/last/kernel"}),
        ("tiny", CRITIC, {"net/A", "net/last/kernel"}),
        ("vq", CRITIC, {"net/A", "net/last/kernel"}),
    ],
)
def test_which_parameters_a_term_moves(kind, options, reached, batch):
    """A term adds exactly 0 to the gradient of all other parameters, those of the critic included."""
    params = params_of(kind, objective_of(**CRITIC))
    batch = with_draws(objective_of(equivariance=1.0), batch, jax.random.key(1))

    def slope(**options):
        objective = objective_of(**{"kl_weight": 0.0, "codebook_weight": 0.0, **options})

        def loss(params):
            if objective.players is None:
                return jnp.sum(objective.loss(linear(kind), params, {}, batch, None, 0)[0])
            return jnp.sum(objective.losses(linear(kind), params, {}, batch, None, 0)[0]["generator"])

        return trees.by_path(jax.grad(loss)(params))

    with_term, without = slope(**options), slope() if options else {}
    assert {path for path, leaf in with_term.items() if (leaf != without.get(path, 0)).any()} == reached


@pytest.mark.parametrize("kind", slow_except(["kl"], ["kl", "vq"]))
def test_the_perceptual_term(kind, x64, tmp_path):
    """It is added to the error of each pixel, is part of lambda, and moves the autoencoder alone."""
    shape, weight = (16, 16, 1), 0.5
    objective = objective_of(perceptual_weight=weight, perceptual_path=vgg.write(tmp_path), **CRITIC)
    net, params = linear(kind, shape), params_of(kind, objective, shape)
    assert params.keys() == {"net", "critic"} and objective.pretrained.keys() == {"perceptual"}
    x = jax.random.normal(jax.random.key(3), (2, *shape), jnp.float64)
    batch = with_draws(objective, {"x": x, "cond": {}}, jax.random.key(1))

    @jax.jit
    def actual(params, pretrained):
        def means(learned):
            losses, metrics = objective.losses(net, {**learned, **pretrained}, {}, batch, None, 0)
            return {name: jnp.mean(loss).astype(jnp.float32) for name, loss in losses.items()}, metrics

        return gradients(means, params, objective.players)

    @jax.jit
    def expected(params, pretrained):
        def outputs(own):
            return net.decode(own, jax.vmap(net.sample)(net.encode(own, x), batch["draws"]["keys"]))

        def perceptual(y):
            return jnp.mean(lpips.distance(pretrained["perceptual"], x, y))

        def distance(own):
            y = outputs(own)
            error = jnp.abs(x - y) + weight * perceptual(y)
            return jnp.sum(error) / len(x) if kind == "kl" else jnp.mean(error)

        def fooled(own):
            return -jnp.mean(objective.judge(params["critic"], outputs(own)))

        def others(own):
            return jnp.mean(objective_of().loss(net, {"net": own}, {}, batch, None, 0)[0])

        def error(own):
            error = jnp.abs(x - outputs(own))
            return jnp.sum(error) / len(x) if kind == "kl" else jnp.mean(error)

        slopes = [jax.grad(function)(params["net"]) for function in (distance, fooled, others, error)]
        sizes = [jnp.linalg.norm(slope["last"]["kernel"]) for slope in slopes]
        factor = 0.5 * sizes[0] / (sizes[1] + 1e-4)
        moves = jax.tree.map(lambda d, f, o, e: d + factor * f + o - e, *slopes)
        real, fake = (lambda own: objective.judge(own, x)), lambda own: objective.judge(own, outputs(params["net"]))
        hinge = lambda own: jnp.mean(jax.nn.relu(1 - real(own)) + jax.nn.relu(1 + fake(own))) / 2  # noqa: E731
        return {"net": moves, "critic": jax.grad(hinge)(params["critic"])}, factor, perceptual(outputs(params["net"]))

    grads, metrics = actual(params, objective.pretrained)
    wanted, factor, perceptual = expected(params, objective.pretrained)
    np.testing.assert_allclose([metrics["adaptive_weight"], metrics["lpips"]], [factor, perceptual], rtol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10), grads, wanted)


def test_the_critic_starts_at_a_step(batch):
    *_, before, _ = run("tiny", batch, step=2, disc_start=3, **CRITIC)
    *_, plain, _ = run("tiny", batch)
    *_, after, _ = run("tiny", batch, step=3, disc_start=3, **CRITIC)
    np.testing.assert_array_equal(before["generator"], plain)
    np.testing.assert_array_equal(before["critic"], 0)
    assert (after["critic"] > 0).all() and (after["generator"] != plain).all()


def test_the_weight_is_limited(batch):
    """A critic that ignores its input has no gradient, and lambda is at most disc_weight times 1e4."""
    objective = objective_of(**CRITIC)
    params, batch = params_of("kl", objective), with_draws(objective, batch, jax.random.key(1))
    params["critic"] = jax.tree.map(jnp.zeros_like, params["critic"])
    _, metrics = objective.losses(linear("kl"), params, params, batch, None, 0)
    assert metrics["adaptive_weight"] == 5000


def test_patches():
    """With three layers, as published, a number is computed from 70 x 70 pixels, and there are 30 x 30 of 256 x 256."""
    objective = objective_of(disc_weight=1.0)
    like = AutoencoderApply("", None, (256, 256, 3), (32, 32, 4), ())
    params = jax.eval_shape(lambda: objective.init(Network(lambda key: {}, like), jax.random.key(0)))["critic"]
    assert [params[name]["kernel"].shape for name in ("conv_0", "conv_1", "conv_2", "conv_3", "conv_out")] == [
        (4, 4, 3, 64), (4, 4, 64, 128), (4, 4, 128, 256), (4, 4, 256, 512), (4, 4, 512, 1),
    ]  # fmt: skip
    x = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    assert jax.eval_shape(objective.judge, params, x).shape == (2, 30, 30)
    small = objective_of(**CRITIC)
    critic = params_of("tiny", small)["critic"]
    kernel = critic["conv_1"]["kernel"] / 6
    assert abs(kernel.std() / 0.02 - 1) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_trains_on_devices(kind, mesh_of):
    """The loss and the gradient reach every parameter, on two devices and with accumulation."""
    network = build("networks", NETWORKS[kind], shape=SHAPE)
    objective, mesh = objective_of(equivariance=0.1, **CRITIC), mesh_of(2, 1, 1)
    optimizer, ema = make_optimizer(steps=2, learning_rate=1e-3), make_ema(decays=(0.5,))
    state = jax.jit(lambda: init_state(objective, network, optimizer, ema, jax.random.key(0)))()
    before = jax.device_get(state.params)
    places = sharding.of_state(state, mesh)
    state = jax.device_put(state, places)
    step = jax.jit(make_step(objective, network, optimizer, ema, seed=0, accumulate=2), out_shardings=(places, None))
    x = jax.random.normal(jax.random.key(0), (4, *SHAPE))
    batch = sharding.to_global({"x": np.asarray(x), "cond": {}}, sharding.by_example(mesh))
    for _ in range(2):
        state, metrics = step(state, batch)
    assert all(np.isfinite(metrics[f"loss_{name}"]) for name in objective.players)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.params))
    moved["critic"]["conv_out"].pop("bias")  # its gradient is 0 while all logits are between -1 and 1
    assert not [path for path, changed in trees.by_path(moved).items() if not changed]
    assert state.ema["0.5"].keys() == {"net"}


def test_refusals():
    mlp, tiny = (build("networks", network, shape=SHAPE) for network in ("mlp", NETWORKS["tiny"]))
    for field, network, options in (
        ("network.name", mlp, {}),
        ("objective.disc_layers", tiny, {"disc_weight": 1.0}),
        ("objective.equivariance", build("networks", NETWORKS["tiny"], shape=(8, 6, 1)), {"equivariance": 1.0}),
        ("objective.equivariance", build("networks", NETWORKS["tiny"], shape=(6, 6, 1)), {"equivariance": 1.0}),
    ):
        with refused(field):
            objective_of(**options).init(network, jax.random.key(0))
    paths = {"perceptual_path": ("absent.pth",)}
    for network in (tiny, build("networks", NETWORKS["tiny"], shape=(16, 16, 4))):
        with refused("objective.perceptual_weight"):
            objective_of(perceptual_weight=1.0, **paths).init(network, jax.random.key(0))
    with refused("objective.perceptual_weight"):
        network = build("networks", NETWORKS["tiny"], shape=(24, 24, 1))
        objective_of(perceptual_weight=1.0, equivariance=1.0, **paths).init(network, jax.random.key(0))
    for field, options in (("path", {"perceptual_weight": 1.0}), ("weight", paths)):
        with refused(f"objective.perceptual_{field}"):
            objective_of(**options)
    with refused("objective.perceptual_path"):
        _ = objective_of(perceptual_weight=1.0, **paths).pretrained
    for options in ({"kl_weight": -1.0}, {"disc_layers": 0}, {"disc_width": 2**20}, {"disc_start": -1}):
        (name,) = options
        with refused(f"objective.{name}"):
            objective_of(**options)
    objective = objective_of()
    for sampling in (lambda: objective.schedule, lambda: objective.denoiser(tiny.apply, {}),
                     lambda: objective.schedule_for({})):  # fmt: skip
        with refused("objective.name"):
            sampling()
    with refused("network.name"):
        build("objectives", "denoising").denoiser(tiny.apply, {"net": {}})(jnp.zeros((1, *SHAPE)), jnp.ones(1), {})
