"""Attention: the result and the memory of each implementation, and the choice between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.layers import attention
from diffusion.layers.attention import attend, choose_kernel, jvp
from tests.refusals import refused

B, N, M, HEADS, F = 2, 11, 9, 3, 16
KERNELS = ["auto", "xla", "chunked"]


def draw(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(B, tokens, HEADS, F)).astype(dtype) for tokens in (N, M, M))


Q, K, V = draw()
MASK = np.arange(M) < np.array([[4], [7]])


@pytest.fixture
def chunks_of_4(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 4)


def by_hand(q, k, v, mask=None):
    """Softmax attention in float64, one head at a time."""
    q, k, v = (np.float64(part) for part in (q, k, v))
    out = np.zeros(q.shape)
    for b in range(len(q)):
        for head in range(q.shape[2]):
            weights = np.exp(q[b, :, head] @ k[b, :, head].T / np.sqrt(q.shape[-1]))
            if mask is not None:
                weights = weights * mask[b]
            out[b, :, head] = weights / weights.sum(-1, keepdims=True) @ v[b, :, head]
    return out


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_is_softmax_attention(kernel, mask, chunks_of_4):
    np.testing.assert_allclose(attend(Q, K, V, mask, kernel=kernel), by_hand(Q, K, V, mask), atol=2e-6)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("tokens", "mask"), [(8, None), (11, None), (11, MASK)], ids=["full", "partial", "mask"])
def test_chunks_change_nothing(tokens, mask, devices, chunks_of_4, monkeypatch):
    """Output and gradients are the same, whether or not the queries fill the last chunk. On one CPU there is a loop
    over the heads."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    program = str(jax.make_jaxpr(lambda *qkv: attend(*qkv, kernel="chunked"))(Q, K, V))
    assert program.count("scan[") == (2 if devices == 1 else 1)

    def run(kernel):
        def loss(q, k, v):
            out = attend(q, k, v, mask, kernel=kernel)
            return jnp.sum(jnp.sin(out)), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(Q[:, :tokens], K, V)
        return *gradients, out

    for chunked, whole in zip(run("chunked"), run("xla"), strict=True):
        assert chunked.shape == whole.shape and abs(whole).max() > 1e-2
        np.testing.assert_allclose(chunked, whole, atol=2e-6)


def test_chunks_take_less_memory():
    """Forward and backward take less than a third of the memory of all products at once; `auto` chooses chunks."""
    tokens = jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)

    def temporary(kernel, f):
        compiled = jax.jit(f(lambda q, k, v: jnp.sum(attend(q, k, v, kernel=kernel)))).lower(tokens, tokens, tokens)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    for f in (lambda loss: loss, lambda loss: jax.grad(loss, argnums=(0, 1, 2))):
        chunked, whole, auto = (temporary(kernel, f) for kernel in ("chunked", "xla", "auto"))
        assert whole >= 2048**2 * 4
        assert auto == chunked < whole / 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_jvp(kernel, chunks_of_4):
    """The directional derivative agrees with central differences."""
    directions = draw(seed=1)
    out, tangent = jvp(lambda *qkv: attend(*qkv, MASK, kernel=kernel), (Q, K, V), directions)
    ahead, behind = (
        by_hand(*(part + h * direction for part, direction in zip((Q, K, V), directions, strict=True)), MASK)
        for h in (1e-3, -1e-3)
    )
    np.testing.assert_allclose(out, by_hand(Q, K, V, MASK), atol=2e-6)
    np.testing.assert_allclose(tangent, (ahead - behind) / 2e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_masked_keys_have_no_influence(kernel, chunks_of_4):
    other_k, other_v = (np.where(MASK[:, :, None, None], part, 100) for part in (K, V))
    out = attend(Q, K, V, MASK, kernel=kernel)
    np.testing.assert_array_equal(attend(Q, other_k, other_v, MASK, kernel=kernel), out)
    assert abs(attend(Q, other_k, other_v, kernel=kernel) - out).max() > 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_any_key_the_output_is_finite(kernel, chunks_of_4):
    """Such an example has the mean of v, and neither it nor its gradient affects the others."""
    mask = np.array([np.zeros(M, bool), MASK[1]])

    def loss(q, k, v, mask):
        out = attend(q, k, v, mask, kernel=kernel)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    (gradients, out), (expected, other) = run(Q, K, V, mask), run(Q, K, V, MASK)
    assert all(np.isfinite(leaf).all() for leaf in (*gradients, out))
    np.testing.assert_allclose(out[0], np.broadcast_to(V[0].mean(0), out[0].shape), atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), (gradients, out), (expected, other))


