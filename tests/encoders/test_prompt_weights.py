"""Weights of words in prompts: their grammars, their tokens and both rules in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.types import Text
from diffusion.encoders import prompt_weights, tokenizers
from tests.refusals import refused


@pytest.mark.parametrize(
    ("prompt", "a1111", "comfyui"),
    [
        ("a cat", [("a cat", 1)], [("a cat", 1)]),
        ("", [("", 1)], [("", 1)]),
        ("a (cat:1.3), ok", [("a ", 1), ("cat", 1.3), (", ok", 1)], [("a ", 1), ("cat", 1.3), (", ok", 1)]),
        ("((cat)) x", [("cat", 1.21), (" x", 1)], [("cat", 1.21), (" x", 1)]),
        ("(a)(b)", [("ab", 1.1)], [("ab", 1.1)]),
        ("[cat] x", [("cat", 1 / 1.1), (" x", 1)], [("[cat] x", 1)]),
        (r"a \(b\) \[c\]", [("a (b) [c]", 1)], [(r"a (b) \[c\]", 1)]),
        ("(a (b:1.5):2)", [("a ", 2), ("b", 3)], [("a ", 2), ("b", 1.5)]),
        ("(a (b))", [("a ", 1.1), ("b", 1.21)], [("a ", 1.1), ("b", 1.21)]),
        ("((b):2)", [("b", 2.2)], [("b", 2.2)]),
        ("((b:2))", [("b", 2.2)], [("b", 2)]),
        ("x (open", [("x ", 1), ("open", 1.1)], [("x (open", 1)]),
        ("shut) y:2)", [("shut) y:2)", 1)], [("shut) y:2)", 1)]),
        ("(a: b)", [("a: b", 1.1)], [("a: b", 1.1)]),
        ("(a : .5 ) (b:-1)", [("a ", 0.5), (" ", 1), ("b", -1)], [("a ", 0.5), (" ", 1), ("b", -1)]),
        ("(a\nb:2)", [("a\nb", 2)], [("a\nb", 2)]),
    ],
)
def test_prompts_are_parsed(prompt, a1111, comfyui):
    for rule, expected in (("a1111", a1111), ("comfyui", comfyui)):
        found = prompt_weights.parse(prompt, rule)
        assert [text for text, _ in found] == [text for text, _ in expected]
        np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in expected], rtol=1e-12)


def test_tokens_have_the_weights_of_their_pieces(caplog):
    tokenizer = tokenizers.fit((), "bytes", length=8)
    text, weights = prompt_weights.tokenize(tokenizer, ["a(b:2)c", "ab(c:2)", "(abcdefgh:3)"])
    np.testing.assert_array_equal(text.tokens, tokenizer(["abc", "abc", "abcdefgh"]).tokens)
    expected = [[1, 1, 2, 1, 1, 1, 1, 1], [1, 1, 1, 2, 1, 1, 1, 1], [1, 3, 3, 3, 3, 3, 3, 1]]
    np.testing.assert_array_equal(weights, np.array(expected, np.float32))
    assert weights.dtype == np.float32 and len(caplog.records) == 1  # the same text is reported once


def test_both_rules_in_closed_form():
    rng, apply = np.random.default_rng(0), jax.jit(prompt_weights.apply, static_argnames="rule")
    z, e = rng.normal(1, 1, (2, 4, 3)).astype(np.float32), rng.normal(size=(1, 4, 3)).astype(np.float32)
    mask, pooled = np.ones((2, 4), bool), np.ones((2, 5), np.float32)
    weights = np.array([[1, 1, 1, 1], [1, 2, 0.5, 1]], np.float32)
    text = Text(z, mask, pooled)
    found = apply(text, weights)
    np.testing.assert_array_equal(found.tokens[0], z[0])
    assert found.mask.all() and (found.pooled == 1).all()
    multiplied = z[1] * weights[1][:, None]
    np.testing.assert_allclose(found.tokens[1], multiplied * z[1].mean() / multiplied.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.tokens[1].mean(), z[1].mean(), rtol=1e-5)

    assert not apply(Text(0 * z, mask, pooled), weights).tokens.any()  # not NaN

    found = apply(text, weights, rule="comfyui", empty=Text(e, mask[:1]))
    np.testing.assert_array_equal(found.tokens[0], z[0])
    np.testing.assert_array_equal(found.tokens[1, [0, 3]], z[1, [0, 3]])
    np.testing.assert_allclose(found.tokens[1, 1], 2 * z[1, 1] - e[0, 1], rtol=1e-5)
    np.testing.assert_allclose(found.tokens[1, 2], (z[1, 2] + e[0, 2]) / 2, rtol=1e-5)
    half = Text(jax.ShapeDtypeStruct(z.shape, jnp.bfloat16), mask)
    assert jax.eval_shape(prompt_weights.apply, half, weights).tokens.dtype == jnp.bfloat16


def test_unknown_rules_are_refused():
    with refused("rule"):
        prompt_weights.parse("a", "other")
    with refused("empty"):
        prompt_weights.apply(Text(np.ones((1, 2, 3), np.float32), np.ones((1, 2), bool)), np.ones((1, 2)), "comfyui")
