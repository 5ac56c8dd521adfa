"""Trains every point of a sweep, or resumes the points of the workdir that are not done.

python -m launch.sweep --config=configs/digits.py --sweep=configs/sweeps/digits.py --workdir=runs/lr \\
    [--config.train.steps=500] [--launcher=local --jobs=2 | --launcher=slurm:partition=gpu] [--evaluate] [--dry_run]

python -m launch.sweep --checkpoint=runs/digits --sweep=configs/sweeps/digits.py:sampling --workdir=runs/samplers \\
    [-- --num=200 --seed=1]

Before the first run starts, every point is validated by training's own flag parser and parts. `python -m launch.status`
shows the progress. The results are in the workdir's results.csv and results.html.

With `--checkpoint`, one process draws samples from one model for every point of the sweep. The points set `sampler`,
`steps`, `guidance` and so on, like the flags of `experiments.sample`, whose other flags follow `--`.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from diffusion.core import checks, files, locks
from diffusion.core.types import InputError
from diffusion.pipelines.config import from_json, resolve
from experiments import cli
from launch import checkpoint_sweep, jobs, points, report, results
from launch.local import Local
from launch.points import SweepPoint
from launch.pool import Pool, SweepRun, run_until_done

CONFIG = cli.define_config()
SWEEP = cli.define_path("sweep", None, "File that defines sweep(), or FILE:OTHER for its sweep_OTHER().")
WORKDIR = cli.define_path("workdir", None, "Folder of the sweep. It contains one folder per run.")
LAUNCHER = flags.DEFINE_string(
    "launcher", "local", "Where the jobs run: NAME:keyword=value, as in slurm:nodes=2:gpus_per_node=8."
)
JOBS = flags.DEFINE_integer("jobs", 1, "Number of concurrent runs on this machine.")
RETRIES = flags.DEFINE_integer("retries", 3, "How often each run is restarted after a crash.")
EVALUATE = flags.DEFINE_bool("evaluate", False, "Evaluate each model after its training, on this machine.")
AGAIN = flags.DEFINE_bool("again", False, "Also restart the runs that were refused or diverged.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only validate all points and print what would be run.")
CHECKPOINT = cli.define_path("checkpoint", None, "Instead of --config: workdir of a trained model to sample from.")
flags.mark_flags_as_required(["sweep", "workdir"])

MAX_JOBS = 1024
EXIT_CODES = {"refused": cli.BAD_INPUT, "diverged": cli.DIVERGED}  # exit code of the sweep by the state of a run


def main(rest: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # points are validated on the CPU; the accelerators are left to the runs
    workdir, launcher = WORKDIR.value.rstrip("/") or "/", jobs.build_launcher(LAUNCHER.value)
    local = isinstance(launcher, Local)
    _check_flags(workdir, local, rest)
    if CHECKPOINT.value is not None:
        _sample(workdir, launcher, rest)
        return
    settings = _shared_settings()
    resolved = points.resolve(points.read(SWEEP.value), settings["config"], settings["overrides"])
    if not local and not DRY_RUN.value:
        jobs.check_tools(launcher.tools)
    code = _checkout(local)
    existing = _existing_sweep(workdir, settings)
    print(f"checking {len(resolved)} points", file=sys.stderr)
    points.check(resolved, workdir, data_here=local)
    if existing:
        _check_unchanged(workdir, resolved)
    runs = [SweepRun(point, os.path.join(workdir, point.name), _commands(point, workdir, local)) for point in resolved]
    if local and DRY_RUN.value:
        for run in runs:
            for command in run.commands:
                print(launcher.format_command(jobs.Job(run.point.name, command, run.folder)))
        return
    if not local:
        _submit(workdir, launcher, code, runs, existing)
        return
    files.make_folder(workdir, "--workdir")
    with locks.hold(workdir, "--workdir"):
        _write_description(workdir, code, resolved)
        pool = Pool(workdir, launcher, runs, jobs=JOBS.value, retries=RETRIES.value, again=AGAIN.value)
        signalled = pool.run()
        rows = results.read(workdir)
        written = results.write_csv(workdir, rows), report.write_html(workdir, rows)
    print(f"{results.counts(rows)}: {' and '.join(written)}")
    if signalled:
        sys.exit(signalled)
    sys.exit(max((EXIT_CODES.get(row.state, 1) for row in rows if row.state != "done"), default=0))


def _sample(workdir: str, launcher: Local, rest: list[str]) -> None:
    """Draws samples from one checkpoint. `experiments.sample` validates all points before it draws."""
    named = points.name_points(points.read(SWEEP.value))
    settings = {"checkpoint": CHECKPOINT.value}
    _existing_sweep(workdir, settings)
    commands = checkpoint_sweep.commands(CHECKPOINT.value, workdir, rest)
    if DRY_RUN.value:
        print(launcher.format_command(jobs.Job("samples", commands[0], workdir)))
        return
    new = not os.path.exists(workdir)
    files.make_folder(workdir, "--workdir")
    with locks.hold(workdir, "--workdir"):
        checkpoint_sweep.write_description(workdir, named, {**settings, "sweep": SWEEP.value})
        code = run_until_done(launcher, commands, RETRIES.value)
        if code == 0:
            print(" and ".join(checkpoint_sweep.write_results(workdir, named)))
        elif new and code == cli.BAD_INPUT:
            checkpoint_sweep.remove_empty(workdir)
    sys.exit(code)


def _check_flags(workdir: str, local: bool, rest: list[str]) -> None:
    if (CONFIG.path.value is None) == (CHECKPOINT.value is None):
        raise InputError("--config", "exactly one of --config and --checkpoint must be given")
    if CHECKPOINT.value is not None and not local:
        raise InputError(
            "--checkpoint", "requires --launcher=local; elsewhere, start experiments.sample with launch.run"
        )
    if rest and CHECKPOINT.value is None:
        raise InputError(
            rest[0], "follows --, where flags of experiments.sample are expected; use it with --checkpoint"
        )
    checks.at_least(1, **{"--jobs": JOBS.value})
    checks.at_least(0, **{"--retries": RETRIES.value})
    checks.at_most(MAX_JOBS, JOBS.value, "--jobs")
    if EVALUATE.value and not local:
        raise InputError(
            "--evaluate", "requires --launcher=local; elsewhere, start experiments.evaluate with launch.run"
        )
    if local and files.is_remote(workdir):
        raise InputError("--workdir", f"must be a local folder for --launcher=local, got {workdir}")


def _checkout(local: bool) -> jobs.Checkout:
    """Returns the checkout of the code. Local runs, which use the current folder, do not require one."""
    try:
        return jobs.current_code()
    except InputError:  # git is not installed, for example
        if not local:
            raise
        return jobs.Checkout(os.getcwd(), "unknown", clean=False)


def _existing_sweep(workdir: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the description of the workdir's sweep, or None if there is none.

    Raises:
      InputError: The workdir contains a single run, or a sweep with other settings.
    """
    if not files.is_folder(workdir, "--workdir") or not epath.Path(workdir, results.SWEEP).exists():
        if epath.Path(workdir, "metrics.jsonl").exists():
            raise InputError("--workdir", f"{workdir} contains a single run; choose another folder for the sweep")
        return None
    existing = results.read_sweep(workdir)
    for name, value in files.plain(settings).items():
        if existing.get(name) != value:
            problem = f"is {value!r}, but the sweep in {workdir} has {existing.get(name)!r}"
            raise InputError(f"--{name}", f"{problem}; restore it or choose another --workdir")
    return existing


