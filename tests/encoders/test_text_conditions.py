"""Captions and prompts as conditions: tokenized, encoded, dropped, replaced by other texts, and stored in advance."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion as df
from diffusion.core.arrays import kept, with_null
from diffusion.core.build import build, build_network, model_spec
from diffusion.core.types import ArraySpec, ConditionSpec, Spec, Text, TextEncoder, TextPart
from diffusion.data import captions, text_records
from diffusion.data.pipeline import Batches
from diffusion.encoders import prompt_weights, text_conditions, tokenizers
from diffusion.pipelines.encoding import encode
from diffusion.training.step import draw_keep_parts
from diffusion.training.trainer import Trainer
from tests.refusals import refused

LENGTH, WIDTH = 6, 4
CAPTIONS = ("a", "\nof the\nin a\n", "it", "")
NETWORK = {"name": "dit", "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2}
OPTIONS = {"batch_size": 8, "steps": 2, "seed": 1}


class Captioned:
    """Noise with captions; one example has two of them and one has none."""

    def __init__(self, has_captions=True):
        self.spec = Spec(ArraySpec((8, 8, 1), dtype="uint8"), captions=has_captions)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = np.random.default_rng(index).integers(0, 256, (8, 8, 1), np.uint8)
        caption = {"caption": CAPTIONS[index % len(CAPTIONS)]} if self.spec.captions else {}
        return {"x": x, "cond": {}, **caption}


def table_of(tokens, table):
    """Two encoders whose outputs follow each other along the features: the vectors of tokens, and their squares."""
    return Text(
        jnp.concatenate([table[tokens.tokens], table[tokens.tokens] ** 2], -1), tokens.mask, table[tokens.tokens[:, 1]]
    )


@pytest.fixture(scope="module")
def frozen():
    """An encoder whose vectors are rows of a table, with the empty text as the null text."""
    tokenizer = tokenizers.fit((), "bytes", length=LENGTH)
    table = jax.random.normal(jax.random.key(0), (tokenizer.vocabulary, WIDTH))
    encode = lambda params, tokens: table_of(tokens, params["table"])  # noqa: E731
    parts = {
        "plain": TextPart((0, LENGTH), (0, WIDTH), (0, WIDTH)),
        "squares": TextPart((0, LENGTH), (WIDTH, 2 * WIDTH)),
    }
    return TextEncoder(
        tokenizer, ConditionSpec("text", (LENGTH, 2 * WIDTH), pooled=WIDTH), {"table": table}, encode,
        null=encode({"table": table}, tokenizer([""])), parts=parts, digest="abc",
    )  # fmt: skip


@pytest.fixture(scope="module")
def network(frozen):
    spec = model_spec(Captioned().spec, None, frozen)
    made = build_network(NETWORK, spec)
    params = made.init(jax.random.key(0))
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    return dataclasses.replace(made, apply=jax.jit(made.apply)), moved


def cond_of(encoder, texts, **more):
    cond = {"text": encoder.tokenize(texts), **more}
    return text_conditions.encoded(encoder, encoder.params, encoder.null, cond)


def test_a_dropped_text_gives_exactly_the_output_of_the_null_text(frozen, network):
    (apply, params), texts = (network[0].apply, network[1]), ["a", "of", "it"]
    x, t = jax.random.normal(jax.random.key(2), (3, 8, 8, 1)), jnp.array([0.1, 0.5, 0.9])
    dropped = apply(params, x, t, cond_of(frozen, texts, keep=jnp.array([True, False, True])))
    empty = apply(params, x, t, cond_of(frozen, ["a", "", "it"]))
    np.testing.assert_array_equal(dropped, empty)
    full = apply(params, x, t, cond_of(frozen, texts))
    assert np.abs(dropped - full)[1].max() > 1e-3
    by_name = apply(params, x, t, cond_of(frozen, texts, keep={"text": jnp.array([True, False, True])}))
    np.testing.assert_array_equal(dropped, by_name)
    other = frozen.tokenize(["x", "in", "y"])
    negative = apply(params, x, t, cond_of(frozen, texts, keep=jnp.array([True, False, True]), null={"text": other}))
    np.testing.assert_array_equal(negative, apply(params, x, t, cond_of(frozen, ["a", "in", "it"])))


def test_weights_of_words_change_their_vectors(frozen):
    """Without brackets nothing changes; twice the weight of a token is twice its vector, up to the mean."""
    reading = prompt_weights.weighted(frozen, "comfyui")
    plain, text = (
        frozen.encode(frozen.params, frozen.tokenize(["a b"])),
        reading.encode(frozen.params, reading.tokenize(["a b"])),
    )
    np.testing.assert_allclose(text.tokens, plain.tokens)
    heavy = reading.encode(frozen.params, reading.tokenize(["a (b:2)"])).tokens
    empty = frozen.null.tokens
    np.testing.assert_allclose(heavy[:, 3], (empty + 2 * (plain.tokens - empty))[:, 3], rtol=1e-5)
    np.testing.assert_allclose(heavy[:, :3], plain.tokens[:, :3])
    with refused("prompt_weights"):
        prompt_weights.weighted(dataclasses.replace(frozen, encode=None), "a1111")


def test_null_values_replace_what_is_not_kept():
    cond = {
        "a": jnp.arange(3.0),
        "b": jnp.arange(3),
        "keep": jnp.array([True, False, True]),
        "null": {"a": -jnp.ones(3)},
    }
    found = with_null(cond)
    np.testing.assert_array_equal(found["a"], [0, -1, 2])
    assert kept(found, "a") is True and "null" not in found
    np.testing.assert_array_equal(kept(found, "b"), cond["keep"])


def test_single_encoders_are_dropped(frozen):
    texts = ["a", "of", "it"]
    tokens, keep = frozen.tokenize(texts), {"squares": jnp.array([True, False, True])}
    found = text_conditions.encoded(frozen, frozen.params, frozen.null, {"text": tokens}, keep)["text"]
    full, null = frozen.encode(frozen.params, tokens), frozen.null
    np.testing.assert_array_equal(found.tokens[..., :WIDTH], full.tokens[..., :WIDTH])
    np.testing.assert_array_equal(found.tokens[0, :, WIDTH:], full.tokens[0, :, WIDTH:])
    np.testing.assert_array_equal(found.tokens[1, :, WIDTH:], null.tokens[0, :, WIDTH:])
    np.testing.assert_array_equal(found.pooled, full.pooled)
    drawn = draw_keep_parts(jax.random.key(0), {"text.squares": 0.25, "text": 0.1}, 4000)
    assert list(drawn) == ["squares"] and abs(drawn["squares"].mean() - 0.75) < 0.03
    with refused("train.cond_drop_rate"):
        Trainer(Captioned(), NETWORK, "flow_matching", text_encoder=frozen, cond_drop_rate={"text.t5": 0.1}, **OPTIONS)


def test_one_of_several_captions_is_drawn_by_the_seed(frozen):
    source = pickle.loads(pickle.dumps(captions.with_text(Captioned(), frozen)))
    first = frozen.tokenize(["of the", "in a", ""])
    np.testing.assert_array_equal(source[1]["cond"]["text"].tokens, first.tokens[0])
    np.testing.assert_array_equal(source[3]["cond"]["text"].tokens, first.tokens[2])
    drawn = [source.draw(1, np.random.default_rng(seed))["cond"]["text"].tokens for seed in range(20)]
    shares = [sum((tokens == first.tokens[row]).all() for tokens in drawn) for row in (0, 1)]
    assert sum(shares) == 20 and min(shares) > 2
    both = [next(Batches(source, batch_size=4, seed=3))["cond"]["text"].tokens for _ in range(2)]
    np.testing.assert_array_equal(*both)


def test_a_cache_trains_as_captions_do(frozen, tmp_path):
    """Only the vectors of tokens that are no padding are stored, of all captions."""
    source, identity = Captioned(), build("autoencoders", "identity", shape=(8, 8, 1))
    folder = str(tmp_path / "cache")
    info = encode(source, identity, folder, text_encoder=frozen, batch_size=3)
    assert info["text"] == {"encoder": "abc", "shape": [LENGTH, 2 * WIDTH], "pooled": WIDTH, "dtype": "float32"}
    stored = build("data", {"name": "array_record", "path": folder, "captions": True})
    for index in range(8):
        tokens = frozen.tokenize([captions.captions_of(source[index])[0]])
        expected, text = (
            jax.tree.map(lambda leaf: leaf[0], frozen.encode(frozen.params, tokens)),
            stored[index]["cond"]["text"],
        )
        np.testing.assert_array_equal(text.tokens, np.where(expected.mask[:, None], expected.tokens, 0))
        np.testing.assert_array_equal(text.pooled, expected.pooled)
    assert captions.of_source(stored)(1) == "of the"
    short = jax.tree.map(lambda leaf: leaf[0], frozen.encode(frozen.params, frozen.tokenize(["a"])))  # 3 tokens
    assert len(text_records.packed([short, short])) == 2 + 2 * (1 + 4 * (3 * 2 * WIDTH + WIDTH))
    losses = []
    for data, encoder in ((source, None), (stored, identity)):
        trainer = Trainer(
            data, NETWORK, "flow_matching", autoencoder=encoder and identity, text_encoder=frozen, **OPTIONS
        )
        trainer.fit()
        assert ("text_encoder" in trainer.frozen) == (encoder is None)
        losses.append(trainer.metrics["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with refused("text_encoder.path"):
        captions.with_text(stored, dataclasses.replace(frozen, digest="other"))
    with refused("text_encoder"):
        captions.with_text(stored, None)


def test_captions_and_encoders_belong_together(frozen):
    with refused("data.captions"):
        captions.with_text(Captioned(), None)
    with refused("data.captions"):
        captions.with_text(Captioned(has_captions=False), frozen)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a text encoder that is trained with the network."""
    workdir = str(tmp_path_factory.mktemp("small") / "run")
    small = {"name": "small", "width": 8, "depth": 1, "num_heads": 2, "length": LENGTH, "vocab_size": 300}
    trainer = Trainer(Captioned(), NETWORK, "flow_matching", text_encoder=small, workdir=workdir, **OPTIONS)
    trainer.fit()
    stored = df.load(workdir)
    stored._source = trainer.source
    return trainer, stored


