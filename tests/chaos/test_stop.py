"""Trainings that are told to stop, or get stuck, with one process and two."""

import random
import re
import signal
import time

import numpy as np
import pytest

from diffusion.distributed.multihost import HEARTBEAT
from diffusion.training.resilience.preemption import STOPPED
from diffusion.training.resilience.watchdog import STUCK
from tests.chaos.config import STEPS
from tests.chaos.conftest import FULL
from tests.chaos.training import committed, outcome

PROMPT = 10  # seconds from a signal, or from the loss of another process, to the end


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.chaos)])
def test_told_to_stop_it_saves_and_goes_on_as_if_never_stopped(processes, start, tmp_path):
    draw, moments, saved = random.Random(processes), 20 if FULL else 2, []
    whole = start("ddpm", tmp_path / "whole", processes)
    assert whole.wait() == [0] * processes, whole.told()
    workdir, slowest = tmp_path / "stopped", 0.0
    for moment in range(moments):
        training = start("ddpm", workdir, processes, pace=0.1)
        training.until(training.done)
        one = moment % 4 == 0  # is told alone, once there is something to save that others must be told of
        if one:
            training.until_doing("step")
        time.sleep(draw.uniform(0, 2.0))
        number = signal.SIGINT if moment % 2 else signal.SIGTERM
        told = time.monotonic()
        for process in training.processes[:1] if one else training.processes:
            process.send_signal(number)
        codes, text = training.wait(), training.told()
        slowest = max(slowest, time.monotonic() - told)
        assert "Traceback" not in text and "start it again" in text
        stopped = re.search(r"stopped at step (\d+), and saved", text)
        # Outside of training one may be ended by the loss of the other before it sees the signal.
        assert STOPPED in codes and set(codes) <= {STOPPED, *((STUCK, -signal.SIGABRT) if not stopped else ())}, text
        if stopped:
            assert committed(workdir) == int(stopped[1])
            saved.append(int(stopped[1]))
    assert saved == sorted(saved) and len(saved) >= moments // 4 and slowest <= PROMPT
    print(f"{processes} process(es): {moments} signals, saved at {saved}, slowest end {slowest:.1f} s")
    training = start("ddpm", workdir, processes)
    assert training.wait() == [0] * processes, training.told()
    (arrays, metrics, batches), (found, *others) = outcome(tmp_path / "whole"), outcome(workdir)
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert others == [metrics, batches] and len(metrics) == STEPS


@pytest.mark.chaos
def test_told_twice_it_ends_at_once(start, tmp_path):
    training = start("ddpm", tmp_path / "run", 1, hangs=3)
    training.until_doing("the data of step 3")
    time.sleep(2)
    training.processes[0].send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert training.running()
    training.processes[0].send_signal(signal.SIGTERM)
    assert training.wait() == [128 + signal.SIGTERM]
    assert "SIGTERM: saving after this step" in training.told()


SOON = 0.05  # minutes


def test_data_that_do_not_come(start, tmp_path):
    training = start("ddpm", tmp_path / "run", 1, hangs=3, flags=[f"--config.train.hang_timeout={SOON}"])
    assert training.wait() == [STUCK]
    for text in (training.told(), (tmp_path / "run/stuck.txt").read_text()):
        assert re.search(r"no sign of life for .* since: the data of step \d", text) and "__getitem__" in text


@pytest.mark.chaos
def test_of_two_processes_one_stands_still(start, tmp_path):
    """The other waits for it in a collective operation, which no signal ends."""
    training = start("ddpm", tmp_path / "run", 2, flags=[f"--config.train.hang_timeout={SOON}"], pace=0.05)
    training.until_doing("step 9")
    still, other = training.processes[1], training.processes[0]
    still.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert other.wait(60) == STUCK, training.told()
    assert time.monotonic() - stopped < 60 * SOON + 10
    assert "no sign of life" in (tmp_path / "run/stuck.txt").read_text()
    still.send_signal(signal.SIGCONT)
    assert still.wait(60) != 0
    again = start("ddpm", tmp_path / "run", 2)
    assert again.wait() == [0, 0] and "going on from step 6" in again.told()


@pytest.mark.chaos
def test_of_two_processes_that_save_by_the_clock_one_is_lost(start, tmp_path):
    minutes = 0.003
    flags = [f"--config.checkpoint.minutes={minutes}", "--config.checkpoint.every=1000"]
    training = start("ddpm", tmp_path / "run", 2, pace=0.1, flags=flags)
    training.until_doing("step 20")
    assert committed(tmp_path / "run")  # by the clock, at a step that both agreed on
    training.processes[1].kill()
    killed = time.monotonic()
    code, told = training.wait()[0], training.logs[0].read_text()
    if code == STUCK:  # in the middle of a step
        assert re.search(r"error: lost another process \(.*\); start all of them again$", told.strip()), told
    else:  # waiting elsewhere, until JAX misses the other's heartbeats
        assert code == -signal.SIGABRT and "another task died" in told, told
    assert time.monotonic() - killed < HEARTBEAT + PROMPT


@pytest.mark.chaos
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_goes_on_with_another_number_of_processes(before, after, start, tmp_path):
    whole = start("ddpm", tmp_path / "whole", 1)
    assert whole.wait() == [0], whole.told()
    stopped = start("ddpm", tmp_path / "run", before, pace=0.1)
    stopped.until_doing("step 20")
    for process in stopped.processes:
        process.send_signal(signal.SIGTERM)
    assert stopped.wait() == [STOPPED] * before, stopped.told()
    assert start("ddpm", tmp_path / "run", after).wait() == [0] * after
    expected, found = ([line["loss"] for line in outcome(tmp_path / name)[1]] for name in ("whole", "run"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