def _shared_settings() -> dict[str, Any]:
    """Returns the config file and the overrides that the command line sets for all points."""
    return {"config": CONFIG.path.value, "overrides": dict(CONFIG.overrides)}


def _check_unchanged(workdir: str, resolved: Sequence[SweepPoint]) -> None:
    """Raises InputError if the config of a started run has changed, for example by an edit of the config file."""
    for point in resolved:
        stored = results.read_json(os.path.join(workdir, point.name, "launch.json"))
        if stored is None:
            continue
        # Options that are newer than the run have their defaults.
        old, new = (_flat(files.plain(config)) for config in (resolve(from_json(stored["config"])), point.config))
        changed = [field for field in {**old, **new} if old.get(field) != new.get(field)]
        if changed:
            field = changed[0]
            problem = f"is {new.get(field)!r}, but {point.name} was started with {old.get(field)!r}"
            raise InputError(field, f"{problem}; restore it or choose another --workdir")


def _flat(config: Mapping[str, Any], above: str = "config") -> dict[str, Any]:
    fields = {}
    for key, value in config.items():
        field = f"{above}.{key}"
        fields |= _flat(value, field) if isinstance(value, Mapping) and value else {field: value}
    return fields


def _commands(point: SweepPoint, workdir: str, local: bool) -> list[tuple[str, ...]]:
    run_workdir = f"--workdir={os.path.join(workdir, point.name)}"
    train = ("experiments.train", *point.flags, run_workdir)
    if not local:
        return [train]
    # Restarts, and other runs with the same computation, reuse what one run has compiled.
    compiled = f"--compiled={os.path.join(workdir, 'compiled')}"
    return [(*train, compiled), *([("experiments.evaluate", run_workdir, compiled)] if EVALUATE.value else [])]


