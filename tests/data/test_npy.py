"""Arrays in a folder: images and latents, labels, and files that cannot be used."""

import jax
import numpy as np
import pytest

from diffusion.core.arrays import scaled
from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Spec, class_labels
from diffusion.data.pipeline import Batches
from tests.refusals import refused

IMAGES = np.random.default_rng(0).integers(256, size=(4, 6, 6, 3), dtype=np.uint8)
IMAGES[0, 0, :3, 0] = 0, 255, 51
LABELS = np.array([2, 0, 1, 2])


@pytest.fixture
def saved(tmp_path):
    """Returns `saved(x, label)`, which saves arrays in a folder and returns its path."""

    def save(x=None, label=None):
        for name, array in (("x.npy", x), ("label.npy", label)):
            if array is not None:
                np.save(tmp_path / name, array)
        return str(tmp_path)

    return save


def npy(path, **keywords):
    return build("data", {"name": "npy", "path": path, **keywords})


def test_images(saved):
    source = npy(saved(IMAGES, LABELS), num_classes=3)
    assert len(source) == 4
    assert source.spec == Spec(ArraySpec((6, 6, 3), low=0.0, high=255.0), class_labels(3))
    for index, example in enumerate(source):
        assert type(example["x"]) is np.ndarray and example["x"].dtype == source.spec.x.dtype == "uint8"
        np.testing.assert_array_equal(example["x"], IMAGES[index])
        assert example["cond"]["label"] == LABELS[index] and example["cond"]["label"].dtype == np.int32
    np.testing.assert_allclose(scaled(source[0]["x"])[0, :3, 0], [-1, 1, -0.6], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floating_point_numbers_are_used_unchanged(saved, dtype):
    latents = (5 * np.random.default_rng(1).normal(size=(3, 4, 4, 4))).astype(dtype)
    source = npy(saved(latents))
    assert source.spec == Spec(ArraySpec((4, 4, 4), "latent", low=-1.0, high=1.0))
    assert source[2]["x"].dtype == np.float32
    source[2]["x"][:] = 0  # the example is a copy, so the file does not change
    np.testing.assert_array_equal(source[2]["x"], latents[2].astype(np.float32))


def test_labels_are_not_read_without_classes(saved):
    source = npy(saved(IMAGES))
    assert source.spec.num_classes == 0 and source[1]["cond"] == {}


def test_mirror_images_are_appended(saved):
    path = saved(IMAGES, LABELS)
    plain, flipped = npy(path, num_classes=3), npy(path, num_classes=3, flip=True)
    assert len(flipped) == 8 and flipped.spec == plain.spec
    for index in range(4):
        np.testing.assert_array_equal(flipped[index]["x"], plain[index]["x"])
        np.testing.assert_array_equal(flipped[index + 4]["x"], plain[index]["x"][:, ::-1])
        assert flipped[index + 4]["cond"] == flipped[index]["cond"]
    for source, index in ((plain, 4), (plain, -1), (flipped, 8)):
        with pytest.raises(IndexError):
            source[index]


def test_the_file_is_memory_mapped(saved):
    """Checks that values written to the file later appear in the examples."""
    path = saved(IMAGES)
    source = npy(path)
    assert type(source.images) is np.memmap and not source.images.flags.writeable
    np.load(f"{path}/x.npy", mmap_mode="r+")[3] = 255
    assert (source[3]["x"] == 255).all()


def test_the_pipeline_accepts_it(saved):
    source = npy(saved(IMAGES, LABELS), num_classes=3, flip=True)
    batch = next(Batches(source, batch_size=8, seed=0))
    assert jax.tree.map(np.shape, batch) == {"x": (8, 6, 6, 3), "cond": {"label": (8,)}}
    assert {x.tobytes() for x in batch["x"]} == {example["x"].tobytes() for example in source}
    assert sorted(batch["cond"]["label"]) == sorted([*LABELS, *LABELS])


@pytest.mark.parametrize(
    ("x", "label", "file"),
    [
        (None, LABELS, "x.npy"),
        (IMAGES, None, "label.npy"),
        (IMAGES.astype(np.int64), LABELS, "x.npy"),
        (IMAGES[..., 0], LABELS, "x.npy"),
        (IMAGES[:0], LABELS[:0], "x.npy"),
        (IMAGES, LABELS.astype(np.float32), "label.npy"),
        (IMAGES, LABELS[:3], "label.npy"),
        (IMAGES, LABELS[:, None], "label.npy"),
        (IMAGES, LABELS + 1, "label.npy"),
        (IMAGES, LABELS - 1, "label.npy"),
    ],
)
def test_bad_arrays(saved, x, label, file):
    path = saved(x, label)
    with refused("data.path") as caught:
        npy(path, num_classes=3)
    assert f"{path}/{file}" in caught.value.problem


def test_files_that_hold_no_array(saved, tmp_path):
    path = saved(IMAGES)
    whole = (tmp_path / "x.npy").read_bytes()
    np.savez(tmp_path / "two.npz", IMAGES, LABELS)
    for content in (whole[:200], b"", (tmp_path / "two.npz").read_bytes()):
        (tmp_path / "x.npy").write_bytes(content)
        with refused("data.path") as caught:
            npy(path)
        assert f"{path}/x.npy" in caught.value.problem


def test_bad_options(saved):
    with refused("data.num_classes"):
        npy(saved(IMAGES), num_classes=-1)
    with refused("data.path"):
        build("data", "npy")
