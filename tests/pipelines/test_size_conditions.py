"""Conditions on the size of images: what sampling fills in, and what is given instead."""

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from diffusion.core.types import ArraySpec, ConditionSpec, Spec
from diffusion.data import size_conditions
from diffusion.pipelines.conditions import conditions_of
from experiments import condition_flags
from tests.pipelines.test_sizes import run_of
from tests.refusals import refused

SDXL = {"time_ids": ConditionSpec("vector", (6,))}
REFINER = {"time_ids": ConditionSpec("vector", (5,))}
PIXART = {"resolution": ConditionSpec("vector", (2,)), "aspect_ratio": ConditionSpec("scalar")}


def conditions(specs, cond=None, kind="image", source=pytest.fail):
    return conditions_of(Spec(ArraySpec((64, 96, 3), kind), specs), 3, source, cond=cond)


def test_samples_are_whole_images_by_default():
    """Height comes before width everywhere."""
    np.testing.assert_array_equal(conditions(SDXL)["time_ids"], [[64, 96, 0, 0, 64, 96]] * 3)
    refiner = conditions(REFINER)
    np.testing.assert_array_equal(refiner["time_ids"], [[64, 96, 0, 0, 6]] * 3)
    np.testing.assert_array_equal(refiner["null"]["time_ids"], [[64, 96, 0, 0, 2.5]] * 3)
    pixart = conditions(PIXART)
    np.testing.assert_array_equal(pixart["resolution"], [[64, 96]] * 3)
    np.testing.assert_allclose(pixart["aspect_ratio"], [2 / 3] * 3)
    assert "null" not in pixart and pixart["aspect_ratio"].dtype == np.float32


def test_given_values_replace_them():
    ids = size_conditions.time_ids((10, 20), (1, 2), (30, 40))[None]
    assert ids.tolist() == [[10, 20, 1, 2, 30, 40]] and ids.dtype == np.float32
    np.testing.assert_array_equal(conditions(SDXL, {"time_ids": ids})["time_ids"], np.repeat(ids, 3, 0))
    found = conditions(SDXL, {"time_ids": ids, "null": {"time_ids": 0 * ids}})
    np.testing.assert_array_equal(found["null"]["time_ids"], np.zeros((3, 6)))
    ids = size_conditions.refiner_time_ids((10, 20), (1, 2), 9.0)[None]
    assert "null" not in conditions(REFINER, {"time_ids": ids})  # the other half is no longer known
    given = size_conditions.of_samples({**REFINER, **PIXART}, (64, 96), (32, 48), (1, 2))
    assert given["time_ids"].tolist() == [[32, 48, 1, 2, 6]] and given["resolution"].tolist() == [[32, 48]]
    with refused("cond"):
        conditions(SDXL, {"null": {"ids": ids}})


def test_other_conditions_and_latents_take_those_of_the_data():
    """The size of images is not known of latents without their autoencoder, nor is what a vector of 7 numbers means."""
    read = []

    class Data:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            read.append(index)
            return {"x": None, "cond": {"time_ids": np.ones(6, np.float32)}}

    found = conditions(SDXL, kind="latent", source=Data)
    np.testing.assert_array_equal(found["time_ids"], np.ones((3, 6)))
    conditions({"time_ids": ConditionSpec("vector", (7,))}, source=Data)
    assert read == [0, 0]


def test_the_unconditional_half_has_its_own_score():
    """By default as with explicit values, and unlike with those of the other half."""
    network = {"name": "unet_text", "width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "depth": (0, 0),
               "middle_depth": 0, "num_heads": 2, "number_features": 8}  # fmt: skip
    run = run_of((8, 8, 1), network, conditions=REFINER)
    run.config["train"]["cond_drop_rate"] = 0.1
    ids = [size_conditions.refiner_time_ids((8, 8), (0, 0), score)[None] for score in (6.0, 2.5)]
    x = run.sample(2, guidance=3.0)
    explicit, same = ({"time_ids": ids[0], "null": {"time_ids": null}} for null in (ids[1], ids[0]))
    np.testing.assert_array_equal(x, run.sample(2, guidance=3.0, cond=explicit))
    assert abs(x - run.sample(2, guidance=3.0, cond=same)).max() > 1e-4


def test_flags_say_what_the_samples_were_cut_from():
    flags.FLAGS.mark_as_parsed()
    run = run_of((8, 8, 1), conditions={**SDXL, **PIXART})
    with flagsaver.as_parsed((condition_flags.ORIGINAL_SIZE, "16,32"), (condition_flags.CROP, "1,2")):
        cond = condition_flags.conditions(run, 2, None)
    np.testing.assert_array_equal(cond["time_ids"], [[16, 32, 1, 2, 8, 8]] * 2)
    np.testing.assert_array_equal(cond["resolution"], [[16, 32]] * 2)
