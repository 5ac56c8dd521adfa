"""Tests MACs against XLA's count where it is exact, closed forms, and the papers' figures."""

import jax
import jax.numpy as jnp
import pytest

from diffusion.core.build import build, build_network
from diffusion.core.types import ArraySpec, Autoencoder, Spec, class_labels
from diffusion.profiling.macs import encoder_macs, macs, network_macs
from tests.vae_folders import VAE

DOT = 7**3  # MACs of `dot`
SQUARE = jax.ShapeDtypeStruct((7, 7), jnp.float32)


def macs_of(section, shape, num_classes=0):
    spec = Spec(ArraySpec(shape), class_labels(num_classes))
    return network_macs(build_network(section, spec), spec)


def dot(x):
    return x @ x


def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def conv(**options):
    options = {"window_strides": (1, 1), "padding": [(0, 0), (0, 0)], **options}
    return lambda x, w: jax.lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, a, b: x @ a @ b, [(5, 7), (7, 11), (11, 3)]),
        (lambda x, a: jnp.einsum("bhnf,bhmf->bhnm", x, a), [(2, 3, 5, 7), (2, 3, 11, 7)]),
        (lambda x, a: jnp.einsum("bijc,ijcd->bd", x, a), [(2, 3, 4, 5), (3, 4, 5, 6)]),
        (conv(), [(2, 9, 8, 5), (3, 2, 5, 7)]),
        (conv(window_strides=(2, 3)), [(2, 9, 9, 5), (3, 2, 5, 7)]),
        (conv(feature_group_count=3), [(2, 9, 9, 6), (3, 2, 2, 9)]),
        (conv(batch_group_count=2), [(4, 9, 9, 6), (3, 3, 6, 8)]),
        (conv(rhs_dilation=(2, 3)), [(2, 9, 9, 6), (3, 2, 6, 9)]),
        (conv(lhs_dilation=(2, 3)), [(2, 9, 9, 6), (3, 3, 6, 9)]),
        (
            conv(lhs_dilation=(3, 2), rhs_dilation=(2, 1), window_strides=(2, 1), padding=[(-1, 0), (0, 0)]),
            [(2, 9, 9, 6), (2, 3, 6, 8)],
        ),
    ],
)
def test_macs_are_half_of_the_flops_of_xla(function, shapes):
    """The counts agree exactly for products without padding, which XLA does not count."""
    args = [floats(*shape) for shape in shapes]
    assert 2 * macs(function, *args) == jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_padding_counts_as_pixels():
    """The zeros between the pixels of a transposed convolution do not count: each pixel meets each tap once."""
    x, w = floats(2, 8, 8, 6), floats(3, 3, 6, 9)
    assert macs(conv(padding="SAME"), x, w) == 2 * 8 * 8 * 9 * 6 * 9
    assert macs(lambda x, w: jax.lax.conv_transpose(x, w, (2, 2), "SAME"), x, w) == 2 * 8 * 8 * 9 * 6 * 9


def test_a_scan_counts_as_an_unrolled_loop():
    def body(x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ x.T @ x, jnp.ones((3, 7, 7)))[0]

    def loop(x):
        for _ in range(5):
            x = x @ x.T @ x
            for _ in range(3):
                x = x @ jnp.ones((7, 7))
        return x

    scanned = macs(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: body(x), x), SQUARE)
    assert scanned == macs(loop, SQUARE) == 5 * (2 + 3) * DOT


@jax.custom_jvp
def custom_jvp(x):
    return dot(x)


@jax.custom_vjp
def custom_vjp(x):
    return dot(x)


