import jax
import numpy as np
import pytest

from diffusion.build import build, names


@pytest.mark.parametrize("name", names("times"))
def test_in_range_and_uniform(name):
    schedule = build("schedules", "vp")
    t = np.asarray(build("times", name)(schedule, jax.random.key(0), 10_000))
    assert t.shape == (10_000,) and t.min() > 0 and t.max() <= 1
    np.testing.assert_allclose(np.quantile(t, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)


def test_stratified_has_one_in_each_stratum():
    schedule = build("schedules", "vp")
    t = np.asarray(build("times", "stratified")(schedule, jax.random.key(3), 64))
    np.testing.assert_allclose(np.diff(np.sort(t)), 1 / 64, atol=1e-6)
