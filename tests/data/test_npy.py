import jax
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import InputError, Source, Spec
from diffusion.data.pipeline import Batches

IMAGES = np.random.default_rng(0).integers(256, size=(4, 6, 6, 3), dtype=np.uint8)
IMAGES[0, 0, :3, 0] = 0, 255, 51
LABELS = np.array([2, 0, 1, 2])


@pytest.fixture
def saved(tmp_path):
    """`saved(x, label)`: the folder they are saved in."""

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
    assert isinstance(source, Source) and len(source) == 4
    assert source.spec == Spec(shape=(6, 6, 3), num_classes=3, low=0.0, high=255.0)
    for index, example in enumerate(source):
        assert type(example["x"]) is np.ndarray and example["x"].dtype == np.float32
        np.testing.assert_allclose((example["x"] + 1) * 127.5, IMAGES[index], atol=1e-4)
        assert example["cond"]["label"] == LABELS[index] and example["cond"]["label"].dtype == np.int32
    np.testing.assert_allclose(source[0]["x"][0, :3, 0], [-1, 1, -0.6], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_are_used_as_they_are(saved, dtype):
    latents = (5 * np.random.default_rng(1).normal(size=(3, 4, 4, 4))).astype(dtype)
    source = npy(saved(latents))
    assert source.spec == Spec(shape=(4, 4, 4), num_classes=0, low=-1.0, high=1.0)
    assert source[2]["x"].dtype == np.float32
    source[2]["x"][:] = 0  # a copy, not the file
    np.testing.assert_array_equal(source[2]["x"], latents[2].astype(np.float32))


def test_without_classes_no_label_is_read(saved):
    source = npy(saved(IMAGES))
    assert source.spec.num_classes == 0 and source[1]["cond"] == {}


def test_mirror_images_follow(saved):
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


def test_nothing_is_read_before_it_is_asked_for(saved):
    """The file is mapped: what is written to it later is what comes out."""
    path = saved(IMAGES)
    source = npy(path)
    assert type(source.images) is np.memmap and not source.images.flags.writeable
    np.load(f"{path}/x.npy", mmap_mode="r+")[3] = 255
    assert (source[3]["x"] == 1).all()


def test_in_the_pipeline(saved):
    source = npy(saved(IMAGES, LABELS), num_classes=3, flip=True)
    batch = next(Batches(source, batch_size=8, seed=0))
    assert jax.tree.map(np.shape, batch) == {"x": (8, 6, 6, 3), "cond": {"label": (8,)}}
    assert {x.tobytes() for x in batch["x"]} == {example["x"].tobytes() for example in source}
    assert sorted(batch["cond"]["label"]) == sorted([*LABELS, *LABELS])


@pytest.mark.parametrize(
    ("x", "label", "problem"),
    [
        (None, LABELS, "there is no .*/x.npy; np.save the examples"),
        (IMAGES, None, "there is no .*/label.npy; np.save the classes"),
        (IMAGES.astype(np.int64), LABELS, "x.npy holds int64; save uint8"),
        (IMAGES[..., 0], LABELS, r"x.npy has shape \(4, 6, 6\); save it as \[N, H, W, C\]"),
        (IMAGES[:0], LABELS[:0], r"x.npy has shape \(0, 6, 6, 3\)"),
        (IMAGES, LABELS.astype(np.float32), "label.npy holds float32; save integers"),
        (IMAGES, LABELS[:3], r"label.npy has shape \(3,\), but x.npy has 4 examples"),
        (IMAGES, LABELS[:, None], r"label.npy has shape \(4, 1\), but x.npy has 4 examples"),
        (IMAGES, LABELS + 1, "labels from 1 to 3; num_classes = 3 wants 0 to 2"),
        (IMAGES, LABELS - 1, "labels from -1 to 1; num_classes = 3 wants 0 to 2"),
    ],
)
def test_refusals(saved, x, label, problem):
    with pytest.raises(InputError, match=f"^data.path: .*{problem}"):
        npy(saved(x, label), num_classes=3)


def test_what_is_no_array_is_refused(saved, tmp_path):
    path = saved(IMAGES)
    whole = (tmp_path / "x.npy").read_bytes()
    np.savez(tmp_path / "two.npz", IMAGES, LABELS)
    archive = (tmp_path / "two.npz").read_bytes()
    for content, problem in ((whole[:200], "cannot be read"), (b"", "cannot be read"), (archive, "no single array")):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(InputError, match=f"^data.path: .*/x.npy .*{problem}"):
            npy(path)


def test_bad_options(saved):
    with pytest.raises(InputError, match=r"data.num_classes: must be at least 0"):
        npy(saved(IMAGES), num_classes=-1)
    with pytest.raises(InputError, match=r"data.path: is missing"):
        build("data", "npy")
