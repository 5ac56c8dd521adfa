"""What launchers share: names, checkouts, submissions, and the loop that restarts a job until it is done."""

import re
import signal
import subprocess
import time

import pytest

from diffusion.core.types import InputError
from launch import jobs
from launch.jobs import (
    Checkout,
    Job,
    JobSubmission,
    build_launcher,
    check_name,
    current_checkout,
    current_code,
    dns_label,
    quote,
    retry_loop,
    submit,
)
from tests.launch.fakes import (
    AWKWARD,
    EXITS,
    WAITS,
    calls,
    make_checkout,
    make_program,
    parses,
    set_exit_codes,
)
from tests.refusals import refused

# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "lr=0.001,seed=1", "_x", "A+b-c.d", "a" * 120, "=", "0"])
def test_valid_names(name):
    assert check_name(name, "--name") == name


@pytest.mark.parametrize("name", [
    "", ".", "..", "../up", "a/b", "/a", ".hidden", "-flag", "a b", "a\nb", "a\n", "a\0", "$(x)", "`x`", "a'b", 'a"b',
    "a\\b", "a:b", "a" * 121, "é", "a*", "launch",
])  # fmt: skip
def test_invalid_names_are_refused(name):
    with refused("--name"):
        check_name(name, "--name")


@pytest.mark.parametrize("name", ["lr=0.001", "LR=0.001", "0", "---", "", "é", "a" * 120, "a-" * 60, "x."])
def test_labels_are_valid_in_dns(name):
    for longest in (20, 40):
        label = dns_label(name, name, longest)
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", label) and len(label) <= longest and "--" not in label


def test_labels_of_different_names_differ():
    names = ["a=1", "a_1", "a.1", "A=1", "a" * 119, "a" * 120]
    assert len({dns_label(name, name) for name in names}) == len(names)
    assert dns_label("a", "runs/x/a") != dns_label("a", "runs/y/a") and dns_label("a", "b") == dns_label("a", "b")


# Checkouts ------------------------------------------------------------------------------------------------------------


def test_current_checkout(tmp_path):
    folder = make_checkout(tmp_path)
    code = current_checkout(str(folder / "experiments"))
    head = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert code == Checkout(str(folder), head, clean=True) and len(head) == 40
    (folder / "runs").mkdir()
    (folder / "runs" / "ignored").touch()
    assert current_checkout(str(folder)).clean
    (folder / "new").touch()
    assert not current_checkout(str(folder)).clean


