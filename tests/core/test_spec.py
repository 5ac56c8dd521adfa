"""Descriptions of data and conditions, and how stored ones are read."""

import dataclasses
import json

import jax
import pytest

from diffusion.core.build import build_network
from diffusion.core.types import ArraySpec, ConditionSpec, InputError, Spec, Text, class_labels
from diffusion.pipelines.stored import spec_from_json
from tests.refusals import refused

TEXT = {
    **class_labels(10),
    "text": ConditionSpec("text", (4, 6), pooled=3),
    "pose": ConditionSpec("vector", (7,)),
}


@pytest.mark.parametrize("spec", [Spec(ArraySpec((8, 8, 1), low=0.0, high=16.0), TEXT, True),
                                  Spec(ArraySpec((2,), "points", low=-1.0, high=1.0))], ids=str)  # fmt: skip
def test_a_stored_spec_is_read(spec):
    assert spec_from_json(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


@pytest.mark.parametrize(("stored", "kind"), [
    ({"shape": [8, 8, 1], "num_classes": 10, "low": 0.0, "high": 16.0, "captions": False}, "image"),
    ({"shape": [8, 8, 3], "num_classes": 0, "low": -1.0, "high": 1.0, "captions": False}, "latent"),
    ({"shape": [8, 8, 4], "num_classes": 0}, "latent"),
    ({"shape": [2], "num_classes": 8, "low": -1.0, "high": 1.0, "captions": False}, "points"),
    ({"shape": [4, 8, 8, 3], "captions": True}, "video"),
])  # fmt: skip
def test_a_spec_of_an_earlier_checkpoint_is_read(stored, kind):
    x = ArraySpec(tuple(stored["shape"]), kind, stored.get("low", 0.0), stored.get("high", 255.0))
    assert spec_from_json(stored) == Spec(x, class_labels(stored.get("num_classes", 0)), stored.get("captions", False))


@pytest.mark.parametrize(("stored", "field"), [
    (3, "spec"),
    ({"shape": []}, "spec.shape"),
    ({"shape": [10**9]}, "spec.shape"),
    ({"shape": [2], "num_classes": -1}, "spec.num_classes"),
    ({"shape": [2], "classes": 1}, "spec.classes"),
    ({"x": 3}, "spec"),
    ({"x": {"shape": [2], "kind": "sound"}}, "spec.x.kind"),
    ({"x": {"shape": [2]}, "conditions": {"text": 3}}, "spec"),
    ({"x": {"shape": [2]}, "conditions": {"text": {"kind": "text", "shape": [3]}}}, "spec.conditions.text.shape"),
    ({"x": {"shape": [2]}, "conditions": {"pose": {"kind": "vector", "shape": [10**9]}}}, "spec.conditions.pose.shape"),
    ({"x": {"shape": [2]}, "conditions": {"label": {"kind": "label"}}}, "spec.conditions.label.num_classes"),
    ({"x": {"shape": [2]}, "conditions": {"keep": {"kind": "scalar"}}}, "spec.conditions"),
    ({"x": {"shape": [2]}, "conditions": {"style": {"kind": "label", "num_classes": 3}}}, "spec.conditions"),
])  # fmt: skip
def test_an_invalid_stored_spec_is_refused(stored, field):
    with refused(field):
        spec_from_json(stored)


def test_example_values_have_the_described_shapes():
    values = Spec(ArraySpec((8, 8, 1)), {**TEXT, "words": ConditionSpec("text", (5,), vocabulary=9)}).zeros(2)
    shapes = jax.tree.map(lambda leaf: leaf.shape, values)
    assert shapes == {
        "label": (2,),
        "text": Text((2, 4, 6), (2, 4), (2, 3)),
        "pose": (2, 7),
        "words": Text((2, 5), (2, 5)),
    }
    assert values["words"].tokens.dtype == "int32" and values["text"].mask.all()


def test_a_network_that_takes_no_conditions_is_refused():
    spec = Spec(ArraySpec((8, 8, 1)), {"pose": ConditionSpec("vector", (7,))})
    with refused("network.name"):
        build_network(lambda shape: shape, spec)
    assert build_network(lambda shape, conditions: conditions, spec) == {"pose": spec.conditions["pose"]}
    with pytest.raises(InputError):
        build_network("no such network", spec)
