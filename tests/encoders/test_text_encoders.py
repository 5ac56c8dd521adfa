"""Text encoders in folders: closed forms, round trips and refusals. With transformers installed (`make parity`),
outputs and folders agree with its models."""

import functools
import gzip
import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from diffusion.core import tensors
from diffusion.core.build import build
from diffusion.encoders import pretrained_text, prompt_weights, text_conditions, text_folder
from diffusion.encoders.text_folder import CLIP, PROJECTED, T5, Stored
from diffusion.encoders.text_transformers import buckets
from tests.published import published
from tests.refusals import refused
from tests.text_folders import CLIP_CONFIG, PIPELINES, T5_CONFIG, stored_of, write_encoder, write_pipeline

EOS = CLIP_CONFIG["vocab_size"] - 1
# Texts of different lengths, from the start to the end and then padding.
IDS = np.array([[512, 7, 9, EOS, *[EOS] * 8], [512, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, EOS]], np.int32)
T5_IDS = np.array([[7, 9, 3, 1, *[0] * 8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 63, 1]], np.int32)
T5_MASK = np.array([[True] * 4 + [False] * 8, [True] * 12])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def write(kind):
        folder = tmp_path_factory.mktemp("text") / "model"
        (write_pipeline(folder, kind) if kind in PIPELINES else write_encoder(folder, stored_of(kind)))
        return folder

    return write


def encoder_of(name, path, **options):
    return build("text_encoders", {"name": name, "path": str(path), **options})