def test_jobs_run_in_a_folder_without_a_checkout_on_slurm_alone(tmp_path, monkeypatch):
    """There the installed project runs, since the nodes share the file system."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    code = current_code(str(tmp_path))
    assert code == Checkout(str(tmp_path), "", clean=False)
    job = Job("a", ("experiments.train", "--workdir=runs/a"), "runs/a")
    submission = build_launcher("slurm").submission([job], code, "runs", 0)
    assert [command[0] for command in submission.commands] == ["sbatch"]
    (script,) = submission.files.values()
    assert f"\ncd {tmp_path} || exit 2\n" in script and f"--workdir={tmp_path}/runs/a" in script
    remote = Job("a", ("experiments.train", "--workdir=gs://b/a"), "gs://b/a")
    with refused(str(tmp_path)):
        build_launcher("gke:image=r/i:v1:gpu=g").submission([remote], code, "gs://b", 0)


def test_folder_without_a_commit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with refused("git"):
        current_checkout(str(tmp_path))
    subprocess.run(["git", "-C", tmp_path, "init", "--quiet"], check=True)
    with refused("git"):
        current_checkout(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # git is not installed
    with refused("git"):
        current_checkout(str(tmp_path))


CLUSTERS = ["slurm", "tpu_vm:type=v4-8:zone=z:runtime=r", "gke:image=i:gpu=g",
            "mig:machine=m:zone=z:image_family=f:bucket=gs://b"]  # fmt: skip


@pytest.mark.parametrize("text", CLUSTERS)
def test_uncommitted_changes_are_refused(text):
    code = Checkout("/checkout", "0" * 40, clean=False)
    with refused("/checkout"):
        build_launcher(text).submission([Job("a", ("m",), "gs://b/a")], code, "gs://b", 1)


@pytest.mark.parametrize("text", CLUSTERS[1:])
def test_workdir_on_a_temporary_disk_is_refused(text):
    code = Checkout("/checkout", "0" * 40, clean=True)
    with refused("--workdir"):
        build_launcher(text).submission([Job("a", ("m",), "runs/a")], code, "runs", 1)


# Launchers by name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "field"), [
    ("nowhere", "--launcher"),
    ("jobs", "--launcher"),  # a module without `make`
    ("vm", "--launcher"),
    ("../x", "--launcher"),
    ("slurm:partitoin=a", "launcher.partitoin"),
    ("slurm:nodes=many", "launcher.nodes"),
    ("slurm:nodes=0", "launcher.nodes"),
    ("local:gpus=0", "launcher.gpus"),
    ("tpu_vm:zone=a:runtime=b", "launcher.type"),
    ("gke:image=a", "launcher.tpu"),
    ("mig:machine=m:zone=z:image_family=f:bucket=b", "launcher.bucket"),
])  # fmt: skip
def test_invalid_launchers_are_refused(text, field):
    with refused(field):
        build_launcher(text)


def test_launcher_keywords_are_parsed():
    options = build_launcher("slurm:partition=gpu:time=4:00:00:gpus_per_node=a100:4:nodes=2").options
    assert {"--partition=gpu", "--time=4:00:00", "--gpus-per-node=a100:4", "--nodes=2"} <= set(options)


# Submissions ----------------------------------------------------------------------------------------------------------


def test_submit_writes_files_and_then_runs_commands(tmp_path, capfd):
    path = str(tmp_path / "new" / "file")
    submit(JobSubmission({path: "text"}, (("cat", path), ("sh", "-c", "echo error >&2"))), ["sh"])
    output = capfd.readouterr()
    assert "text" in output.out and output.err == "error\n" and (tmp_path / "new" / "file").read_text() == "text"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["file"]


def test_dry_run_only_prints(tmp_path, capsys):
    path = str(tmp_path / "file")
    submit(JobSubmission({path: "text\n"}, (("touch", str(tmp_path / "a b")),)), ["no-such-tool"], dry_run=True)
    assert capsys.readouterr().out == f"==> {path} <==\ntext\n\n$ touch '{tmp_path}/a b'\n"
    assert not list(tmp_path.iterdir())


def test_missing_tool_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused("sbatch"):
        submit(JobSubmission({str(tmp_path / "file"): "text"}, (("touch", str(tmp_path / "a")),)), ["sbatch"])
    assert not list(tmp_path.iterdir())


def test_no_command_runs_after_a_failed_one(tmp_path):
    failing = ("sh", "-c", "echo first >&2; echo last words >&2; exit 7")
    with pytest.raises(InputError, match=r"exit code 7: last words$"):
        submit(JobSubmission({}, (failing, ("touch", str(tmp_path / "a")))), [])
    assert not list(tmp_path.iterdir())


# Words and loops of bash ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [*AWKWARD, "".join(map(chr, range(1, 256))), "\n1", "\0331", "日本\u200b"])
def test_quoted_word_expands_to_itself(word, tmp_path):
    line = f"printf %s {quote(word)}"
    assert "\n" not in line and "\r" not in line
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True)
    assert done.stdout.decode() == word and not list(tmp_path.iterdir())


def test_nul_character_is_refused():
    with refused("command"):
        quote("a\0b")


def loop(folder, retries, delay=0):
    lines = retry_loop([str(folder / "job"), *AWKWARD], retries, delay)
    return f"set -u\n{lines}\necho stopping=$stopping\nexit $code\n"


@pytest.mark.parametrize(
    ("codes", "retries"),
    [
        ([0], 3),
        ([2], 3),
        ([3], 3),
        ([75, 75, 75, 0], 0),  # 75 is not counted as a retry
        ([1, 0], 1),
        ([1, 75, 137, 0], 2),
        ([1, 70, 2], 2),
        ([1, 1, 134], 2),  # one crash too many
        ([1], 0),
    ],
)
def test_loop_restarts_a_job_until_it_is_done(codes, retries, tmp_path):
    make_program(tmp_path, "job", EXITS)
    set_exit_codes(tmp_path, *codes)
    script = loop(tmp_path, retries)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert parses(script) and done.returncode == codes[-1], done.stderr
    assert calls(tmp_path, "job") == [list(AWKWARD)] * len(codes)
    assert done.stdout == "stopping=0\n" and not (tmp_path / "canary").exists()


def start(folder, script):
    process = subprocess.Popen(["bash", "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 20
    while not (folder / "ready").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return process


def test_sigterm_is_forwarded_once_and_the_job_saves(tmp_path):
    make_program(tmp_path, "job", WAITS)
    process = start(tmp_path, loop(tmp_path, 3))
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "stopping=1\n" and process.returncode == 75
    assert (tmp_path / "signals").read_text() == "SIGTERM\n" and len(calls(tmp_path, "job")) == 1


def test_sigterm_during_the_delay_prevents_the_restart(tmp_path):
    make_program(tmp_path, "job", "(HERE / 'ready').touch(); sys.exit(1)")
    process = start(tmp_path, loop(tmp_path, 3, delay=15))
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(timeout=10) == 1 and time.monotonic() - began < 5
    assert len(calls(tmp_path, "job")) == 1


def test_inserted_text_is_not_expanded_again():
    assert jobs.fill_template("@A@ @B@", a="@B@", b="1") == "@B@ 1"