def test_a_small_encoder_is_trained_and_stored(run):
    trainer, stored = run
    recorded = trainer.meta["text_encoder"]["tokenizer"]
    assert stored.text_encoder.tokenizer == recorded and json.loads(recorded)["kind"] == "bpe"
    init = trainer.network.init(jax.random.key(1))["text_encoder"]
    trained = trainer.state.params["net"]["text_encoder"]
    assert jax.tree.structure(init) == jax.tree.structure(trained)
    assert "text_encoder" not in trainer.frozen


def test_prompts_are_encoded_once_per_sample(run, monkeypatch):
    """They are encoded before the loop of the sampler, whose body neither looks up tokens nor reads the encoder."""
    _, stored = run
    counted = []
    prepare = stored.network.prepare
    network = dataclasses.replace(stored.network, prepare=lambda *args: counted.append(1) or prepare(*args))
    stored.network, before = network, stored.network
    x = stored.sample(4, prompts=["a", "of"], steps=5, guidance=2.0)
    stored.network = before
    assert len(counted) == 2  # traced once to check and once to compile
    np.testing.assert_array_equal(x, stored.sample(4, prompts=["a", "of", "a", "of"], steps=5, guidance=2.0))
    negative = stored.sample(4, prompts=["a", "of"], negative_prompt="it", steps=5, guidance=2.0)
    assert x.shape == (4, 8, 8, 1) and np.isfinite(negative).all()
    assert stored.sample(2, steps=2).shape == (2, 8, 8, 1)  # captions of the data


