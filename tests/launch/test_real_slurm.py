"""Jobs on a real Slurm of one node, which is started for them: requeued, stopped, cancelled, ended for good, and one of
them a training in two processes."""

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

from launch.jobs import Job, build_launcher, code_here, submit

pytestmark = pytest.mark.system
ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
# `cred_expire` is how long a requeued job waits before it starts again: two minutes by default, five seconds at least.
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
    raise AssertionError(f"{what}: not within {seconds} s")


@pytest.fixture(scope="module", autouse=True)
def slurm():
    """The folder of a Slurm that is up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            pytest.skip(f"not installed: {', '.join(missing)}")
        if os.geteuid() != 0:
            pytest.skip("only root can start Slurm's daemons")
        # Not pytest's folder: the path of a socket must be short.
        with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            yield from _slurm(pathlib.Path(folder), patch)


def _slurm(folder, patch):
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)  # munged trusts no folder that others write to
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
    """What Slurm knows of the jobs of a name, those of an array in its order."""
    lines = subprocess.run(["scontrol", "show", "job", "--oneliner"], capture_output=True, text=True).stdout
    fields = [dict(word.partition("=")[::2] for word in line.split()) for line in lines.splitlines()]
    return sorted((job for job in fields if job.get("JobName") == name), key=lambda job: int(job.get("ArrayTaskId", 0)))


def finished(folder, seconds=60):
    """The jobs of a launch, once all have ended."""
    name = next(folder.glob("*.sh")).stem
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    try:
        wait_for(f"the end of {name}", lambda: all(job["JobState"] in ends for job in jobs(name)), seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{jobs(name)}\n{logs(folder)}") from None
    return jobs(name)


def logs(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


# In Python's place: does what its workdir is named for, and notes down what happens.
BEHAVIOURS = ("saved", "refused", "crashes", "recovers", "told", "cancelled")
STUB = """
import os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[-1].partition("=")[2])
workdir.mkdir(parents=True, exist_ok=True)
starts = len(list(workdir.glob("start.*")))
(workdir / f"start.{starts}").write_text(os.getcwd())
def stop(*_):
    (workdir / f"told.{len(list(workdir.glob('told.*')))}").touch()
    time.sleep(1)  # saving
    sys.exit(75)
name = workdir.name
if name == "saved":
    sys.exit(0 if starts else 75)
if name == "refused":
    sys.exit(2)
if name == "crashes" or (name == "recovers" and not starts):
    sys.exit(1)
if name == "cancelled" or (name == "told" and not starts):
    signal.signal(signal.SIGTERM, stop)
    (workdir / "ready").touch()
    time.sleep(60)
    sys.exit(9)
"""


@pytest.fixture(scope="module")
def array(slurm, tmp_path_factory):
    """One launch of a job for each of BEHAVIOURS: its folder, and what has become of them."""
    checkout, folder = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("elsewhere")
    (checkout / "file").write_text("of the code")
    git = ["git", "-C", str(checkout), "-c", "user.name=name", "-c", "user.email=mail"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=first"]):
        subprocess.run([*git, *command], check=True)
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\n{STUB}")
    python.chmod(0o755)
    launcher = build_launcher(f"slurm:python={python}")
    wanted = [Job(name, ("experiments.train", f"--workdir=sweep/{name}"), f"sweep/{name}") for name in BEHAVIOURS]
    code = code_here(str(checkout))
    for name in BEHAVIOURS:  # as a sweep leaves them
        (checkout / "sweep" / name).mkdir(parents=True)
        (checkout / "sweep" / name / "launch.json").touch()
    submit(launcher.submission(wanted, code, "sweep", retries=1), launcher.tools)
    sweep = checkout / "sweep"
    name = next((sweep / "launch").glob("*.sh")).stem
    wait_for("a start", lambda: all((sweep / at / "ready").exists() for at in ("told", "cancelled")))
    number = {at: jobs(name)[BEHAVIOURS.index(at)] for at in ("told", "cancelled")}
    number = {at: f"{job['ArrayJobId']}_{job['ArrayTaskId']}" for at, job in number.items()}
    # As Slurm does before the time is up, and as people do.
    subprocess.run(["scancel", "--batch", "--signal=TERM", number["told"]], check=True)
    subprocess.run(["scancel", number["cancelled"]], check=True)
    return sweep, dict(zip(BEHAVIOURS, finished(sweep / "launch"), strict=True))


@pytest.mark.parametrize(
    ("name", "state", "code", "restarts", "told"),
    [
        ("saved", "COMPLETED", "0:0", 1, 0),
        ("refused", "FAILED", "2:0", 0, 0),
        ("crashes", "FAILED", "1:0", 1, 0),
        ("recovers", "COMPLETED", "0:0", 1, 0),
        ("told", "COMPLETED", "0:0", 1, 1),
        ("cancelled", "CANCELLED", None, 0, 1),
    ],
)
def test_a_job_ends_as_its_exit_code_says(array, name, state, code, restarts, told):
    sweep, ended = array
    job, found = ended[name], sweep / name
    assert (job["JobState"], int(job["Restarts"])) == (state, restarts), logs(sweep / "launch")
    assert code is None or job["ExitCode"] == code
    assert len(list(found.glob("start.*"))) == restarts + 1
    assert len(list(found.glob("told.*"))) == told  # a training that is told twice ends without saving


@pytest.mark.parametrize(
    ("name", "starts", "code"),
    [("saved", 2, 0), ("refused", 1, 2), ("crashes", 2, 1), ("recovers", 2, 0), ("told", 2, 0)],
)
def test_how_a_job_ended_is_told_to_its_sweep(array, name, starts, code):
    sweep, _ = array
    events = [json.loads(line) for line in (sweep / name / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["submitted"] * starts + ["ended"] and events[-1]["code"] == code


def test_jobs_run_the_code_of_the_commit(array):
    sweep, _ = array
    there = next((sweep / "launch" / "code").iterdir())
    assert os.listdir(there) == ["file"]
    assert (sweep / "saved" / "start.0").read_text() == (sweep / "saved" / "start.1").read_text() == str(there)


def test_a_training_in_two_tasks(slurm, tmp_path):
    flags = ("--config=tests/chaos/config.py:ddpm", "--config.train.steps=4", "--config.mesh.data=2")  # a device a task
    # The environment is that of pytest, and has no task see eight devices.
    setup = f"export JAX_NUM_CPU_DEVICES=1 PATH={os.path.dirname(sys.executable)}:$PATH"
    launcher = build_launcher(f"slurm:tasks_per_node=2:setup={setup}")
    job = Job("run", ("experiments.train", *flags, f"--workdir={tmp_path}/run"), f"{tmp_path}/run")
    code = dataclasses.replace(code_here(str(ROOT)), clean=True)
    submit(launcher.submission([job], code, str(tmp_path), 0), launcher.tools)
    (ended,) = finished(tmp_path / "launch")
    assert ended["ExitCode"] == "0:0", logs(tmp_path / "launch")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()