custom_jvp.defjvp(lambda primals, tangents: (custom_jvp(*primals), 2 * primals[0] @ tangents[0]))
custom_vjp.defvjp(lambda x: (dot(x), x), lambda x, g: (g @ x.T + x.T @ g,))
WRAPPED = {
    "jit": jax.jit(dot),
    "remat": jax.checkpoint(dot),
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "all": jax.jit(lambda x: jax.checkpoint(lambda x: custom_vjp(x))(x)),
    "linear_call": lambda x: jax.custom_derivatives.linear_call(lambda r, x: r @ x, lambda r, x: r.T @ x, x, x),
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, dot, jnp.sin, x),
    "switch": lambda x: jax.lax.switch(jnp.int32(x[0, 0]), [jnp.sin, dot, lambda x: x @ x[:, :3] @ x[:3]], x),
    "while": lambda x: dot(jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapping_does_not_change_the_count(name):
    """Of a conditional's branches, the most expensive one counts. A `while` without products counts as 0."""
    assert macs(WRAPPED[name], SQUARE) == DOT


def shard_map(x):
    mesh, spec = jax.make_mesh((2,), ("a",), devices=jax.devices()[:2]), jax.sharding.PartitionSpec()
    return jax.shard_map(dot, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def pallas_call(x):
    from jax.experimental import pallas

    def kernel(x, out):
        out[...] = dot(x[...])

    return pallas.pallas_call(kernel, out_shape=SQUARE, grid=(3,))(x)


REFUSED = {
    "while": lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, dot, x),
    "shard_map": shard_map,
    "pallas_call": pallas_call,
    "custom_linear_solve": lambda x: jax.lax.custom_linear_solve(dot, x, lambda _, y: dot(y), symmetric=True),
    "ragged_dot": lambda x: jax.lax.ragged_dot(x, jnp.ones((2, 7, 7)), jnp.array([3, 4])),
    "scaled_matmul": lambda x: jax.nn.scaled_matmul(
        jnp.ones((1, 7, 64), "float8_e4m3fn"), jnp.ones((1, 7, 64), "float8_e4m3fn"),
        jnp.ones((1, 7, 2), "float8_e8m0fnu"), jnp.ones((1, 7, 2), "float8_e8m0fnu"),
    ),
    "ffi_call": lambda x: jax.ffi.ffi_call("product", SQUARE)(x),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_products_that_cannot_be_counted(name):
    with pytest.raises(ValueError, match=name):
        macs(REFUSED[name], SQUARE)


def test_cudnn_attention(monkeypatch):
    """The forward pass is recognized by its name; the backward pass is refused rather than ignored."""
    for check in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{check}", lambda *_: 99999)

    def attend(q, k):
        return jax.nn.dot_product_attention(q, k, k, implementation="cudnn")

    q, k = floats(2, 16, 4, 8, dtype=jnp.bfloat16), floats(2, 24, 4, 8, dtype=jnp.bfloat16)
    assert macs(attend, q, k) == 2 * (2 * 4) * (16 * 24) * 8
    with pytest.raises(ValueError, match="dot_product_attention_bwd"):
        macs(jax.grad(lambda q, k: jnp.sum(attend(q, k)).astype(jnp.float32)), q, k)
    counts = [macs_of({**SMALL, "dtype": "bfloat16", "kernel": kernel}, (8, 8, 3)) for kernel in ("xla", "cudnn")]
    assert counts[0] == counts[1]


SMALL = {"name": "dit", "patch_size": 2, "width": 16, "depth": 3, "num_heads": 2, "outputs": 2}


def dit_parts(size, channels, classes, patch, width, depth, outputs):
    """Returns the MACs of the two products of the inputs, of the blocks, and of the rest."""
    N, D, L, C = (size // patch) ** 2, width, depth, patch**2 * channels
    inputs = 256 * D + N * C * D  # the 256 frequencies of the noise label, and the patches
    others = D * D + 2 * D * D + N * D * outputs * C  # second embedding layer, last modulation, last layer
    return inputs, N * L * 12 * D**2 + 2 * L * N**2 * D + 6 * L * D**2, others


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("kernel", ["xla", "chunked"])
def test_dit_in_closed_form(remat, kernel):
    work = macs_of({**SMALL, "remat": remat, "kernel": kernel}, (8, 8, 3), 10)
    pad = 2 * 3 * 16 * (256 - 16) * 16 if kernel == "chunked" else 0  # 16 queries are padded to a chunk of 256
    assert work == sum(dit_parts(8, 3, 10, 2, 16, 3, 2)) + pad


def test_training_is_three_times_the_forward_pass():
    """Except for gradients of the inputs. Rematerialization adds up to one more forward pass of the blocks."""
    x, c_noise = floats(5, 8, 8, 3), floats(5)
    cond = {"label": floats(5, dtype=jnp.int32)}
    inputs, blocks, others = (5 * part for part in dit_parts(8, 3, 10, 2, 16, 3, 2))
    for remat, least, most in (("none", 3, 3), ("full", 3.5, 4)):
        network = build("networks", {**SMALL, "remat": remat}, shape=(8, 8, 3), num_classes=10)
        params = jax.eval_shape(network.init, jax.random.key(0))
        step = jax.value_and_grad(lambda *args, apply=network.apply: jnp.sum(apply(*args) ** 2))
        work = macs(step, params, x, c_noise, cond) - 2 * inputs - 3 * others
        assert least * blocks <= work <= most * blocks


PUBLISHED_DIT = {  # GMACs from Peebles & Xie 2023, table 4, which calls them Gflops
    ("S", 2): 6.06, ("B", 2): 23.01, ("L", 2): 80.71, ("XL", 2): 118.64, ("XL", 4): 29.05, ("XL", 8): 7.39,
}  # fmt: skip
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


@pytest.mark.parametrize(("size", "patch"), PUBLISHED_DIT)
def test_published_dits(size, patch):
    width, depth, heads = SIZES[size]
    spec = {"name": "dit", "patch_size": patch, "width": width, "depth": depth, "num_heads": heads, "outputs": 2}
    work = macs_of(spec, (32, 32, 4), 1000)
    assert work / 1e9 == pytest.approx(PUBLISHED_DIT[size, patch], rel=1e-3)


def test_unet_in_closed_form():
    def conv(H, c_in, c_out, k=3):
        return H * H * k * k * c_in * c_out

    def residual(H, c_in, c_out):
        skip = conv(H, c_in, c_out, 1) if c_in != c_out else 0
        return (
            conv(H, c_in, c_out) + conv(H, c_out, c_out) + skip + 32 * 2 * c_out
        )  # the last term is the embedding's projection

    def attention(H, C):
        return 4 * H**2 * C**2 + 2 * H**4 * C

    embedding = 8 * 32 + 32 * 32
    down = conv(8, 1, 8) + residual(8, 8, 8) + conv(4, 8, 8) + residual(4, 8, 16) + attention(4, 16)
    middle = 2 * residual(4, 16, 16) + attention(4, 16)
    up = residual(4, 16 + 16, 16) + residual(4, 16 + 8, 16) + 2 * attention(4, 16) + conv(8, 16, 16)
    up += residual(8, 16 + 8, 8) + residual(8, 8 + 8, 8) + conv(8, 8, 1)
    spec = {
        "name": "unet",
        "width": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "head_dim": 8,
    }
    work = macs_of(spec, (8, 8, 1), 10)
    assert work == embedding + down + middle + up


DDPM = {"scale_shift": False, "asymmetric_padding": True, "head_dim": None, "freq_shift": 1}
ADM = {
    "width": 192,
    "channel_mult": (1, 2, 3, 4),
    "num_res_blocks": 3,
    "attention_resolutions": (32, 16, 8),
    "resample": "residual",
    "outputs": 2,
}


@pytest.mark.parametrize(
    ("options", "size", "classes", "attention", "published"),
    [
        # Attention blocks as (pixels, channels, count), and GMACs without their products of queries, keys and values.
        (DDPM, 32, 0, [(256, 256, 5), (16, 256, 1)], 6.06),
        pytest.param(ADM, 64, 1000, [(1024, 384, 7), (256, 576, 7), (64, 768, 8)], 103.9, marks=pytest.mark.slow),
    ],
    ids=["ddpm", "adm"],
)
def test_published_unets(options, size, classes, attention, published):
    """The published counts do not include the products of queries and keys and of weights and values."""
    shape = (size, size, 3)
    work = macs_of({"name": "unet", **options}, shape, classes)
    products = sum(2 * pixels**2 * channels * count for pixels, channels, count in attention)
    assert (work - products) / 1e9 == pytest.approx(published, rel=0.01)


def test_autoencoders_in_closed_form():
    """A forward pass encodes and decodes. All blocks are convolutions of four channels, without attention."""
    spec = Spec(ArraySpec((8, 8, 1)))
    network = build("networks", VAE, shape=spec.shape)
    params, apply = jax.eval_shape(network.init, jax.random.key(0)), network.apply
    large, small, conv = 8 * 8, 4 * 4, 9 * 4 * 4
    encoder = large * (9 * 4 + 2 * conv) + small * ((1 + 2 + 4 + 1) * conv + 4 * 4)
    decoder = small * (2 * 2 + 9 * 2 * 4 + (4 + 4) * conv) + large * ((1 + 4) * conv + 9 * 4)
    assert encoder_macs(Autoencoder(params, apply.encode, apply.decode, apply.latent_shape), spec) == encoder
    assert network_macs(network, spec) == encoder + decoder