def _write_description(workdir: str, code: jobs.Checkout, resolved: Sequence[SweepPoint]) -> None:
    """Writes `sweep.json`, and `launch.json` for each new run."""
    listed = [{"name": point.name, "overrides": point.overrides, "steps": point.config["train"]["steps"]}
              for point in resolved]  # fmt: skip
    sweep = {**_shared_settings(), "sweep": SWEEP.value, "launcher": LAUNCHER.value.partition(":")[0],
             "commit": code.commit, "clean": code.clean, "points": listed}  # fmt: skip
    files.write_json(os.path.join(workdir, results.SWEEP), sweep)
    for point in resolved:
        folder = files.make_folder(os.path.join(workdir, point.name), "--workdir")
        path = epath.Path(folder, "launch.json")
        if not path.exists():  # keeps the commit with which the run was first started
            run = {"name": point.name, "overrides": point.overrides, "flags": point.flags}
            files.write_json(path, {**run, "commit": code.commit, "clean": code.clean, "config": point.config})


def _submit(
    workdir: str, launcher: jobs.Launcher, code: jobs.Checkout, runs: Sequence[SweepRun], existing: Mapping | None
) -> None:
    """Submits the runs that are neither done nor already submitted or running."""
    states = {row.name: row.state for row in results.read(workdir)} if existing else {}
    ended = {"done"} if AGAIN.value else {"done", "refused", "diverged"}
    skipped = {*ended, "running", "submitted"}
    todo = [run for run in runs if states.get(run.point.name) not in skipped]
    if not todo:
        print(f"nothing to submit: {results.counts(results.read(workdir))}")
        return
    submitted_jobs = [jobs.Job(run.point.name, run.commands[0], run.folder) for run in todo]
    submission = launcher.submission(submitted_jobs, code, workdir, RETRIES.value)
    if not DRY_RUN.value:
        files.make_folder(workdir, "--workdir")
        _write_description(workdir, code, [run.point for run in runs])
    # The time is taken before the submission, because a run may end while the next one is being submitted.
    submitted = {"event": "submitted", "time": time.time()}
    jobs.submit(submission, launcher.tools, DRY_RUN.value)
    if not DRY_RUN.value:
        for run in todo:
            run.record_event(submitted)
        print(f"{len(todo)} runs submitted; show them with python -m launch.status --workdir={workdir}")


if __name__ == "__main__":
    cli.run(main, together=False, takes_rest=True)