@pytest.mark.parametrize("kernel", KERNELS)
def test_softmax_of_bfloat16_is_float32(kernel, chunks_of_4):
    """Logits are near 40, where bfloat16 would change them by up to 1/8, and their exponentials by that factor."""
    q, k, v = (jnp.asarray(part, jnp.bfloat16) for part in (10 * Q, K, V))
    out, expected = attend(q, k, v, kernel=kernel), by_hand(q, k, v)
    assert out.dtype == jnp.bfloat16
    assert abs(np.einsum("bnhf,bmhf->bhnm", np.float32(q), np.float32(k)) / F**0.5).max() > 30
    np.testing.assert_allclose(np.float32(out), expected, atol=2**-8 * abs(np.float32(v)).max())


@pytest.mark.parametrize(
    ("capability", "tokens", "width", "dtype", "expected"),
    [
        ((9, 0), 64, 64, "bfloat16", "cudnn"),
        ((9, 0), 64, 64, "float16", "cudnn"),
        ((9, 0), 2048, 64, "bfloat16", "cudnn"),
        ((9, 0), 64, 192, "bfloat16", "cudnn"),
        ((9, 0), 64, 256, "bfloat16", "cudnn"),
        ((9, 0), 64, 264, "bfloat16", "xla"),
        ((8, 0), 64, 128, "bfloat16", "cudnn"),
        ((8, 0), 64, 192, "bfloat16", "xla"),
        ((7, 5), 64, 64, "bfloat16", "xla"),
        ((9, 0), 64, 60, "bfloat16", "xla"),
        ((9, 0), 64, 64, "float32", "xla"),
        ((9, 0), 1024, 64, "float32", "chunked"),
        ((), 64, 64, "bfloat16", "xla"),
        ((), 1023, 64, "bfloat16", "xla"),
        ((), 1024, 64, "bfloat16", "chunked"),
    ],
)
def test_choice_of_auto(capability, tokens, width, dtype, expected, monkeypatch):
    monkeypatch.setattr(attention, "_nvidia_capability", lambda: capability)
    q = jax.ShapeDtypeStruct((1, tokens, 2, width), jnp.dtype(dtype))
    assert choose_kernel(q, q, None) == expected
    without_cudnn = "chunked" if tokens >= 1024 else "xla"
    mask = jax.ShapeDtypeStruct((1, tokens), jnp.dtype(bool))
    assert choose_kernel(q, q, mask) == without_cudnn


def test_auto_avoids_cudnn_inside_jvp(monkeypatch):
    """The choice holds inside a scan, whose body is traced before it is differentiated, and ends with the jvp."""
    monkeypatch.setattr(attention, "_nvidia_capability", lambda: (9, 0))
    q, chosen = jnp.zeros((1, 4, 1, 8), jnp.bfloat16), []

    def scanned(x):
        def body(x, _):
            chosen.append(choose_kernel(q, q, None))
            return x, None

        return jax.lax.scan(body, x, length=2)[0]

    scanned(1.0)
    assert chosen == ["cudnn"]
    jvp(scanned, (1.0,), (1.0,))
    assert set(chosen[1:]) == {"xla"}
    assert choose_kernel(q, q, None) == "cudnn"


def test_chunks_depend_on_queries_times_keys():
    q, k = (jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32) for tokens in (4096, 77))
    assert choose_kernel(q, k, None) == "xla"
    assert choose_kernel(q, q, None) == "chunked"


def test_cudnn_follows_the_machine(monkeypatch, caplog):
    """A model that was trained with cuDNN runs elsewhere, with one warning; arrays that cuDNN rejects are refused."""
    assert attention._nvidia_capability() == ()
    attention._warn_of_no_cudnn.cache_clear()
    for _ in range(2):
        np.testing.assert_array_equal(attend(Q, K, V, kernel="cudnn"), attend(Q, K, V, kernel="auto"))
    assert [record.name for record in caplog.records] == ["diffusion.layers.attention"]
    monkeypatch.setattr(attention, "_nvidia_capability", lambda: (9, 0))
    with refused("network.kernel"):
        attend(Q, K, V, kernel="cudnn")
