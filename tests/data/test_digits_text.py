"""Digits with texts instead of labels: the source, and training and sampling with them."""

import numpy as np
import pytest

import diffusion as df
from diffusion.core.build import build
from diffusion.data.sources.digits_text import WORDS, DigitsText
from tests.refusals import refused

UNET = {"name": "unet", "width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,),
        "head_dim": 8}  # fmt: skip
DIT = {"name": "dit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 4}


def test_examples(digits):
    source = build("data", "digits_text")
    for index in range(20):
        (name, text), label = *source[index]["cond"].items(), digits[index]["cond"]["label"]
        words = [WORDS[token] for token in text.tokens[text.mask]]
        assert name == "text" and words == ["digit", WORDS[label]][index % 2 :]
        np.testing.assert_array_equal(source[index]["x"], digits[index]["x"])
    assert source.spec.num_classes == 0 and source.spec.conditions["text"].vocabulary == len(WORDS)


def test_texts_are_encoded():
    text = DigitsText.encode(["digit three", "zero", ""])
    np.testing.assert_array_equal(text.tokens, [[10, 3], [0, 0], [0, 0]])
    np.testing.assert_array_equal(text.mask, [[True, True], [True, False], [False, False]])
    for wrong in ("eleven", "digit digit three"):
        with refused("text"):
            DigitsText.encode([wrong])


@pytest.mark.slow
@pytest.mark.parametrize("network", [DIT, pytest.param(UNET, marks=pytest.mark.slow)], ids=["dit", "unet"])
def test_text_is_learned_and_sampled(network, tmp_path):
    rates = {"text": 0.1, "joint": 0.1}
    df.Trainer(
        "digits_text", network, "flow_matching", optimizer={"learning_rate": 0.01, "warmup": 0}, steps=6, batch_size=16,
        cond_drop_rate=rates, workdir=str(tmp_path),
    ).fit()  # fmt: skip
    run = df.load(str(tmp_path))
    settings = {"sampler": "euler", "steps": 2, "guidance": 2.0}
    texts = run.source.encode(["three", "digit seven"])
    both = run.sample(2, cond={"text": texts}, **settings)
    assert both.shape == (2, 8, 8, 1)
    swapped = run.sample(2, cond={"text": run.source.encode(["digit seven", "digit seven"])}, **settings)
    assert abs(both - swapped)[0].max() > 1e-4
    np.testing.assert_array_equal(both[1], swapped[1])
    # Without a condition, the texts of the data in turn.
    text = run.conditions(3)["text"]
    np.testing.assert_array_equal(text.tokens, [run.source[index]["cond"]["text"].tokens for index in range(3)])
    with refused("cond"):
        run.sample(1, cond={"caption": texts})
    with refused("labels"):
        run.sample(1, labels=[3])