def test_an_adapted_network_encodes_text(run):
    """LoRA's change of the text encoder counts in what is computed once per sample as it does in the forward pass."""
    trainer, _ = run
    adapted = build("adapters", {"name": "lora", "rank": 2}, network=trainer.network)
    params = adapted.init(jax.random.key(0))
    params["lora"] = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params["lora"])
    tokens = jax.tree.map(jnp.asarray, trainer.text_encoder.tokenize(["a", "of"]))
    prepared = adapted.prepare(params, {"text": tokens})["text"].tokens
    assert np.abs(prepared - trainer.network.prepare(params["base"], {"text": tokens})["text"].tokens).max() > 1e-3
    x, t = jnp.zeros((2, 8, 8, 1)), jnp.full(2, 0.5)
    apply = jax.jit(adapted.apply)
    direct, once = apply(params, x, t, {"text": tokens}), apply(params, x, t, adapted.prepare(params, {"text": tokens}))
    np.testing.assert_allclose(direct, once, rtol=1e-4)


def test_bad_prompts(run, tmp_path):
    _, stored = run
    for field, options in (
        ("prompts", {"prompts": []}),
        ("prompts", {"prompts": ["a"] * 5}),
        ("negative_prompt", {"prompts": "a", "negative_prompt": "b"}),
    ):
        with refused(field):
            stored.sample(4, steps=2, **options)
    trainer = Trainer(Captioned(has_captions=False), NETWORK, "flow_matching", **OPTIONS)
    trainer.fit(1)
    with refused("prompts"):
        df.sample(trainer, 2, prompts="a red circle", steps=2)
