"""Trains every point of a sweep, or goes on with those of the workdir that are not done.

python -m launch.sweep --config=configs/digits.py --sweep=configs/sweeps/digits.py --workdir=runs/lr \\
    [--config.train.steps=500] [--launcher=local --jobs=2 | --launcher=slurm:partition=gpu] [--evaluate] [--dry_run]

python -m launch.sweep --checkpoint=runs/digits --sweep=configs/sweeps/digits.py:sampling --workdir=runs/samplers \\
    [-- --num=200 --seed=1]

Every point is held against training's own flags and parts before the first starts. `python -m launch.status` tells how
far they are; results.csv and results.html are in the workdir.

With `--checkpoint` one process draws samples of one model in every way that the sweep has: its points choose `sampler`,
`steps`, `guidance` and so on, as flags of `experiments.sample` do, whose other flags stand after `--`.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from diffusion.core import files
from diffusion.core.checks import at_most
from diffusion.core.types import InputError
from experiments import cli
from launch import jobs, locks, points, report, results, sampling
from launch.local import Local
from launch.points import Point
from launch.pool import Pool, Run, until_done

CONFIG = cli.define_config()
SWEEP = flags.DEFINE_string("sweep", None, "File with sweep(), or FILE:OTHER for its sweep_OTHER().")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep; each run has one in it.")
LAUNCHER = flags.DEFINE_string("launcher", "local", "Where: NAME:keyword=value, as in slurm:nodes=2:gpus_per_node=8.")
JOBS = flags.DEFINE_integer("jobs", 1, "Runs beside each other, on this machine.")
RETRIES = flags.DEFINE_integer("retries", 3, "How often a run may crash and be started again.")
EVALUATE = flags.DEFINE_bool("evaluate", False, "Measure each model once it is trained, on this machine.")
AGAIN = flags.DEFINE_bool("again", False, "Start also those again that were refused or diverged.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check all points, print what would be run, and do nothing.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "In place of --config: a trained run, to sample from.")
flags.mark_flags_as_required(["sweep", "workdir"])

MOST_JOBS = 1024
CODES = {"refused": cli.BAD_INPUT, "diverged": cli.DIVERGED}  # of the sweep, for a run that has ended so


def main(rest: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # to check the points; the accelerators are for the runs
    workdir, launcher = WORKDIR.value.rstrip("/") or "/", jobs.build_launcher(LAUNCHER.value)
    here = isinstance(launcher, Local)
    _check_flags(workdir, here, rest)
    if CHECKPOINT.value is not None:
        _sample(workdir, launcher, rest)
        return
    shared = _shared()
    found = points.resolved(points.read(SWEEP.value), shared["config"], shared["overrides"])
    if not here and not DRY_RUN.value:
        jobs.check_tools(launcher.tools)
    code = _code(here)
    before = _begun(workdir, shared)
    print(f"checking {len(found)} points", file=sys.stderr)
    points.check(found, workdir, data_here=here)
    _check_unchanged(workdir, before, found)
    runs = [Run(point, os.path.join(workdir, point.name), _commands(point, workdir, here)) for point in found]
    if here and DRY_RUN.value:
        for run in runs:
            for command in run.commands:
                print(launcher.shown(jobs.Job(run.point.name, command, run.folder)))
        return
    if not here:
        _submit(workdir, launcher, code, runs, before)
        return
    files.make_folder(workdir, "--workdir")
    with locks.hold(workdir, "--workdir"):
        _describe(workdir, code, found)
        pool = Pool(workdir, launcher, runs, jobs=JOBS.value, retries=RETRIES.value, again=AGAIN.value)
        stopped = pool.run()
        rows = results.read(workdir)
        written = results.write_csv(workdir, rows), report.write_html(workdir, rows)
    print(f"{results.counts(rows)}: {' and '.join(written)}")
    if stopped:
        sys.exit(stopped)
    sys.exit(max((CODES.get(row.state, 1) for row in rows if row.state != "done"), default=0))


def _sample(workdir: str, launcher: Local, rest: list[str]) -> None:
    """Draws from one checkpoint. What the points choose is held against it by the job, before the first is drawn."""
    found = points.named(points.read(SWEEP.value))
    shared = {"checkpoint": CHECKPOINT.value}
    _begun(workdir, shared)
    commands = sampling.commands(CHECKPOINT.value, workdir, rest)
    if DRY_RUN.value:
        print(launcher.shown(jobs.Job("samples", commands[0], workdir)))
        return
    new = not os.path.exists(workdir)
    files.make_folder(workdir, "--workdir")
    with locks.hold(workdir, "--workdir"):
        sampling.describe(workdir, found, {**shared, "sweep": SWEEP.value})
        code = until_done(launcher, commands, RETRIES.value)
        if code == 0:
            print(" and ".join(sampling.collect(workdir, found)))
        elif new and code == cli.BAD_INPUT:
            sampling.undo(workdir)
    sys.exit(code)


def _check_flags(workdir: str, here: bool, rest: list[str]) -> None:
    if (CONFIG.value is None) == (CHECKPOINT.value is None):
        raise InputError("--config", "or --checkpoint: give one of the two")
    if CHECKPOINT.value is not None and not here:
        raise InputError("--checkpoint", "is for --launcher=local; start experiments.sample by launch.run")
    if rest and CHECKPOINT.value is None:
        raise InputError(rest[0], "stands after --, which is for experiments.sample with --checkpoint")
    for name, flag, least in (("--jobs", JOBS, 1), ("--retries", RETRIES, 0)):
        if flag.value < least:
            raise InputError(name, f"must be at least {least}, got {flag.value}")
    at_most(MOST_JOBS, JOBS.value, "--jobs")
    if EVALUATE.value and not here:
        raise InputError("--evaluate", "is for runs on this machine; start experiments.evaluate by launch.run")
    if here and files.is_remote(workdir):
        raise InputError("--workdir", f"must be a folder of this machine for --launcher=local, got {workdir}")


def _code(here: bool) -> jobs.Code:
    """The code that the runs have; no checkout is needed for what runs from this very folder."""
    try:
        return jobs.code_here()
    except InputError:
        if not here:
            raise
        return jobs.Code(os.getcwd(), "unknown", clean=False)


def _begun(workdir: str, shared: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The sweep that the workdir has already, which must be the same but for its points. Raises InputError if not."""
    if not files.is_folder(workdir, "--workdir") or not epath.Path(workdir, results.SWEEP).exists():
        if epath.Path(workdir, "metrics.jsonl").exists():
            raise InputError("--workdir", f"{workdir} is a run's; a sweep wants a folder of its own")
        return None
    before = results.read_sweep(workdir)
    for name, value in json.loads(json.dumps(shared)).items():
        if before.get(name) != value:
            problem = f"is {value!r}, but the sweep in {workdir} has {before.get(name)!r}"
            raise InputError(f"--{name}", f"{problem}; restore it or give another --workdir")
    return before


