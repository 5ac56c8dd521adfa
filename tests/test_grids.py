import numpy as np
import pytest

from diffusion.build import build, find, names


@pytest.mark.parametrize("steps", [1, 7, 50, 1000, 1500])
@pytest.mark.parametrize("name", names("grids"))
def test_falls_to_zero(name, steps):
    times = find("grids", name, field="grid")(build("schedules", "vp"), steps)
    assert times.shape == (steps + 1,) and times[-1] == 0 and times[0] <= 1
    assert np.all(np.diff(times) < 0)


def test_points_of_the_table():
    """Lin et al. 2024, table 2, for T = 1000 and 10 steps: table index i is at t = (i + 1) / T."""
    schedule = build("schedules", "vp")
    expected = {
        "trailing": [999, 899, 799, 699, 599, 499, 399, 299, 199, 99],
        "leading": [900, 800, 700, 600, 500, 400, 300, 200, 100, 0],
        "linspace": [999, 888, 777, 666, 555, 444, 333, 222, 111, 0],
    }
    for name, indices in expected.items():
        times = find("grids", name, field="grid")(schedule, 10)
        np.testing.assert_allclose(times[:-1], (np.array(indices) + 1) / 1000, atol=1e-12)
