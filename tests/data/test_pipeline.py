import numpy as np
import pytest

from diffusion.build import build
from diffusion.data.pipeline import batches
from diffusion.types import Spec


class Numbers:
    """x of example i is i."""

    spec = Spec(shape=(1,))

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"x": np.float32([index]), "cond": {"label": np.int32(index)}}


def take(iterator, n):
    return [next(iterator)["x"].ravel().astype(int).tolist() for _ in range(n)]


def test_every_example_once_an_epoch_in_a_new_order():
    epochs = take(batches(Numbers(12), batch_size=12, seed=0), 3)
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_follows_from_the_seed():
    first, again, other = (take(batches(Numbers(50), batch_size=7, seed=s), 20) for s in (1, 1, 2))
    assert first == again and first != other


def test_position_is_saved_and_restored():
    iterator = batches(Numbers(20), batch_size=6, seed=3)
    take(iterator, 5)
    state, after = iterator.get_state(), take(iterator, 5)
    fresh = batches(Numbers(20), batch_size=6, seed=3)
    fresh.set_state(state)
    assert take(fresh, 5) == after


def test_processes_together_see_what_one_sees():
    one = take(batches(Numbers(20), batch_size=8, seed=4), 10)
    two = [take(batches(Numbers(20), batch_size=8, seed=4, process=p, processes=2), 10) for p in (0, 1)]
    for step in range(10):
        assert sorted(two[0][step] + two[1][step]) == sorted(one[step])


@pytest.mark.parametrize(("split", "size"), [("train", 1500), ("test", 297)])
def test_digits(split, size):
    source = build("data", {"name": "digits", "split": split})
    assert len(source) == size
    example = source[0]
    assert example["x"].shape == source.spec.shape and example["x"].dtype == np.float32
    assert source.images.min() == -1 and source.images.max() == 1
    assert set(source.labels) == set(range(source.spec.num_classes))


def test_digits_splits_do_not_meet():
    train, test = (build("data", {"name": "digits", "split": split}) for split in ("train", "test"))
    counts = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in counts for image in test.images) == 0
