"""What launchers share: names, the code at hand, submissions, and the loop that runs a job until it is done."""

import re
import signal
import subprocess
import time

import pytest

from diffusion.core.types import InputError
from launch import jobs
from launch.jobs import Code, Job, Submission, build_launcher, check_name, code_here, label, quote, submit, until_done
from tests.launch.fakes import AWKWARD, EXITS, WAITS, calls, checkout, codes, parses, program

# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "lr=0.001,seed=1", "_x", "A+b-c.d", "a" * 120, "=", "0"])
def test_names_of_runs(name):
    assert check_name(name, "--name") == name


@pytest.mark.parametrize("name", [
    "", ".", "..", "../up", "a/b", "/a", ".hidden", "-flag", "a b", "a\nb", "a\n", "a\0", "$(x)", "`x`", "a'b", 'a"b',
    "a\\b", "a:b", "a" * 121, "é", "a*", "launch",
])  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(InputError, match=r"^--name: "):
        check_name(name, "--name")


@pytest.mark.parametrize("name", ["lr=0.001", "LR=0.001", "0", "---", "", "é", "a" * 120, "a-" * 60, "x."])
def test_labels_are_of_dns(name):
    for longest in (20, 40):
        made = label(name, name, longest)
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", made) and len(made) <= longest and "--" not in made


def test_labels_of_two_names_differ():
    names = ["a=1", "a_1", "a.1", "A=1", "a" * 119, "a" * 120]
    assert len({label(name, name) for name in names}) == len(names)
    assert label("a", "runs/x/a") != label("a", "runs/y/a") and label("a", "b") == label("a", "b")


# The code -------------------------------------------------------------------------------------------------------------


def test_the_code_at_hand(tmp_path):
    folder = checkout(tmp_path)
    code = code_here(str(folder / "experiments"))
    head = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert code == Code(str(folder), head, clean=True) and len(head) == 40
    (folder / "runs").mkdir()
    (folder / "runs" / "ignored").touch()
    assert code_here(str(folder)).clean
    (folder / "new").touch()
    assert not code_here(str(folder)).clean


def test_no_checkout_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(InputError, match=r"^git: cannot tell which code this is \(.*not a git repository.*launch from"):
        code_here(str(tmp_path))
    subprocess.run(["git", "-C", tmp_path, "init", "--quiet"], check=True)
    with pytest.raises(InputError, match=r"^git: cannot tell"):  # no commit
        code_here(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"^git: is not installed"):
        code_here(str(tmp_path))


CLUSTERS = ["slurm", "tpu_vm:type=v4-8:zone=z:runtime=r", "gke:image=i:gpu=g",
            "mig:machine=m:zone=z:image_family=f:bucket=gs://b"]  # fmt: skip


@pytest.mark.parametrize("text", CLUSTERS)
def test_changes_without_a_commit_are_refused(text):
    with pytest.raises(InputError, match=r"^/checkout: has changes .*; commit first$"):
        build_launcher(text).submission([Job("a", ("m",), "gs://b/a")], Code("/checkout", "0" * 40, False), "gs://b", 1)


@pytest.mark.parametrize("text", CLUSTERS[1:])
def test_disks_that_are_lost_hold_no_workdir(text):
    with pytest.raises(InputError, match=r"^--workdir: must be in a bucket"):
        build_launcher(text).submission([Job("a", ("m",), "runs/a")], Code("/checkout", "0" * 40, True), "runs", 1)


# Launchers by name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "error"), [
    ("nowhere", "^--launcher: no 'nowhere'; one of: .*gke.*mig.*slurm.*tpu_vm"),
    ("jobs", "^--launcher: no 'jobs'"),
    ("vm", "^--launcher: no 'vm'"),
    ("../x", "^--launcher: "),
    ("slurm:partitoin=a", "^launcher.partitoin: launch/slurm.py takes no 'partitoin'; did you mean 'partition'"),
    ("slurm:nodes=many", "^launcher.nodes: launch/slurm.py wants int"),
    ("slurm:nodes=0", "^launcher.nodes: must be at least 1"),
    ("tpu_vm:zone=a:runtime=b", "^launcher.type: is missing"),
    ("tpu_vm:type=v9-8:zone=a:runtime=b", "^launcher.type: wants one of"),
    ("gke:image=a", "^launcher.tpu: or gpu must be given"),
    ("gke:image=a:tpu=v5e", "^launcher.tpu: wants one of"),
    ("mig:machine=m:zone=z:image_family=f:bucket=b", "^launcher.bucket: must be gs://"),
])  # fmt: skip
def test_launchers_that_cannot_be_are_refused(text, error):
    with pytest.raises(InputError, match=error):
        build_launcher(text)