def encode(stored, *inputs, dtype="float32", **options):
    transformer = stored.transformer(dtype)
    return jax.jit(functools.partial(transformer.encode, **options))(stored.params, *inputs)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(CLIP, "float32"), (PROJECTED, "float16"), (T5, "bfloat16")], ids=["clip", "projected", "t5"]
)
def test_a_folder_is_read_as_it_was_written(kind, dtype, tmp_path):
    stored = stored_of(kind, jnp.dtype(dtype))
    for name in ("a", "b"):
        text_folder.write(str(tmp_path / name), stored)
        again = text_folder.read(str(tmp_path / name))
        assert (again.kind, again.config) == (kind, stored.config)
        jax.tree.map(np.testing.assert_array_equal, again.params, stored.params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(again.params)} == {dtype}
        stored = again
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_layouts_of_folders(folder_of, tmp_path):
    """Names without prefix, copies, tensors that are not read, entries of other versions, and shards of a variant."""
    for kind in (CLIP, T5):
        folder = shutil.copytree(folder_of(kind), tmp_path / kind)
        found = safetensors.numpy.load_file(folder / "model.safetensors")
        if kind == T5:
            found["encoder.embed_tokens.weight"] = found["shared.weight"]
        else:
            found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
            found["embeddings.position_ids"] = np.arange(16)[None]
        names = sorted(found)
        shards = {f"model.fp16-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
        for file, part in shards.items():
            safetensors.numpy.save_file({name: found[name] for name in part}, folder / file)
        where = {name: file for file, part in shards.items() for name in part}
        (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": where}))
        whole = text_folder.read(str(folder))
        (folder / "model.safetensors").unlink()
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = {"float32": "bfloat16"}[config.pop("torch_dtype")]
        (folder / "config.json").write_text(json.dumps(config))
        for variant, dtype in ((None, "bfloat16"), ("fp16", "float16")):
            planned = text_folder.read(str(folder), variant, weights=False).params
            assert {leaf.dtype.name for leaf in jax.tree.leaves(planned)} == {dtype}
        by_parts = text_folder.read(str(folder), "fp16")
        jax.tree.map(np.testing.assert_array_equal, whole.params, by_parts.params)
        assert whole.digest == by_parts.digest


def test_parameters_are_placed_one_by_one(folder_of, mesh_of):
    """On the shardings that `place` chooses; the digest does not depend on them."""
    mesh = mesh_of(1, 4, 1)

    def place(shapes):
        rows = lambda leaf: PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp" if leaf.shape[-1] % 4 == 0 else None)  # noqa: E731
        return jax.tree.map(lambda leaf: NamedSharding(mesh, rows(leaf)), shapes)

    plain, placed = encoder_of("clip", folder_of(CLIP)), encoder_of("clip", folder_of(CLIP), place=place)
    assert placed.params["layers"]["blocks"]["fc1"]["kernel"].sharding.spec[2] == "fsdp"
    jax.tree.map(np.testing.assert_array_equal, plain.params, placed.params)
    np.testing.assert_allclose(placed.null.tokens, plain.null.tokens, atol=1e-5)
    assert placed.digest == plain.digest != ""


def first(num, array):
    return array[:num]


def test_hidden_states_are_those_of_shorter_models():
    """Without the last k layers: the model with fewer layers, and the final norm or its inverse."""
    stored = stored_of(PROJECTED)
    for skip in (0, 1, 3):
        hidden, vector = encode(stored, IDS, skip=skip, pooled="eos")
        bare, none = encode(stored, IDS, skip=skip, final_norm=False)
        depth, params = 3 - skip, stored.params
        if skip < 3:
            layers = jax.tree.map(functools.partial(first, depth), params["layers"])
            shorter = Stored(PROJECTED, stored.config | {"num_hidden_layers": depth}, params | {"layers": layers})
            np.testing.assert_allclose(hidden, encode(shorter, IDS)[0], atol=1e-5)
        else:
            start = params["token_embedding"][IDS] + params["position_embedding"][:12]
            np.testing.assert_allclose(bare, start, atol=1e-6)
        centred = bare - bare.mean(axis=-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        norm = params["final_norm"]
        np.testing.assert_allclose(hidden, normed * norm["scale"] + norm["bias"], atol=1e-4)
        assert none is None
        if not skip:
            last = hidden
        np.testing.assert_allclose(vector, last[[0, 1], [3, 11]], atol=1e-6)  # of the last layer for every skip
    projected = encode(stored, IDS, pooled="projected")[1]
    np.testing.assert_allclose(projected, vector @ params["projection"]["kernel"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "options", "same"),
    [
        ("clip", CLIP, {}, {"hidden_state": 2}),
        ("clip", CLIP, {"hidden_state": 1}, {"hidden_state": 3}),
        ("joined", "sdxl", {"layout": "sdxl"}, {"clip_skip": 2}),
        ("joined", "sd3", {"layout": "sd3", "length": 8, "null": "empty"}, {"clip_skip": 2}),
    ],
)
def test_clip_skip_shortens_prompts_and_not_what_replaces_them(name, kind, options, same, folder_of):
    plain = encoder_of(name, folder_of(kind), **options)
    short = encoder_of(name, folder_of(kind), **options | same)
    skipped = pretrained_text.skipped(plain, 2)
    cond = {"text": plain.tokenize(["a cat"]), "null": {"text": plain.tokenize(["two dogs"])}}
    of_plain, of_short, of_skipped = (
        text_conditions.encoded(encoder, encoder.params, encoder.null, cond) for encoder in (plain, short, skipped)
    )
    jax.tree.map(np.testing.assert_array_equal, of_skipped["text"], of_short["text"])
    jax.tree.map(np.testing.assert_array_equal, of_skipped["null"], of_plain["null"])
    jax.tree.map(np.testing.assert_array_equal, skipped.null, plain.null)
    assert abs(of_skipped["text"].tokens - of_plain["text"].tokens).max() > 1e-3
    assert skipped.digest == plain.digest  # that of the run
    jax.tree.map(np.testing.assert_array_equal, pretrained_text.skipped(plain, 0).encode(plain.params, cond["text"]),
                 of_plain["text"])  # fmt: skip


def test_clip_skip_with_weights_of_words(folder_of):
    plain = encoder_of("clip", folder_of(CLIP))
    skipped, short = pretrained_text.skipped(plain, 1), encoder_of("clip", folder_of(CLIP), hidden_state=1)
    reading, expected, of_null = (prompt_weights.weighted(encoder, "comfyui") for encoder in (skipped, short, plain))
    tokens = reading.tokenize(["a (cat:2)"])
    np.testing.assert_array_equal(
        reading.encode(plain.params, tokens).tokens, expected.encode(plain.params, tokens).tokens
    )
    np.testing.assert_array_equal(
        reading.encode_null(plain.params, tokens).tokens, of_null.encode(plain.params, tokens).tokens
    )


def test_clip_skip_is_refused_without_layers_of_clip(folder_of):
    flux = encoder_of("joined", folder_of("flux"), layout="flux", length=8)
    small = build("text_encoders", {"name": "small", "tokenizer": "bytes"})
    for encoder in (None, encoder_of("t5", folder_of(T5)), flux, small):
        with refused("clip_skip"):
            pretrained_text.skipped(encoder, 1)
    clip = encoder_of("clip", folder_of(CLIP), hidden_state="penultimate")
    for count in (-1, 3):
        with refused("clip_skip"):
            pretrained_text.skipped(clip, count)


def test_the_end_of_a_text():
    """The largest token by the rule of old configs, or the first one of its number, also after tokens were added."""
    cases = [
        ({"eos_token_id": 2}, [512, 7, EOS, EOS], 2),
        ({"eos_token_id": 2}, [512, EOS, 0, 0], 1),
        ({"eos_token_id": 9}, [512, 9, EOS, 9], 1),
        ({"eos_token_id": 2, "vocab_size": 49410}, [49406, 49409, 49407, 49407], 2),
    ]
    for changes, ids, end in cases:
        stored = stored_of(CLIP, num_hidden_layers=1, **changes)
        hidden, vector = encode(stored, np.array([ids], np.int32), pooled="eos")
        np.testing.assert_allclose(vector, hidden[:, end], atol=1e-6)


def test_padding():
    """Padded tokens do not affect others, in CLIP because attention is causal, and in T5 with a mask."""
    stored, other = stored_of(T5), np.where(T5_MASK, T5_IDS, 11)
    masked, without = (encode(stored, ids, T5_MASK) for ids in (T5_IDS, other))
    np.testing.assert_array_equal(masked[T5_MASK], without[T5_MASK])
    seen, changed = (encode(stored, ids) for ids in (T5_IDS, other))
    assert np.abs(seen - changed)[0, :4].min() > 1e-5
    np.testing.assert_allclose(masked[1], seen[1], atol=1e-6)
    alone = encode(stored, T5_IDS[:1, :4])
    np.testing.assert_allclose(masked[:1, :4], alone, atol=1e-5)
    stored = stored_of(CLIP)
    hidden, changed = (encode(stored, ids)[0] for ids in (IDS, np.where(np.arange(12) < 6, IDS, 5)))
    np.testing.assert_allclose(hidden[:, :6], changed[:, :6], atol=1e-6)


def test_buckets_of_distances():
    """With 8 buckets up to a distance of 16: 0, 1, then 2 to 5 and from 6 on; 4 more where the key follows."""
    numbers = buckets(20, 8, 16)
    np.testing.assert_array_equal(numbers[::-1, 0][::-1], [0, 1, *[2] * 4, *[3] * 14])
    np.testing.assert_array_equal(numbers[0], [0, 5, *[6] * 4, *[7] * 14])


@pytest.mark.parametrize("kind", [T5, CLIP])
def test_bfloat16_with_outliers(kind):
    """Within 1%, though some channels are 100 times larger than the others."""
    stored = stored_of(kind)
    params = jax.tree.map(np.array, stored.params)
    blocks = params["layers"]["blocks"]
    for array in (
        params["token_embedding"],
        blocks["out"]["kernel"],
        blocks["down" if kind == T5 else "fc2"]["kernel"],
    ):
        array[..., :2] *= 100
    stored = Stored(kind, stored.config, params)
    inputs = (T5_IDS,) if kind == T5 else (IDS,)
    exact, rounded = (encode(stored, *inputs, dtype=dtype) for dtype in ("float32", "bfloat16"))
    exact, rounded = (np.asarray(out if kind == T5 else out[0]) for out in (exact, rounded))
    assert rounded.dtype == np.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 1e-2


@pytest.mark.parametrize(
    ("model", "part", "names", "millions"),
    [
        ("runwayml/stable-diffusion-v1-5", "text_encoder", "clipL", 123.06),
        ("stabilityai/stable-diffusion-2-1", "text_encoder", "clipH", 340.39),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "text_encoder", "clipLp", 123.65),
        ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder_2", "clipG", 694.66),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "text_encoder_3", "t5", 4762.3),
        ("black-forest-labs/FLUX.1-dev", "text_encoder_2", "t5", 4762.3),
    ],
)
def test_published_sizes(model, part, names, millions, caplog):
    expected = json.loads(gzip.decompress(published("names_and_shapes.json.gz").read_bytes()))[names]
    stored = text_folder.read(str(published(model, part)), weights=False)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float16(0), leaf.shape), stored.params)
    found = tensors.to_foreign(text_folder._pairs(stored.kind, stored.config), zeros)
    expected = {name.removeprefix("text_model."): tuple(shape) for name, shape in expected.items()}
    expected.pop("encoder.embed_tokens.weight", None)
    assert {name: tensor.shape for name, tensor in found.items()} == expected
    assert abs(sum(leaf.size for leaf in jax.tree.leaves(stored.params)) / 1e6 - millions) < 0.05
    assert not caplog.records


