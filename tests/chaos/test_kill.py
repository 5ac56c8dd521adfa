"""Trainings that are killed repeatedly at random moments end as if they had not been interrupted.

`make slow` kills one at each kind of moment; `make chaos` kills each a hundred times, for every objective, with one
process and two.
"""

import collections
import itertools
import random
import re
import shutil
import time

import numpy as np
import pytest

from tests.chaos.config import CASES, EVERY, STEPS
from tests.chaos.conftest import FULL
from tests.chaos.training import committed, outcome

SOME = [pytest.param("denoising", 1, marks=pytest.mark.slow)]
ALL = list(itertools.product(CASES, (1, 2)))
MOMENTS = ("at any time", "in a save", "in the restore", "in a step")


def kill_once(training, moment, began_at, draw):
    """Waits for a moment and kills the training.

    Returns the activity of the first process, or None if the training ended before.
    """
    if moment == "at any time":
        time.sleep(draw.uniform(0, 6))
    elif moment == "in the restore" and began_at is not None:
        training.until_doing("the restore")
        time.sleep(draw.uniform(0, 0.3))
    elif moment == "in a save":
        step = (began_at or 0) + EVERY * draw.randint(1, 2)
        training.until_doing(f"the save of step {step}")
        time.sleep(draw.uniform(0, 0.3))
    else:
        step = (began_at or 0) + draw.randint(1, 12)
        training.until_doing(f"step {step}")
        time.sleep(draw.uniform(0, 0.03))
    if not training.running():
        return None
    training.kill()
    return re.sub(r" of step \d+|(?<=step) \d+", "", training.doing())


@pytest.mark.parametrize(("case", "processes"), ALL if FULL else SOME)
def test_repeated_kills(case, processes, start, tmp_path):
    draw = random.Random(f"{case} {processes}")
    whole = start(case, tmp_path / "whole", processes)
    assert whole.wait() == [0] * processes, whole.output()
    expected = outcome(tmp_path / "whole")
    assert len(expected[1]) == STEPS and len(expected[2]) == processes * STEPS

    workdir, kills, at = tmp_path / "killed", 0, collections.Counter()
    goal = FULL or len(MOMENTS)
    while True:
        known = committed(workdir)
        training = start(case, workdir, processes, pace=0.02)
        done = None
        if kills < goal:
            done = kill_once(training, MOMENTS[kills % len(MOMENTS)], known, draw)
        if done:
            kills, at[done] = kills + 1, at[done] + 1
        else:
            assert training.wait() == [0] * processes, training.output()
        # Nothing is lost beyond the last committed step, and no checkpoint is corrupt.
        output = training.logs[0].read_text()
        began = f"resuming from step {known:,}" if known else "starting from step 0"
        assert (began in output or done) and "warning" not in output and "Traceback" not in output, output
        if "examples, " in output:
            assert began in output
        if done:
            continue
        found = outcome(workdir)
        assert found[0].keys() == expected[0].keys()
        for name, value in expected[0].items():
            np.testing.assert_array_equal(found[0][name], value, err_msg=name)
        assert found[1] == expected[1]
        assert found[2].keys() == expected[2].keys() and all(len(digests) == 1 for digests in found[2].values())
        assert found[2] == expected[2]
        if kills >= goal:
            break
        shutil.rmtree(workdir)  # it ended before enough kills
        shutil.rmtree(training.notes)
    print(f"{case}, {processes} process(es): {kills} kills in {dict(at)}")
