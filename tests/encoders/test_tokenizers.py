"""Tokenizers against those of transformers, and the ones that are fitted to captions against closed forms."""

import json
import pickle
import random
import re
import shutil

import numpy as np
import pytest

from diffusion.encoders import tokenizers
from tests.published import published
from tests.refusals import refused

CAPTIONS = ["a large red circle at the top left", "a small blue square", "two green triangles", "Ünï 日本 😀"]
CLIP_FOLDERS = {
    "eos": "runwayml/stable-diffusion-v1-5/tokenizer",
    "exclamation mark": "stabilityai/stable-diffusion-2-1/tokenizer",
    "added_tokens_decoder": "stabilityai/stable-diffusion-3-medium-diffusers/tokenizer_2",
}
T5_FOLDER = "stabilityai/stable-diffusion-3-medium-diffusers/tokenizer_3"


def copied(folder, config, vocabulary, *files):
    """Returns a folder with the vocabulary and the configs of published models."""
    folder.mkdir()
    for file in files:
        shutil.copy(published("vocabularies", vocabulary, file), folder)
    for file in published(*config.split("/")).glob("*.json"):
        shutil.copy(file, folder)
    return folder


def tiny_clip(folder, **config):
    """Writes a CLIP tokenizer of letters and two merges, in the layout of transformers 4."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["!", "."]
    merges = ["c a", "ca t</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: token for token, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **config}))
    return folder


def strings(num, seed=0):
    """Returns varied texts: English, many scripts, control characters, special tokens, empty and long ones."""
    rng = random.Random(seed)
    pieces = ["a cat", "  two  spaces", "tab\tx", "new\nline", "!", "a!b", "caf\u00e9", "e\u0301", "\ufb01", "\u00bd",
              "\u65e5\u672c\u8a9e", "\U0001f600", "\U0001f469\u200d\U0001f467", "\u00a0x", "\u200b", "\x00", "\x1f",
              "\x7f", "\u2028", "\ufeff", "x\u2581y", "12345", "don't", "I'LL", "\u0391\u03a3", "\u0130", "\u00df",
              "photo, 8k (detailed:1.2)", "<|endoftext|>", "<|STARTOFTEXT|>", "</s>", "<extra_id_0>",
              "A" * 60]  # fmt: skip
    found = ["", " ", "a " * 300]
    while len(found) < num:
        parts = []
        for _ in range(rng.randrange(1, 10)):
            letter = chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD7FF), rng.randrange(0x10000, 0x1FAFF))))
            parts.append(rng.choice((rng.choice(pieces), letter, "the ", " ")))
        found.append("".join(parts))
    return found


@pytest.mark.peers
@pytest.mark.parametrize("layout", [4, 5])
@pytest.mark.parametrize("config", CLIP_FOLDERS.values(), ids=CLIP_FOLDERS)
def test_clip_tokens_are_those_of_transformers(config, layout, tmp_path):
    from transformers import CLIPTokenizer

    folder = copied(tmp_path / "theirs", config, "clip", "vocab.json", "merges.txt")
    theirs = CLIPTokenizer.from_pretrained(folder)
    if layout == 5:
        folder = tmp_path / "saved"
        theirs.save_pretrained(folder)
        assert not (folder / "vocab.json").exists()
    ours = tokenizers.read(str(folder))
    texts = strings(2000)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=77, return_tensors="np")
    text = ours(texts)
    np.testing.assert_array_equal(text.tokens, expected.input_ids)
    np.testing.assert_array_equal(text.mask, expected.attention_mask)
    assert (ours.vocabulary, ours.length, ours.pad, ours.eos) == (49408, 77, theirs.pad_token_id, 49407)

    for number, absent in enumerate(((), ("tokenizer.json",), ("vocab.json", "merges.txt"))):
        folder = tmp_path / f"ours {number}"
        tokenizers.write(ours, str(folder))
        for name in absent:
            (folder / name).unlink()
        assert tokenizers.read(str(folder)) == ours
        again = CLIPTokenizer.from_pretrained(folder)
        assert again(texts, truncation=True).input_ids == theirs(texts, truncation=True).input_ids
        assert (again.pad_token_id, again.model_max_length) == (theirs.pad_token_id, 77)


@pytest.mark.peers
def test_t5_tokens_are_those_of_transformers(tmp_path):
    from transformers import T5TokenizerFast

    folder = copied(tmp_path / "theirs", T5_FOLDER, "t5", "tokenizer.json", "spiece.model")
    theirs, ours = T5TokenizerFast.from_pretrained(folder), tokenizers.read(str(folder), length=32)
    texts = strings(2000)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=32, return_tensors="np")
    text = ours(texts)
    np.testing.assert_array_equal(text.tokens, expected.input_ids)
    np.testing.assert_array_equal(text.mask, expected.attention_mask)
    assert (ours.vocabulary, ours.pad, ours.eos, ours.bos) == (32100, 0, 1, None)
    assert tokenizers.read(str(folder)).length == 512

    tokenizers.write(ours, str(tmp_path / "ours"))
    assert tokenizers.read(str(tmp_path / "ours")) == ours
    again = T5TokenizerFast.from_pretrained(tmp_path / "ours")
    assert again(texts).input_ids == theirs(texts).input_ids

    # SentencePiece itself differs in special tokens, and where two segmentations of a text are equally likely.
    texts = [text for text in texts if not any(part in text for part in ("</s>", "<extra_id_0>", "AAAA"))]
    (folder / "tokenizer.json").unlink()
    alone = tokenizers.read(str(folder), length=32)
    np.testing.assert_array_equal(alone(texts).tokens, ours(texts).tokens)
    assert (alone.kind, alone.vocabulary) == ("sentencepiece", 32000)
    tokenizers.write(alone, str(tmp_path / "alone"))
    assert tokenizers.read(str(tmp_path / "alone"), length=32) == alone
    assert T5TokenizerFast.from_pretrained(tmp_path / "alone")(texts).input_ids == theirs(texts).input_ids


def test_a_clip_tokenizer_merges_pads_and_truncates(tmp_path, caplog):
    tokenizer = tokenizers.read(str(tiny_clip(tmp_path / "clip")), length=6)
    vocab = json.loads((tmp_path / "clip" / "vocab.json").read_text())
    bos, eos, cat, a = (vocab[word] for word in ("<|startoftext|>", "<|endoftext|>", "cat</w>", "a</w>"))
    text = tokenizer(["A  CAT", "", "a a a cat a cat"])
    expected = [[bos, a, cat, eos, eos, eos], [bos, eos, eos, eos, eos, eos], [bos, a, a, a, cat, eos]]
    np.testing.assert_array_equal(text.tokens, expected)
    assert text.mask.sum(axis=1).tolist() == [4, 2, 6] and text.mask[0, 3] and not text.mask[0, 4]
    assert (text.tokens.dtype, text.mask.dtype) == (np.int32, bool)
    tokenizer(["a a a cat a cat", "a a a cat a !"])
    assert [record.getMessage() for record in caplog.records] == [
        "a text has more than 6 tokens and loses its end: 'a cat'",
        "a text has more than 6 tokens and loses its end: 'a !'",
    ]
    assert tokenizers.read(str(tmp_path / "clip")).length == 77
    assert tokenizers.read(str(tiny_clip(tmp_path / "clip", model_max_length=9))).length == 9
    assert tokenizers.read(str(tiny_clip(tmp_path / "clip", model_max_length=int(1e30)))).length == 77


def test_warnings_about_truncation_end(caplog):
    tokenizer = tokenizers.fit((), "bytes", length=2)
    tokenizer([str(number) for number in range(100)])
    assert len(caplog.records) == 20 and caplog.records[-1].getMessage().endswith("no more texts are reported")


def test_a_special_padding_token_is_read_from_the_map_first(tmp_path):
    folder = tiny_clip(tmp_path / "clip", pad_token="<|endoftext|>")
    without = tokenizers.read(str(folder))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    tokenizer = tokenizers.read(str(folder))
    pad = json.loads((folder / "vocab.json").read_text())["!"]
    assert tokenizer.pad == pad and tokenizer.encode("cat!")[-2] == pad
    assert without.pad == without.eos and without.encode("cat!")[-2] != pad
    assert tokenizer.digest != without.digest


def test_both_layouts_of_a_clip_tokenizer_are_the_same_tokenizer(tmp_path):
    folder = tiny_clip(tmp_path / "clip", model_max_length=9)
    (folder / "added_tokens.json").write_text(json.dumps({"<my-cat>": 60, "<my-dog>": 61}))
    tokenizer = tokenizers.read(str(folder))
    assert (tokenizer.vocabulary, tokenizer.encode("a <my-dog>")[2]) == (62, 61)
    tokenizers.write(tokenizer, str(tmp_path / "both"))
    assert tokenizers.read(str(tmp_path / "both")) == tokenizer
    (tmp_path / "both" / "tokenizer.json").unlink()
    assert tokenizers.read(str(tmp_path / "both")) == tokenizer
    tokenizers.write(tokenizer, str(tmp_path / "both"))
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / "both" / name).unlink()
    assert tokenizers.read(str(tmp_path / "both"), length=9) == tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "must contain tokenizer.json, or vocab.json and merges.txt"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "vocab.json").write_text("{}"), "is invalid|lacks"),
        (lambda folder: (folder / "merges.txt").write_text("c a\nx"), "is invalid"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}'),
            "has a BertTokenizer tokenizer; must be a CLIP or T5 tokenizer",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text('{"added_tokens": []}'), "lacks 'model'"),
        (shutil.rmtree, "must contain tokenizer.json, or vocab.json and merges.txt, or spiece.model"),
    ],
    ids=["no merges", "no JSON", "empty", "bad merges", "class", "content", "absent"],
)
def test_an_unusable_folder_is_refused(change, message, tmp_path):
    folder = tiny_clip(tmp_path / "clip")
    change(folder)
    with refused("path") as caught:
        tokenizers.read(str(folder))
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_fitted_tokenizer_loses_nothing_and_can_be_stored(kind):
    tokenizer = tokenizers.fit(CAPTIONS, kind, vocab_size=300, length=64)
    texts = [*CAPTIONS, "", "unseen: ￿ <eos> <pad>\x00\n"]
    text = tokenizer(texts)
    for row, mask, expected in zip(text.tokens, text.mask, texts, strict=True):
        assert tokenizer.decode(row) == expected
        ids = row[mask]
        assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos) and (row[~mask] == tokenizer.pad).all()
    assert text.tokens.max() < tokenizer.vocabulary == (259 if kind == "bytes" else 300)
    for again in (
        tokenizers.fit(reversed(CAPTIONS), kind, vocab_size=300, length=64),
        tokenizers.from_text(tokenizer.to_text()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again == tokenizer and again.digest == tokenizer.digest
        np.testing.assert_array_equal(again(texts).tokens, text.tokens)
    if kind == "bpe":
        assert "_backend" in vars(tokenizer) and "_backend" not in vars(pickle.loads(pickle.dumps(tokenizer)))
        assert len(tokenizer.encode(CAPTIONS[0])) < len(CAPTIONS[0]) / 2
        lower = tokenizers.fit(CAPTIONS, kind, vocab_size=300, lowercase=True)
        assert lower.encode("A Red") == lower.encode("a red") != tokenizer.encode("A Red")


def test_bytes_are_those_of_utf8():
    tokenizer = tokenizers.fit((), "bytes", length=8)
    np.testing.assert_array_equal(tokenizer(["aé"]).tokens, [[1, 100, 198, 172, 2, 0, 0, 0]])
    np.testing.assert_array_equal(tokenizer(["\ud800"]).tokens, [[1, 66, 2, 0, 0, 0, 0, 0]])


def test_options_out_of_range_are_refused(tmp_path):
    with refused("vocab_size"):
        tokenizers.fit(CAPTIONS, "bpe", vocab_size=258)
    with refused("captions"):
        tokenizers.fit([], "bpe")
    with refused("length"):
        tokenizers.fit(CAPTIONS, "bytes", length=1)
    with refused("tokenizer"):
        tokenizers.write(tokenizers.fit([], "bytes"), str(tmp_path))