def test_options_of_one_encoder(folder_of):
    texts = ["a cat", "dogs and cats"]
    last = encoder_of("clip", folder_of(PROJECTED), pooled="eos")
    digests = {last.digest}
    tokens = pickle.loads(pickle.dumps(last.tokenize))(texts)
    assert tokens.tokens.shape == (2, 16) and last.condition.shape == (16, 8) and last.condition.pooled == 8
    run = jax.jit(last.encode)
    text = run(last.params, tokens)
    assert text.mask.all() and text.tokens.dtype == np.float32
    empty = run(last.params, last.tokenize(["", "a"]))
    np.testing.assert_allclose(last.null.tokens, empty.tokens[:1], atol=1e-5)
    for options, skip, norm, width in (
        ({"hidden_state": "penultimate", "pooled": "projected", "null": "zeros"}, 1, False, 6),
        ({"hidden_state": 2, "null": "learned", "use_mask": True}, 2, True, 0),
    ):
        encoder = encoder_of("clip", folder_of(PROJECTED), **options)
        tokens = encoder.tokenize(texts)
        text = jax.jit(encoder.encode)(encoder.params, tokens)
        stored = Stored(PROJECTED, CLIP_CONFIG, encoder.params)
        expected = encode(stored, tokens.tokens, skip=skip, final_norm=norm)[0]
        np.testing.assert_allclose(text.tokens, expected, atol=1e-5)
        assert (0 if text.pooled is None else text.pooled.shape[1]) == encoder.condition.pooled == width
        np.testing.assert_array_equal(text.mask, tokens.mask | (not options.get("use_mask")))
        digests.add(encoder.digest)
        assert encoder.null is None if options["null"] == "learned" else not np.any(encoder.null.tokens)
    assert len(digests) == 3 and encoder_of("clip", folder_of(PROJECTED), pooled="eos", null="zeros").digest in digests
    shorter = encoder_of("clip", folder_of(PROJECTED), length=5, weights=False)
    assert shorter.tokenize(texts).tokens.shape == (2, 5) and shorter.condition.shape == shorter.null.tokens.shape[1:]
    masked = encoder_of("t5", folder_of(T5), use_mask=True, length=9, dtype="float32")
    tokens = masked.tokenize(["abc", "b"])
    text = jax.jit(masked.encode)(masked.params, tokens)
    np.testing.assert_array_equal(text.mask, tokens.mask)
    stored = Stored(T5, text_folder.read(str(folder_of(T5))).config, masked.params)
    np.testing.assert_allclose(text.tokens, encode(stored, tokens.tokens, tokens.mask), atol=1e-5)


