"""Trainings that are signalled to stop, or that hang, with one process and two."""

import random
import re
import signal
import time

import numpy as np
import pytest

from diffusion.distributed.multihost import HEARTBEAT_TIMEOUT
from diffusion.training.resilience.preemption import PREEMPTED
from diffusion.training.resilience.watchdog import HUNG
from tests.chaos.config import STEPS
from tests.chaos.conftest import FULL
from tests.chaos.training import committed, outcome

PROMPT = 10  # seconds from a signal, or from the loss of another process, to the end


@pytest.mark.parametrize(
    "processes", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.chaos)]
)
def test_a_stopped_run_resumes_bit_for_bit(processes, start, tmp_path):
    draw, moments, saved = random.Random(processes), 20 if FULL else 2, []
    whole = start("denoising", tmp_path / "whole", processes)
    assert whole.wait() == [0] * processes, whole.output()
    workdir, slowest = tmp_path / "stopped", 0.0
    for moment in range(moments):
        training = start("denoising", workdir, processes, pace=0.1)
        training.until(training.done)
        one = moment % 4 == 0  # signals the first process alone, once there is a step to save that all must agree on
        if one:
            training.until_doing("step")
        time.sleep(draw.uniform(0, 2.0))
        number = signal.SIGINT if moment % 2 else signal.SIGTERM
        signalled = time.monotonic()
        for process in training.processes[:1] if one else training.processes:
            process.send_signal(number)
        codes, text = training.wait(), training.output()
        slowest = max(slowest, time.monotonic() - signalled)
        assert "Traceback" not in text and "again to resume" in text
        stopped = re.search(r"stopped after step (\d+) and saved", text)
        # Outside of training, the loss of one process may end the other before it handles the signal.
        assert PREEMPTED in codes and set(codes) <= {PREEMPTED, *((HUNG, -signal.SIGABRT) if not stopped else ())}, text
        if stopped:
            assert committed(workdir) == int(stopped[1])
            saved.append(int(stopped[1]))
    assert saved == sorted(saved) and len(saved) >= moments // 4 and slowest <= PROMPT
    print(f"{processes} process(es): {moments} signals, saved at {saved}, slowest end {slowest:.1f} s")
    training = start("denoising", workdir, processes)
    assert training.wait() == [0] * processes, training.output()
    (arrays, metrics, batches), (found, *others) = outcome(tmp_path / "whole"), outcome(workdir)
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert others == [metrics, batches] and len(metrics) == STEPS


@pytest.mark.chaos
def test_a_second_signal_ends_the_run_immediately(start, tmp_path):
    training = start("denoising", tmp_path / "run", 1, hangs=3)
    training.until_doing("the data of step 3")
    time.sleep(2)
    training.processes[0].send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert training.running()
    training.processes[0].send_signal(signal.SIGTERM)
    assert training.wait() == [128 + signal.SIGTERM]
    assert "SIGTERM: saving after this step" in training.output()


SOON = 0.05  # minutes


@pytest.mark.slow
def test_data_that_hang(start, tmp_path):
    training = start("denoising", tmp_path / "run", 1, hangs=3, flags=[f"--config.train.hang_timeout={SOON}"])
    assert training.wait() == [HUNG]
    for text in (training.output(), (tmp_path / "run/hang_stacks.txt").read_text()):
        assert re.search(r"no activity for .* since: the data of step \d", text) and "__getitem__" in text


@pytest.mark.chaos
def test_one_of_two_processes_is_suspended(start, tmp_path):
    """The other waits for it in a collective operation, which no signal ends."""
    training = start("denoising", tmp_path / "run", 2, flags=[f"--config.train.hang_timeout={SOON}"], pace=0.05)
    training.until_doing("step 9")
    suspended, other = training.processes[1], training.processes[0]
    suspended.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert other.wait(60) == HUNG, training.output()
    assert time.monotonic() - stopped < 60 * SOON + 10
    assert "no activity" in (tmp_path / "run/hang_stacks.txt").read_text()
    suspended.send_signal(signal.SIGCONT)
    assert suspended.wait(60) != 0
    again = start("denoising", tmp_path / "run", 2)
    assert again.wait() == [0, 0] and "resuming from step 6" in again.output(), again.output()


@pytest.mark.chaos
def test_one_of_two_processes_that_save_by_the_clock_is_lost(start, tmp_path):
    minutes = 0.003
    flags = [f"--config.checkpoint.minutes={minutes}", "--config.checkpoint.every=1000"]
    training = start("denoising", tmp_path / "run", 2, pace=0.1, flags=flags)
    training.until_doing("step 20")
    assert committed(tmp_path / "run")  # by the clock, at a step on which both agreed
    training.processes[1].kill()
    killed = time.monotonic()
    code, output = training.wait()[0], training.logs[0].read_text()
    if code == HUNG:  # in the middle of a step
        assert re.search(r"^error: lost another process .*$", output.strip().splitlines()[-1]), output
    else:  # waiting elsewhere, until JAX misses the heartbeats of the other
        assert code == -signal.SIGABRT and "another task died" in output, output
    assert time.monotonic() - killed < HEARTBEAT_TIMEOUT + PROMPT


@pytest.mark.chaos
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_resumes_with_another_number_of_processes(before, after, start, tmp_path):
    whole = start("denoising", tmp_path / "whole", 1)
    assert whole.wait() == [0], whole.output()
    stopped = start("denoising", tmp_path / "run", before, pace=0.1)
    stopped.until_doing("step 20")
    for process in stopped.processes:
        process.send_signal(signal.SIGTERM)
    assert stopped.wait() == [PREEMPTED] * before, stopped.output()
    assert start("denoising", tmp_path / "run", after).wait() == [0] * after
    expected, found = ([line["loss"] for line in outcome(tmp_path / name)[1]] for name in ("whole", "run"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