def test_launchers_have_the_notation_of_samplers():
    options = build_launcher("slurm:partition=gpu:time=4:00:00:gpus_per_node=a100:4:nodes=2").options
    assert {"--partition=gpu", "--time=4:00:00", "--gpus-per-node=a100:4", "--nodes=2"} <= set(options)


# Submissions ----------------------------------------------------------------------------------------------------------


def test_files_first_then_commands(tmp_path, capfd):
    path = str(tmp_path / "new" / "file")
    submit(Submission({path: "text"}, (("cat", path), ("sh", "-c", "echo beside >&2"))), ["sh"])
    out = capfd.readouterr()
    assert "text" in out.out and out.err == "beside\n" and (tmp_path / "new" / "file").read_text() == "text"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["file"]


def test_a_dry_run_does_nothing_and_says_all(tmp_path, capsys):
    path = str(tmp_path / "file")
    submit(Submission({path: "text\n"}, (("touch", str(tmp_path / "a b")),)), ["no-such-tool"], dry_run=True)
    assert capsys.readouterr().out == f"==> {path} <==\ntext\n\n$ touch '{tmp_path}/a b'\n"
    assert not list(tmp_path.iterdir())


def test_a_missing_tool_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        InputError, match=r"^sbatch: is not on the PATH; log in to a node of the Slurm cluster$"
    ) as error:
        submit(Submission({str(tmp_path / "file"): "text"}, (("touch", str(tmp_path / "a")),)), ["sbatch"])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_command_that_fails_is_the_last(tmp_path):
    failing = ("sh", "-c", "echo first >&2; echo last words >&2; exit 7")
    with pytest.raises(InputError, match=r"^sh -c '.*': failed with exit code 7: last words$"):
        submit(Submission({}, (failing, ("touch", str(tmp_path / "a")))), [])
    assert not list(tmp_path.iterdir())


# Words and loops of bash ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [*AWKWARD, "".join(map(chr, range(1, 256))), "\n1", "\0331", "日本\u200b"])
def test_a_quoted_word_is_itself(word, tmp_path):
    line = f"printf %s {quote(word)}"
    assert "\n" not in line and "\r" not in line
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True)
    assert done.stdout.decode() == word and not list(tmp_path.iterdir())


def test_a_word_with_nul_is_refused():
    with pytest.raises(InputError, match="NUL"):
        quote("a\0b")


def loop(folder, retries, pause=0):
    return (
        f"set -u\n{until_done([str(folder / 'job'), *AWKWARD], retries, pause)}\necho stopping=$stopping\nexit $code\n"
    )


@pytest.mark.parametrize(
    ("wanted", "retries"),
    [
        ([0], 3),
        ([2], 3),
        ([3], 3),
        ([75, 75, 75, 0], 0),  # does not count
        ([1, 0], 1),
        ([1, 75, 137, 0], 2),
        ([1, 70, 2], 2),
        ([1, 1, 134], 2),  # once too often
        ([1], 0),
    ],
)
def test_a_job_is_run_until_it_is_done(wanted, retries, tmp_path):
    program(tmp_path, "job", EXITS)
    codes(tmp_path, *wanted)
    script = loop(tmp_path, retries)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert parses(script) and done.returncode == wanted[-1], done.stderr
    assert calls(tmp_path, "job") == [list(AWKWARD)] * len(wanted)
    assert done.stdout == "stopping=0\n" and not (tmp_path / "canary").exists()


def started(folder, script):
    process = subprocess.Popen(["bash", "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 20
    while not (folder / "ready").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return process


def test_a_job_that_is_told_to_stop_is_told_once_and_saves(tmp_path):
    program(tmp_path, "job", WAITS)
    process = started(tmp_path, loop(tmp_path, 3))
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "stopping=1\n" and process.returncode == 75
    assert (tmp_path / "told").read_text() == "told\n" and len(calls(tmp_path, "job")) == 1


def test_told_to_stop_while_it_waits_it_does_not_start_again(tmp_path):
    program(tmp_path, "job", "(HERE / 'ready').touch(); sys.exit(1)")
    process = started(tmp_path, loop(tmp_path, 3, pause=15))
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(timeout=10) == 1 and time.monotonic() - began < 5
    assert len(calls(tmp_path, "job")) == 1


def test_parts_of_a_template_are_not_filled_again():
    assert jobs.fill("@A@ @B@", a="@B@", b="1") == "@B@ 1"