POOLED = {"sdxl": ("none", "projected"), "sd3": ("projected", "projected"), "flux": ("eos",)}


@pytest.mark.parametrize("layout", PIPELINES)
def test_joined_layouts(layout, folder_of, tmp_path):
    """Each part of the joined text is the output of one encoder, and what is left is 0."""
    more = {"sdxl": {}, "sd3": {"length": 9, "use_mask": True}, "flux": {"length": 9}}[layout]
    path, options = folder_of(layout), {"layout": layout, "dtype": "float32", **more}
    encoder = encoder_of("joined", path, **options)
    tokens = pickle.loads(pickle.dumps(encoder.tokenize))(["a cat", ""])
    text = jax.jit(encoder.encode)(encoder.params, tokens)
    assert text.tokens.shape[1:] == encoder.condition.shape and text.pooled.shape[1] == encoder.condition.pooled
    masks = [tokens[name].mask for name in ("clip", "t5")] if layout == "sd3" else [text.mask | True]
    np.testing.assert_array_equal(text.mask, np.concatenate(masks, axis=1))
    assert text.mask.shape == text.tokens.shape[:2]
    rest, rest_pooled = np.array(text.tokens), np.array(text.pooled)
    for number, (name, place) in enumerate(encoder.parts.items()):
        stored = text_folder.read(str(path / (f"text_encoder_{number + 1}" if number else "text_encoder")))
        if name == "t5":
            mask = tokens[name].mask if layout == "sd3" else None
            hidden, vector = encode(stored, tokens[name].tokens, mask), None
        else:
            state = {"skip": 1, "final_norm": False, "pooled": POOLED[layout][number]}
            hidden, vector = encode(stored, tokens[name].tokens, **state)
        if place.tokens != (0, 0):
            where = (slice(None), slice(*place.tokens), slice(*place.features))
            np.testing.assert_allclose(text.tokens[where], hidden, atol=1e-5)
            rest[where] = 0
        if place.pooled != (0, 0):
            np.testing.assert_allclose(text.pooled[:, slice(*place.pooled)], vector, atol=1e-5)
            rest_pooled[:, slice(*place.pooled)] = 0
    assert not rest.any() and not rest_pooled.any()
    empty = jax.tree.map(lambda leaf: leaf[1:], text)
    if layout == "sdxl":  # as its pipelines have it, unless they say otherwise
        assert not np.any(encoder.null.tokens) and not np.any(encoder.null.pooled) and encoder.null.mask.all()
        other = shutil.copytree(path, tmp_path / "other")
        (other / "model_index.json").write_text('{"force_zeros_for_empty_prompt": false}')
        np.testing.assert_allclose(encoder_of("joined", other, **options).null.tokens, empty.tokens, atol=1e-5)
    else:
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), encoder.null, empty)

    for folder in path.glob("text_encoder*"):  # a plan needs nothing else
        (tmp_path / folder.name).mkdir()
        shutil.copy(folder / "config.json", tmp_path / folder.name)
    plan = encoder_of("joined", tmp_path, **options, weights=False)
    assert plan.condition == encoder.condition and plan.parts == encoder.parts and plan.digest == ""
    for planned, real in ((plan.params, encoder.params), (plan.null, empty), (plan.tokenize([""] * 2), tokens)):
        assert jax.tree.structure(planned) == jax.tree.structure(real)
        jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), planned, real)


