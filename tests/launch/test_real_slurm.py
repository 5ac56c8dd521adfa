"""Jobs on a real Slurm with one node, which the tests start: requeued, signalled, cancelled and failed jobs, and a
training in two processes."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from launch.jobs import Job, build_launcher, current_checkout, submit

pytestmark = pytest.mark.system
ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
# A requeued job waits for `cred_expire` before it restarts: two minutes by default, at least five seconds.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=10000,batch_sched_delay=0
ReturnToService=2
KillWait=5
CompleteWait=0
MinJobAge=600
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_for(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"timed out after {seconds} s: {what}")


@pytest.fixture(scope="module", autouse=True)
def slurm():
    """Starts Slurm and returns its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            pytest.skip(f"not installed: {', '.join(missing)}")
        if os.geteuid() != 0:
            pytest.skip("only root can start Slurm's daemons")
        # Not pytest's folder, because the path of a socket must be short.
        with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            yield from _slurm(pathlib.Path(folder), patch)


def _slurm(folder, patch):
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)  # munged refuses folders that other users can write to
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, controller=free_port(), daemon=free_port(), folder=folder))
    patch.setenv("SLURM_CONF", str(config))
    munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in ("key-file", "seed-file", "log-file")]
    munge += [f"--pid-file={folder}/munge.pid", f"--socket={folder}/munge.socket", "--foreground", "--force"]
    daemons = []
    try:
        with open(folder / "daemons.log", "w") as log:
            daemons.append(subprocess.Popen(["munged", *munge], stdout=log, stderr=log))
            wait_for("munge's socket", (folder / "munge.socket").exists, 10)
            for name in ("slurmctld", "slurmd"):
                daemons.append(subprocess.Popen([name, "-D"], stdout=log, stderr=log))
        up = ["sinfo", "--noheader", "--format=%T"]
        wait_for("an idle node", lambda: "idle" in subprocess.run(up, capture_output=True, text=True).stdout, 30)
        yield folder
    except AssertionError as error:
        raise AssertionError(f"{error}\n{(folder / 'daemons.log').read_text()}") from None
    finally:
        subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], capture_output=True)
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            daemon.wait(timeout=30)


def jobs(name):
    """Returns Slurm's records of the jobs with a name. Those of an array are in its order."""
    lines = subprocess.run(["scontrol", "show", "job", "--oneliner"], capture_output=True, text=True).stdout
    fields = [dict(word.partition("=")[::2] for word in line.split()) for line in lines.splitlines()]
    return sorted((job for job in fields if job.get("JobName") == name), key=lambda job: int(job.get("ArrayTaskId", 0)))