def _shared() -> dict[str, Any]:
    """What the command line gives to all points."""
    given = flags.FLAGS["config"]
    overrides = {field: value.to_dict() if isinstance(value, ConfigDict) else value
                 for field, value in config_flags.get_override_values(given).items()}  # fmt: skip
    return {"config": config_flags.get_config_filename(given), "overrides": overrides}


def _check_unchanged(workdir: str, before: Mapping[str, Any] | None, found: Sequence[Point]) -> None:
    """A run goes on with the config it began with: its file may have been edited since."""
    for point in found if before else ():
        stored = results.read_json(os.path.join(workdir, point.name, "launch.json"))
        theirs = _flat(stored.get("config", {})) if isinstance(stored, Mapping) else {}
        ours = _flat(json.loads(json.dumps(point.config)))
        changed = [field for field in {**theirs, **ours} if theirs and theirs.get(field) != ours.get(field)]
        if changed:
            field = changed[0]
            problem = f"is {ours.get(field)!r}, but {point.name} was begun with {theirs.get(field)!r}"
            raise InputError(field, f"{problem}; restore it, or give another --workdir")


def _flat(config: Mapping[str, Any], above: str = "config") -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        field = f"{above}.{key}"
        found |= _flat(value, field) if isinstance(value, Mapping) and value else {field: value}
    return found


def _commands(point: Point, workdir: str, here: bool) -> list[tuple[str, ...]]:
    where = f"--workdir={os.path.join(workdir, point.name)}"
    train = ("experiments.train", *point.flags, where)
    if not here:
        return [train]
    # What one run has compiled serves its next start, and other runs wherever they compute the same.
    kept = f"--compiled={os.path.join(workdir, 'compiled')}"
    return [(*train, kept), *([("experiments.evaluate", where, kept)] if EVALUATE.value else [])]


def _describe(workdir: str, code: jobs.Code, found: Sequence[Point]) -> None:
    """Writes what the sweep is, and what each run is."""
    told = [{"name": point.name, "overrides": point.overrides, "steps": point.config["train"]["steps"]}
            for point in found]  # fmt: skip
    sweep = {**_shared(), "sweep": SWEEP.value, "launcher": LAUNCHER.value.partition(":")[0], "commit": code.commit,
             "clean": code.clean, "points": told}  # fmt: skip
    with files.replace(os.path.join(workdir, results.SWEEP)) as file:
        json.dump(sweep, file, indent=2)
    for point in found:
        folder = files.make_folder(os.path.join(workdir, point.name), "--workdir")
        path = epath.Path(folder, "launch.json")
        if not path.exists():  # of the code that a run began with
            with files.replace(os.fspath(path)) as file:
                about = {"name": point.name, "overrides": point.overrides, "flags": point.flags}
                json.dump({**about, "commit": code.commit, "clean": code.clean, "config": point.config}, file, indent=2)


def _submit(workdir: str, launcher: Any, code: jobs.Code, runs: Sequence[Run], before: Mapping | None) -> None:
    """Hands the runs that are not done, or on their way, to a cluster."""
    states = {row.name: row.state for row in results.read(workdir)} if before else {}
    ended = {"done", "refused", "diverged"} if not AGAIN.value else {"done"}
    leave = {*ended, "running", "submitted"}
    todo = [run for run in runs if states.get(run.point.name) not in leave]
    if not todo:
        print(f"nothing to submit: {results.counts(results.read(workdir))}")
        return
    found = [jobs.Job(run.point.name, run.commands[0], run.folder) for run in todo]
    submission = launcher.submission(found, code, workdir, RETRIES.value)
    if not DRY_RUN.value:
        files.make_folder(workdir, "--workdir")
        _describe(workdir, code, [run.point for run in runs])
    submitted = {"event": "submitted", "time": time.time()}  # before, as a run may end while the next is submitted
    jobs.submit(submission, launcher.tools, DRY_RUN.value)
    if not DRY_RUN.value:
        for run in todo:
            run.tell(submitted)
        print(f"{len(todo)} runs submitted; python -m launch.status --workdir={workdir}")


if __name__ == "__main__":
    cli.run(main, together=False, takes_rest=True)