def test_stable_diffusion_3_without_t5(folder_of, tmp_path):
    """Zeros are in its place, whether it is there or not, and the transformer says how wide they are."""
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(folder_of("sd3") / name, tmp_path / name)
    options = {"layout": "sd3", "length": 9, "null": "zeros"}
    assert encoder_of("joined", tmp_path, **options, weights=False).condition.shape == (25, 4096)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text('{"joint_attention_dim": 20}')
    encoder = encoder_of("joined", tmp_path, **options)
    assert list(encoder.parts) == ["clip", "clip_2"] and encoder.params.keys() == {"clip", "clip_2"}
    text = jax.jit(encoder.encode)(encoder.params, encoder.tokenize(["a"]))
    assert text.tokens.shape[1:] == encoder.condition.shape == (25, 20) and text.mask.all()
    assert not np.any(text.tokens[:, 16:]) and np.all(text.tokens[:, :16, :16])
    without = encoder_of("joined", folder_of("sd3"), **options, without_t5=True, weights=False)
    assert without.params.keys() == {"clip", "clip_2"}


def changed(folder, tmp_path, config):
    copy = shutil.copytree(folder, tmp_path / str(len(list(tmp_path.iterdir()))))
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


def test_what_does_not_fit_is_refused(folder_of, tmp_path, caplog):
    for kind, config, field in (
        (CLIP, {"hidden_act": "relu"}, "hidden_act"), (CLIP, {"num_attention_heads": 3}, "hidden_size"),
        (CLIP, {"hidden_size": 8.5}, "hidden_size"), (T5, {"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
        (T5, {"feed_forward_proj": "relu"}, "feed_forward_proj"),
        (T5, {"feed_forward_proj": None, "is_gated_act": False, "dense_act_fn": "gelu_new"}, "feed_forward_proj"),
        (T5, {"model_type": "bert", "architectures": ["BertModel"]}, "model_type"),
        (CLIP, {"model_type": "clip", "architectures": ["CLIPModel"]}, "model_type"),
    ):  # fmt: skip
        name = "t5" if kind == T5 else "clip"
        with refused(f"text_encoders.config.json.{field}"):
            encoder_of(name, changed(folder_of(kind), tmp_path, config))
    folder = changed(folder_of(CLIP), tmp_path, {"vocab_size": 513})
    with refused("text_encoders.tensors.embeddings.token_embedding.weight"):
        encoder_of("clip", folder)
    with refused("text_encoders.tokenizer") as caught:
        encoder_of("clip", folder, weights=False)
    assert "514 ids" in str(caught.value) and "513 rows" in str(caught.value)
    encoder_of("clip", changed(folder_of(CLIP), tmp_path, {"odd": 1}), weights=False)
    assert "odd" in caplog.text
    forge = {"feed_forward_proj": None, "is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh"}
    encoder_of("t5", changed(folder_of(T5), tmp_path, forge), weights=False)
    clip, sdxl = folder_of(CLIP), folder_of("sdxl")
    for name, path, options, field in (
        ("clip", clip, {"pooled": "projected"}, "pooled"), ("clip", clip, {"hidden_state": 4}, "hidden_state"),
        ("clip", clip, {"length": 17}, "length"), ("t5", folder_of(T5), {"length": 0}, "length"),
        ("clip", clip, {"tokenizer": str(tmp_path)}, "tokenizer"), ("t5", clip, {}, "path"), ("t5", sdxl, {}, "path"),
        ("clip", sdxl, {"part": "text_encoder_3"}, "part"), ("clip", tmp_path / "no", {}, "path"),
        ("joined", sdxl, {"layout": "sd3"}, "path"), ("joined", sdxl, {"layout": "flux"}, "path"),
        ("joined", sdxl, {"layout": "sdxl", "length": 5}, "length"), ("clip", clip, {"variant": "fp16"}, "folder"),
        ("joined", sdxl, {"layout": "sdxl", "without_t5": True}, "without_t5"),
        ("joined", sdxl, {"layout": "sdxl", "variant": "fp16"}, "folder"),
    ):  # fmt: skip
        with refused(f"text_encoders.{field}") as caught:
            encoder_of(name, path, **options)
        assert "\n" not in str(caught.value)
    bare = shutil.copytree(clip, tmp_path / "bare")
    for name in ("vocab.json", "merges.txt"):
        (bare / name).unlink()
    with refused("text_encoders.path"):
        encoder_of("clip", bare)


def clip_peer(projected=False, **config):
    """Returns a model of transformers with random parameters, none of them 0."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**(CLIP_CONFIG | config))
    model = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)
    return randomised(model.eval())


def t5_peer(**config):
    import transformers

    config = transformers.T5Config(**(T5_CONFIG | config), feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return randomised(transformers.T5EncoderModel(config).eval())


def randomised(model, scale=0.3):
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def outputs_of(model, ids, mask=None):
    """Returns all hidden states of a model of transformers, with the last one after the final norm, and the vector."""
    import torch

    with torch.no_grad():
        mask = None if mask is None else torch.from_numpy(mask)
        out = model(torch.from_numpy(ids).long(), attention_mask=mask, output_hidden_states=True)
    vector = out.get("text_embeds", out.get("pooler_output"))
    return [state.numpy() for state in out.hidden_states], out.last_hidden_state.numpy(), vector


@pytest.mark.peers
@pytest.mark.parametrize(
    ("projected", "config"),
    [(False, {}), (True, {"hidden_act": "gelu"}), (True, {"eos_token_id": EOS}), (False, {"eos_token_id": 9})],
)
def test_clip_agrees_with_transformers(projected, config, tmp_path):
    model = clip_peer(projected, **config)
    model.save_pretrained(tmp_path)
    stored = text_folder.read(str(tmp_path))
    assert stored.kind == type(model).__name__
    states, last, vector = outputs_of(model, IDS)
    for skip in range(4):
        hidden, found = encode(stored, IDS, skip=skip, final_norm=False, pooled="projected" if projected else "eos")
        np.testing.assert_allclose(hidden, states[3 - skip], atol=1e-4)
        np.testing.assert_allclose(found, vector, atol=1e-4)
    np.testing.assert_allclose(encode(stored, IDS)[0], last, atol=1e-4)
    masked = outputs_of(model, IDS, np.array(IDS == 0) | (np.cumsum(IDS == EOS, 1) < 2))[1]
    np.testing.assert_allclose(encode(stored, IDS)[0][0, :4], masked[0, :4], atol=1e-4)  # padding does not matter


@pytest.mark.peers
def test_t5_agrees_with_transformers(tmp_path):
    """With and without a mask; and its buckets, for every distance up to 600, also where they end."""
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    model = t5_peer()
    model.save_pretrained(tmp_path)
    stored = text_folder.read(str(tmp_path))
    assert stored.kind == T5
    np.testing.assert_allclose(encode(stored, T5_IDS), outputs_of(model, T5_IDS)[1], atol=1e-4)
    masked, expected = encode(stored, T5_IDS, T5_MASK), outputs_of(model, T5_IDS, T5_MASK)[1]
    np.testing.assert_allclose(masked[T5_MASK], expected[T5_MASK], atol=1e-4)
    relative = torch.arange(600)[None] - torch.arange(600)[:, None]
    for num, most in ((32, 128), (32, 500), (8, 12), (16, 100)):
        theirs = T5Attention._relative_position_bucket(relative, num_buckets=num, max_distance=most).numpy()
        np.testing.assert_array_equal(buckets(600, num, most), theirs)


@pytest.mark.peers
@pytest.mark.parametrize("kind", [CLIP, PROJECTED, T5])
def test_folders_agree_with_transformers(kind, tmp_path):
    """In one file, in shards and as a variant, in both dtypes of half precision, and written by either side."""
    import torch
    import transformers

    model = t5_peer() if kind == T5 else clip_peer(kind == PROJECTED)
    ids = T5_IDS if kind == T5 else IDS
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = model.to(dtype)
        folders = {"one": {}, "shards": {"max_shard_size": "2KB"}, "variant": {"variant": "fp16"},
                   "both": {"max_shard_size": "2KB", "variant": "fp16"}}  # fmt: skip
        for name, options in folders.items():
            folder = tmp_path / str(dtype) / name
            model.save_pretrained(folder, **options)
            stored = text_folder.read(str(folder), options.get("variant"))
            assert len(list(folder.glob("*.safetensors"))) > 1 or "max_shard_size" not in options
            text_folder.write(str(folder / "ours"), stored)
            again = type(model).from_pretrained(folder / "ours", dtype=dtype)
            for key, tensor in model.state_dict().items():
                assert torch.equal(tensor, again.state_dict()[key].to(dtype)), key  # it keeps a part of T5 in float32
            assert {f"torch.{leaf.dtype}" for leaf in jax.tree.leaves(stored.params)} == {str(dtype)}
    with safetensors.safe_open(folder / "ours" / "model.safetensors", "np") as file:
        assert kind == T5 or all(name.startswith(("text_model.", "text_projection.")) for name in file.keys())  # noqa: SIM118
    found, expected = encode(stored, ids), outputs_of(again.float(), ids)[1]
    np.testing.assert_allclose(found if kind == T5 else found[0], expected, atol=1e-4)
    assert transformers.AutoConfig.from_pretrained(folder / "ours").model_type == model.config.model_type


@pytest.mark.peers
@pytest.mark.parametrize("layout", PIPELINES)
def test_joined_layouts_agree_with_diffusers(layout, folder_of):
    """What its pipelines make of prompts, from the folders of encoders and tokenizers that this project writes."""
    import diffusers
    import torch
    import transformers

    path, kinds = folder_of(layout), PIPELINES[layout]
    pipelines = {"sdxl": diffusers.StableDiffusionXLPipeline, "sd3": diffusers.StableDiffusion3Pipeline,
                 "flux": diffusers.FluxPipeline}  # fmt: skip
    parts = {"vae": None, "scheduler": None, "unet" if layout == "sdxl" else "transformer": None}
    for number, kind in enumerate(kinds):
        suffix = f"_{number + 1}" if number else ""
        parts[f"text_encoder{suffix}"] = getattr(transformers, kind).from_pretrained(path / f"text_encoder{suffix}")
        tokenizer = transformers.T5TokenizerFast if kind == T5 else transformers.CLIPTokenizer
        parts[f"tokenizer{suffix}"] = tokenizer.from_pretrained(path / f"tokenizer{suffix}")
    pipeline, prompts = pipelines[layout](**parts), ["A cat, and dogs!", "b"]
    options = {"sdxl": {}, "sd3": {"prompt_2": None, "prompt_3": None, "max_sequence_length": 9},
               "flux": {"prompt_2": None, "max_sequence_length": 9}}[layout]  # fmt: skip
    for clip_skip in (0, 1) if layout != "flux" else (0,):
        if clip_skip:
            options["clip_skip"] = clip_skip
        with torch.no_grad():
            found = pipeline.encode_prompt(prompts, device="cpu", **options)
        tokens, pooled = (found[0], found[1]) if layout == "flux" else (found[0], found[2])
        ours = encoder_of("joined", path, layout=layout, dtype="float32", null="learned", clip_skip=clip_skip,
                          **({} if layout == "sdxl" else {"length": 9}))  # fmt: skip
        text = jax.jit(ours.encode)(ours.params, ours.tokenize(prompts))
        np.testing.assert_allclose(text.tokens, tokens.numpy(), atol=1e-4)
        np.testing.assert_allclose(text.pooled, pooled.numpy(), atol=1e-4)


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("kind", [CLIP, T5])
def test_full_size_agrees_with_transformers(kind, tmp_path):
    """CLIP ViT-L and the encoder of T5 v1.1 small, with random weights."""
    import transformers

    if kind == T5:
        config = transformers.T5Config(d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu")
        model = transformers.T5EncoderModel(config).eval()
    else:
        config = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        model = transformers.CLIPTextModel(config).eval()
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 30000, (2, 256 if kind == T5 else 77)).astype(np.int32)
    found, expected = encode(text_folder.read(str(tmp_path)), ids), outputs_of(model, ids)[1]
    np.testing.assert_allclose(found if kind == T5 else found[0], expected, atol=1e-4)