def finished(folder, seconds=60):
    """Waits until all jobs of a launch have ended, and returns them."""
    name = next(folder.glob("*.sh")).stem
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    try:
        wait_for(f"the end of {name}", lambda: all(job["JobState"] in ends for job in jobs(name)), seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{jobs(name)}\n{logs(folder)}") from None
    return jobs(name)


def logs(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


# Replaces Python: behaves as the name of its workdir says, and records its starts and signals.
BEHAVIORS = ("saved", "refused", "crashes", "recovers", "signalled", "cancelled")
STUB = """
import os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[-1].partition("=")[2])
workdir.mkdir(parents=True, exist_ok=True)
starts = len(list(workdir.glob("start.*")))
(workdir / f"start.{starts}").write_text(os.getcwd())
def stop(*_):
    (workdir / f"signal.{len(list(workdir.glob('signal.*')))}").touch()
    time.sleep(1)  # saving
    sys.exit(75)
name = workdir.name
if name == "saved":
    sys.exit(0 if starts else 75)
if name == "refused":
    sys.exit(2)
if name == "crashes" or (name == "recovers" and not starts):
    sys.exit(1)
if name == "cancelled" or (name == "signalled" and not starts):
    signal.signal(signal.SIGTERM, stop)
    (workdir / "ready").touch()
    time.sleep(60)
    sys.exit(9)
"""


@pytest.fixture(scope="module")
def array(slurm, tmp_path_factory):
    """Launches a job for each of BEHAVIORS, and returns the folder and Slurm's records of the ended jobs."""
    checkout, folder = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("elsewhere")
    (checkout / "file").write_text("of the code")
    git = ["git", "-C", str(checkout), "-c", "user.name=name", "-c", "user.email=mail"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=first"]):
        subprocess.run([*git, *command], check=True)
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\n{STUB}")
    python.chmod(0o755)
    launcher = build_launcher(f"slurm:python={python}")
    submitted = [Job(name, ("experiments.train", f"--workdir=sweep/{name}"), f"sweep/{name}") for name in BEHAVIORS]
    code = current_checkout(str(checkout))
    for name in BEHAVIORS:  # like the folders of a sweep
        (checkout / "sweep" / name).mkdir(parents=True)
        (checkout / "sweep" / name / "launch.json").touch()
    submit(launcher.submission(submitted, code, "sweep", retries=1), launcher.tools)
    sweep = checkout / "sweep"
    name = next((sweep / "launch").glob("*.sh")).stem
    wait_for("a start", lambda: all((sweep / job / "ready").exists() for job in ("signalled", "cancelled")))
    records = {job: jobs(name)[BEHAVIORS.index(job)] for job in ("signalled", "cancelled")}
    job_ids = {job: f"{record['ArrayJobId']}_{record['ArrayTaskId']}" for job, record in records.items()}
    # The first is what Slurm does before the time limit, the second what a user does.
    subprocess.run(["scancel", "--batch", "--signal=TERM", job_ids["signalled"]], check=True)
    subprocess.run(["scancel", job_ids["cancelled"]], check=True)
    return sweep, dict(zip(BEHAVIORS, finished(sweep / "launch"), strict=True))


@pytest.mark.parametrize(
    ("name", "state", "code", "restarts", "signals"),
    [
        ("saved", "COMPLETED", "0:0", 1, 0),
        ("refused", "FAILED", "2:0", 0, 0),
        ("crashes", "FAILED", "1:0", 1, 0),
        ("recovers", "COMPLETED", "0:0", 1, 0),
        ("signalled", "COMPLETED", "0:0", 1, 1),
        ("cancelled", "CANCELLED", None, 0, 1),
    ],
)
def test_jobs_end_or_restart_by_their_exit_code(array, name, state, code, restarts, signals):
    sweep, ended = array
    job, found = ended[name], sweep / name
    assert (job["JobState"], int(job["Restarts"])) == (state, restarts), logs(sweep / "launch")
    assert code is None or job["ExitCode"] == code
    assert len(list(found.glob("start.*"))) == restarts + 1
    assert len(list(found.glob("signal.*"))) == signals  # a second signal would end a training without saving


@pytest.mark.parametrize(
    ("name", "starts", "code"),
    [("saved", 2, 0), ("refused", 1, 2), ("crashes", 2, 1), ("recovers", 2, 0), ("signalled", 2, 0)],
)
def test_events_of_a_sweep_are_recorded(array, name, starts, code):
    sweep, _ = array
    events = [json.loads(line) for line in (sweep / name / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["submitted"] * starts + ["ended"] and events[-1]["code"] == code


def test_jobs_run_the_committed_code(array):
    sweep, _ = array
    code = next((sweep / "launch" / "code").iterdir())
    assert os.listdir(code) == ["file"]
    assert (sweep / "saved" / "start.0").read_text() == (sweep / "saved" / "start.1").read_text() == str(code)


def test_training_in_two_tasks(slurm, tmp_path):
    # One device per task.
    flags = ("--config=tests/chaos/config.py:denoising", "--config.train.steps=4", "--config.mesh.data=2")
    # The tasks inherit pytest's environment, which would give each of them eight devices.
    setup = f"export JAX_NUM_CPU_DEVICES=1 PATH={os.path.dirname(sys.executable)}:$PATH"
    launcher = build_launcher(f"slurm:tasks_per_node=2:setup={setup}")
    job = Job("run", ("experiments.train", *flags, f"--workdir={tmp_path}/run"), f"{tmp_path}/run")
    code = dataclasses.replace(current_checkout(str(ROOT)), clean=True)
    submit(launcher.submission([job], code, str(tmp_path), 0), launcher.tools)
    (ended,) = finished(tmp_path / "launch")
    assert ended["ExitCode"] == "0:0", logs(tmp_path / "launch")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()
