"""Bad input at random: every job ends with exit code 0, or with 2 and one line, and writes nothing where it may not.

The jobs run in this process by their own `cli.run`, and are cut off where they would begin to write or to draw: all
that can be refused is refused before. `FUZZ=2500 pytest tests/experiments/test_fuzz.py` runs so many examples, other
ones each time; without it there are a few hundred, always the same.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import io
import json
import os
import pathlib
import re
import resource
import runpy
import shutil
import signal
import sys
import typing

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from diffusion.objectives.ddpm import DDPM
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from diffusion.core import files
from diffusion.core.build import find, names
from diffusion.core.types import InputError
from diffusion.pipelines.generator import Generator
from experiments import cli

ROOT = pathlib.Path(__file__).parent.parent.parent
EXAMPLES = int(os.environ.get("FUZZ", 220))
SECONDS, MEMORY = 60, 8 * 2**30  # that an example may take: endless loops and gigantic arrays fail, and do not hang
TINY = ("--config.train.steps=1", "--config.train.batch_size=8", "--config.optimizer.warmup=0")
MLP = ("--config.network.width=4", "--config.network.depth=1")
NETWORK = "--config.network={'name': 'mlp', 'width': 4, 'depth': 1}"
DIGITS = (
    *TINY, NETWORK, "--config.train.preview_every=0", "--config.eval.metrics={'energy_distance': {'num': 16}}",
)  # fmt: skip
STUDENT = (
    *DIGITS, "--config.sampler={'name': 'consistency', 'steps': 2}",
    "--config.objective={'name': 'consistency', 'schedule': 'vp', 'discretization': {'name': 'fixed', 'points': 4}, "
    "'teacher': 'run'}",
)  # fmt: skip


def fuzz(share):
    """The settings of a test with a share of all examples."""
    return settings(
        max_examples=max(1, round(share * EXAMPLES)), derandomize="FUZZ" not in os.environ, deadline=None,
        database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
    )  # fmt: skip


# The jobs, in this process.


class Reached(Exception):
    """The job has accepted its input, and would begin to write or to draw."""


def reached(*_, **__):
    raise Reached


@dataclasses.dataclass(frozen=True)
class Done:
    """How a job ended, and where it wrote."""

    code: int
    out: str
    err: str
    was_cut: bool
    wrote: list[str]

    def check(self):
        """Success, or one line that names a field and says something of it; nothing written either way."""
        lines = [line for line in self.err.splitlines() if not line.startswith("warning: ")]
        assert self.wrote == []
        if self.code == 0:
            assert lines == []
            return
        assert self.code == 2 and len(lines) == 1 and self.out == "", (self.code, self.err, self.out)
        assert re.match(r"error: (flag |Flag |Unknown command line flag )?\S.*(: | ).*\S", lines[0]), lines[0]


class Job:
    """`experiments.NAME`, whose flags are there while it runs: those of two jobs may have one name."""

    def __init__(self, name):
        before = set(flags.FLAGS)
        self.name, self.main = name, importlib.import_module(f"experiments.{name}").main
        self.flags = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - before}
        self._remove()

    def _remove(self):
        for name in self.flags:
            delattr(flags.FLAGS, name)

    def __call__(self, *given, cut=True):
        for name, flag in self.flags.items():
            flags.FLAGS[name] = flag
        saved, argv, hook = flagsaver.save_flag_values(), sys.argv, sys.unraisablehook
        out, err, code, was_cut = io.StringIO(), io.StringIO(), 0, False
        sys.argv = [self.name, *given]
        sys.unraisablehook = lambda what: err.write(f"Exception ignored: {what.exc_value}\n")  # as Python, not pytest
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.redirect_stdout(out))
                stack.enter_context(contextlib.redirect_stderr(err))
                wrote = stack.enter_context(watched())
                stack.enter_context(limited())
                if cut:
                    patch = stack.enter_context(pytest.MonkeyPatch.context())
                    patch.setattr(files, "make_folder", reached)
                    patch.setattr(Generator, "__call__", reached)
                cli.run(self.main)
        except SystemExit as end:
            code = end.code or 0
        except Reached:
            was_cut = True
        finally:
            sys.argv, sys.unraisablehook = argv, hook
            flagsaver.restore_flag_values(saved)
            self._remove()
        return Done(code, out.getvalue(), err.getvalue(), was_cut, wrote)


@contextlib.contextmanager
def limited():
    """Within the limits of an example."""

    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before, memory = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, memory[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, memory)


WATCHES = []  # lists that what is written is put on
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")


def _hear(event, given):
    if not WATCHES:
        return
    writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if not writes and event not in CHANGES:
        return
    path = given[1] if event in ("os.rename", "os.symlink", "os.link") else given[0]
    cache = jax.config.jax_compilation_cache_dir
    if isinstance(path, (str, os.PathLike)):
        path = os.path.abspath(path)
        if not (path.startswith(("/dev/", "/proc/")) or "__pycache__" in path or (cache and path.startswith(cache))):
            WATCHES[-1].append(path)


sys.addaudithook(_hear)


@contextlib.contextmanager
def watched():
    """The absolute paths of what Python code writes, makes, moves and removes: no hook can be taken away again."""
    WATCHES.append([])
    try:
        yield WATCHES[-1]
    finally:
        WATCHES.pop()


@pytest.fixture(scope="module")
def jobs():
    return {name: Job(name) for name in ("train", *FLAGS)}


def seen(folder):
    """Everything in a folder, with what would tell that it was written."""
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in pathlib.Path(folder).rglob("*")}


@pytest.fixture(scope="module")
def place(tmp_path_factory, jobs):
    """The working directory of all jobs, with a trained run and a student of it, whose config is gone."""
    folder = tmp_path_factory.mktemp("place")
    with contextlib.chdir(folder):
        config = shutil.copy(ROOT / "configs/digits.py", "config.py")
        for workdir, given in (("run", DIGITS), ("student", STUDENT)):
            done = jobs["train"]("--config=config.py", *given, f"--workdir={workdir}", cut=False)
            assert done.code == 0, done.err
            assert done.wrote and all(path.startswith(f"{folder}/{workdir}") for path in done.wrote)
        os.remove(config)
        yield folder


# What is given.

WORDS = (
    "", " ", "None", "True", "false", "eps", "v", "ddim", "heun", "linear", "../x", "/etc/passwd", "a/../../b", "ü😀",
    "٣", "%s", "{", "'", "=", ",", ";", ":", "--", "lambda: 1", "__import__('os')", "~", "x://y", "[1, 2]", "*",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 7, 10**4, 10**6, 10**9, 10**12, 10**15, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63) - 1, 0.0, -0.0,
    0.5, 1.0, 1e-300, -1e300, 1e300, 3e38, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
scalars = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.sampled_from((True, False, None)), st.integers(-20, 200),
    st.floats(), text,
)  # fmt: skip
keys = st.one_of(st.sampled_from(("name", "schedule", "steps", "x", "0", "__class__", "../x")), text)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=2)),
    max_leaves=4,
)


ints = st.one_of(st.sampled_from([n for n in NUMBERS if isinstance(n, int)]), st.integers(-4, 40))
floats = st.one_of(st.sampled_from([n for n in NUMBERS if isinstance(n, float)]), st.floats(-2, 10), ints)


LIKE = {bool: st.booleans(), int: ints, float: floats, dict: values, str: st.sampled_from(WORDS)}


def like(value):
    """Of the type of a value, which gets further than others."""
    for kind, strategy in LIKE.items():
        if isinstance(value, kind):
            return strategy
    return st.lists(ints if 2 in value or 4 in value else floats, max_size=4).map(tuple) if value else values


def for_parameter(parameter):
    """A value that a keyword's annotation or default hints at."""
    options = typing.get_args(parameter.annotation)
    if typing.get_origin(parameter.annotation) is typing.Literal:
        return st.sampled_from(options)
    if parameter.default not in (inspect.Parameter.empty, None):
        return like(parameter.default)
    return {int: ints, float: floats, str: st.sampled_from(WORDS)}.get((*options, parameter.annotation)[0], values)


def spelled(value):
    """As a shell would give it."""
    return value if isinstance(value, str) else repr(value)


def paths(value, above=()):
    """The ways to all that is in nested dicts and lists."""
    yield above
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in pairs:
        yield from paths(item, (*above, key))


# Training: the overrides of a config.

UNET = (
    "--config.network.width=8", "--config.network.head_dim=8", "--config.network.channel_mult=(1,)",
    "--config.network.attention_resolutions=(8,)",
)  # fmt: skip
DIT = ("--config.network.width=16", "--config.network.depth=1", "--config.network.num_heads=2")
BASES = {
    "mixture.py": (*TINY, *MLP, "--config.data.labels=True"),
    "mixture.py:vdm": (*TINY, *MLP),
    "moons.py:sinkhorn": (*TINY, *MLP),
    "digits.py": (*TINY, *UNET),
    "digits_consistency.py:ict": DIGITS[:4],
    "digits_dit.py": (*TINY, *DIT),
    "digits_mean_flow.py": (*TINY, NETWORK.replace("}", ", 'conditions': ('r', 'guidance')}")),
    "student": STUDENT,
}


def config_file(base):
    return f"{ROOT}/configs/{'digits.py' if base == 'student' else base}"


def config_of(base):
    """The config of one of BASES, without its flags, as nested dicts."""
    path, _, argument = config_file(base).partition(":")
    return runpy.run_path(path)["get_config"](*filter(None, [argument])).to_dict()


CONFIGS = {base: config_of(base) for base in BASES}
# The sections that name a part, and the family it is of.
SECTIONS = {
    "data": "data", "network": "networks", "objective": "objectives", "sampler": "samplers", "guidance": "guidance",
    "sampler.grid": "grids", "objective.schedule": "schedules", "objective.parameterization": "parameterization",
    "objective.time_sampler": "time_sampling", "objective.weighting": "weighting",
}  # fmt: skip
SYNTAX = (
    "--config.", "--config..x=1", "--config.train.steps", "--noconfig.train.steps", "--config.train=", "stray", "",
    "-config.train.steps=0", "--config.ema.decays[0]=2", "--config.seed=", "--config.train.steps=1=2", "--config",
    "--config.ema.decays=0.5", "--config.network.width=8 --config.seed=1", "--", "-", "=", "--=1",
)  # fmt: skip


@st.composite
def part_flags(draw):
    """A part of a family with a keyword of its own, or one that it does not have, at any value."""
    section = draw(st.sampled_from(sorted(SECTIONS)))
    name = draw(st.sampled_from([name for name in names(SECTIONS[section]) if name != "tfds"]))
    parameters = inspect.signature(find(SECTIONS[section], name, field="")).parameters
    chosen = draw(st.lists(st.sampled_from(sorted(parameters)), max_size=3)) if parameters else []
    keywords = {key: draw(for_parameter(parameters[key])) for key in chosen}
    keywords |= draw(st.dictionaries(keys, values, max_size=1)) if draw(st.integers(0, 5)) == 5 else {}
    more = {"steps": 2} if section == "sampler" else {}
    return [f"--config.{section}={ {'name': name, **more, **keywords}!r}"]


@st.composite
def train_flags(draw):
    """A config and one or two things that are wrong with it, perhaps."""
    base = draw(st.sampled_from(sorted(BASES)))
    known = [path for path in paths(CONFIGS[base]) if path and not isinstance(path[-1], int)]

    def override():
        path = draw(st.sampled_from(known))
        at = functools.reduce(lambda section, key: section[key], path, CONFIGS[base])
        value = draw(values if draw(st.integers(0, 4)) == 4 else like(at))
        return f"--config.{'.'.join(path)}={spelled(value)}"

    kinds = {
        "override": lambda: [override() for _ in range(draw(st.integers(1, 2)))],
        "part": lambda: draw(part_flags()),
        "key": lambda: [f"--config.{'.'.join(draw(st.sampled_from(known)))}{draw(text)}={spelled(draw(scalars))}"],
        "syntax": lambda: [draw(st.sampled_from(SYNTAX))],
    }
    wrong = kinds[draw(st.sampled_from(["override"] * 5 + ["part"] * 5 + ["key", "syntax"]))]()
    return base, wrong, draw(st.booleans())


def wrong(*given, base="digits.py", check=True):
    """An example of `test_overrides_of_a_config`."""
    return example(given=(base, [f"--config.{flag}" for flag in given], check))


# Of each number that is absurd, of each kind of fault that was found, and of names that would lead out of the workdir.
@wrong("sampler.eta=nan")
@wrong("guidance.scale=inf")
@wrong("train.steps=9223372036854775808")
@wrong("train.batch_size=1000000000000")
@wrong("train.batch_size=2147483640", check=False)
@wrong("train.workers=2147483647", check=False)
@wrong("train.batch_size=12")
@wrong("objective.parameterization={'name': 'edm', 'sigma_data': 1000000}", base="mixture.py:vdm", check=False)
@wrong("network.width=1000000000")
@wrong("network.num_res_blocks=1000000000")
@wrong("network.channel_mult=(1, 1000000000)")
@wrong("network.mlp_ratio=1e-30", base="digits_dit.py")
@wrong("network={'name': 'uvit', 'kernel': 'cudnn', 'width': 16, 'depth': 3, 'num_heads': 2}")
@wrong("network={'name': 'unet', 'resample_filter': (1, 'a', 'a', 1)}")
@wrong("objective.schedule.num_steps=2147483647")
@wrong("data={'name': 'toy', 'size': 2147483647}", base="moons.py:sinkhorn")
@wrong("sampler.steps=2147483647")
@wrong("sampler.grid={'name': True}")
@wrong("guidance={'name': 'autoguidance', 'scale': 2.0}", base="moons.py:sinkhorn")
@wrong("seed=18446744073709551616")
@wrong("seed=-1")
@wrong("eval={}")
@wrong("eval.metrics={'svc_accuracy': 1}")
@wrong("eval.metrics={'svc_accuracy': {'num': 2147483647}}")
@wrong("eval.metrics={'../x': {}}")
@wrong("ema.decays=('../x',)")
@wrong("network.name=../x")
@wrong("checkpoint.keep_best=../x", check=False)
@wrong("objective.teacher=../x", base="student")
@wrong("data={'name': 'npy', 'path': '../x'}")
@wrong("data={'name': 'folder', 'path': '/none', 'size': 8, 'index': '../x'}")
@wrong("data={'name': 'array_record', 'path': '/etc'}")
@example(given=("digits.py", [""], False))
@fuzz(0.3)
@given(given=train_flags())
def test_overrides_of_a_config(jobs, place, given):
    base, wrong, check = given
    before = seen(place)
    replaced = tuple(flag.partition("=")[0] + end for flag in wrong for end in "=.")  # absl refuses both at once
    kept = [flag for flag in BASES[base] if not flag.startswith(replaced)]
    done = jobs["train"](f"--config={config_file(base)}", *kept, *wrong, "--workdir=new", *["--check"] * check)
    done.check()
    assert not (check and done.was_cut) and seen(place) == before


@pytest.mark.parametrize(
    ("job", "given", "message"),
    [
        ("train", "--config.seed=18446744073709551616", "config.seed: must be from 0 to 2^32 - 1, got 18446744"),
        ("train", "--config.eval={}", "eval.data: is missing"),
        ("train", "--config.eval.metrics={'x': {}}", "eval.metrics: no 'x' in evaluation; one of"),
        ("train", "--config.eval.metrics={'svc_accuracy': {'nun': 2}}", "eval.metrics.svc_accuracy.nun: "),
        ("train", "--config.train.batch_size=12", "train.batch_size: 12 examples cannot be divided over"),
        ("train", "--config.sharding.rules=(('[', ('fsdp',)),)", "sharding.rules[0]: '[' is no regular expression"),
        ("train", "--config.sharding.rules=(('a', (1,)),)", "sharding.rules: "),
        ("train", "--config.sampler.eta=nan", "sampler.eta: must be a finite number, in float32, got nan"),
        ("sample", "--seed=-1", "--seed: must be from 0 to 2^32 - 1, got -1"),
        ("sample", "--num=1000000000000000", "--num: must be at most 10,000,000, got 1000000000000000"),
        ("sample", "--steps=1000000000000", "--steps: must be at most 100,000, got 1000000000000"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused_is_named(jobs, place, job, given, message):
    config = [f"--config={ROOT}/configs/digits.py", "--check"] if job == "train" else []
    done = jobs[job](*config, given, f"--workdir={'run' if job == 'sample' else 'new'}")
    assert done.code == 2 and done.err.startswith(f"error: {message}"), done.err


def test_check_says_what_would_be_trained(jobs, place):
    done = jobs["train"](f"--config={ROOT}/configs/digits.py", "--workdir=new", "--check")
    devices = f"{jax.device_count()} device{'s' * (jax.device_count() > 1)}"
    expected = f"new: 756,417 parameters on {devices}, 2,000 steps of 128 of the 1,500 examples; nothing written\n"
    assert (done.code, done.out, done.err, done.wrote) == (0, expected, "", []) and not (place / "new").exists()


def test_check_traces_the_step(jobs, place, monkeypatch):
    """What only a step would meet is refused as well."""

    def loss(*_):
        raise InputError("objective.loss", "cannot be")

    monkeypatch.setattr(DDPM, "loss", loss)
    done = jobs["train"](f"--config={ROOT}/configs/digits.py", *BASES["digits.py"], "--workdir=new", "--check")
    assert (done.code, done.err) == (2, "error: objective.loss: cannot be\n")


# Sampling, measuring and the other jobs: their flags.


@st.composite
def part_text(draw, family):
    """`heun:churn=40`, with keywords of the part."""
    name = draw(st.sampled_from(names(family)))
    parameters = inspect.signature(find(family, name, field="")).parameters
    pairs = [(key, draw(for_parameter(parameters[key]))) for key in parameters if draw(st.integers(0, 3)) == 3]
    return ":".join([name, *(f"{key}={spelled(value)}" for key, value in pairs)])


def several(strategy, separator=","):
    return st.lists(strategy, max_size=3).map(separator.join)


def axis(name):
    return several(AXES[name]).map(lambda values: f"{name}={values}")


counts = ints.map(str)
numbers = st.one_of(floats, scalars).map(spelled)
AXES = {
    "sampler": part_text("samplers"), "grid": part_text("grids"), "guidance": st.one_of(numbers, part_text("guidance")),
    "steps": counts, "evaluations": counts, "unroll": counts, "rescale": numbers, "threshold": numbers,
    "interval": several(st.one_of(numbers, st.sampled_from(("sigma", "t")))),
}  # fmt: skip
DRAWING = {
    "seed": counts, "batch_size": counts, "ema": st.sampled_from(("0.99", "none", "0.9", "../0.99", "", "é")),
}  # fmt: skip
FLAGS = {
    "sample": {
        **AXES, **DRAWING, "num": counts, "labels": several(counts), "metrics": st.sampled_from(("true", "false", "7")),
        "sweep": several(st.sampled_from(sorted(AXES)).flatmap(axis), ";"),
    },
    "evaluate": {**DRAWING, "steps": counts},
    "compare": {
        **DRAWING, "num": counts, "nfe": several(counts), "docs": st.sampled_from(("none.md", "run", "")),
        "runs": several(st.sampled_from(("run", "student", "none", "run/", "../run", ""))),
    },
    "convert": {
        "from": st.sampled_from(("run", "none", "run/checkpoints", "run/config.json", "")), "step": counts,
        "ema": DRAWING["ema"], "null_class": st.sampled_from(("true", "x")),
    },
    "inspect_data": {"num": counts},
    "goodput": {},
}  # fmt: skip
NEEDED = {
    "compare": ["--runs=run,student"], "convert": ["--from=run", "--to=new"],
    "inspect_data": [f"--config={config_file('digits.py')}"],
}  # fmt: skip


@st.composite
def job_flags(draw):
    job = draw(st.sampled_from(["sample"] * 6 + sorted(FLAGS)))
    chosen = draw(st.lists(st.sampled_from(sorted(FLAGS[job])), max_size=3, unique=True)) if FLAGS[job] else []
    right = {name: draw(st.integers(0, 4)) for name in chosen}  # mostly of the right kind
    given = [f"--{name}={draw(FLAGS[job][name] if right[name] else scalars.map(spelled))}" for name in chosen]
    if draw(st.integers(0, 9)) == 9:
        given.append(draw(st.one_of(text, st.sampled_from(SYNTAX), text.map("--{}".format))))
    workdirs = ("student", "none", "", "run/config.json", "run/checkpoints", "../run")
    return job, given, draw(st.sampled_from(("run",) * 6 + workdirs))


def bad_flags(job, *given, workdir="run"):
    """An example of `test_flags_of_the_other_jobs`."""
    return example(given=(job, [f"--{flag}" for flag in given], workdir))


@bad_flags("sample", "num=1000000000000000")
@bad_flags("sample", "batch_size=1000000000000")
@bad_flags("sample", "seed=9223372036854775808")
@bad_flags("sample", "seed=-1")
@bad_flags("sample", "steps=1000000000000")
@bad_flags("sample", f"steps={'9' * 5000}")
@bad_flags("sample", f"labels={'9' * 5000}")
@bad_flags("sample", "evaluations=1000000000000")
@bad_flags("sample", "unroll=1000000000000")
@bad_flags("sample", "sweep=steps=1000000000000")
@bad_flags("sample", "guidance=nan")
@bad_flags("sample", "sampler=../x")
@bad_flags("sample", "ema=../../x")
@bad_flags("sample", "", workdir="")
@bad_flags("evaluate", "seed=18446744073709551616")
@bad_flags("evaluate", "steps=1000000000000")
@bad_flags("compare", "nfe=1000000000000")
@bad_flags("inspect_data", "num=1000000000000000")
@fuzz(0.36)
@given(given=job_flags())
def test_flags_of_the_other_jobs(jobs, place, given):
    job, wrong, workdir = given
    before = seen(place)
    jobs[job](*NEEDED.get(job, [f"--workdir={workdir}"]), *wrong).check()
    assert seen(place) == before


def test_sampling_needs_the_checkpoint_alone(jobs, place):
    """Without the config, which is gone; what it writes lies in its folder."""
    done = jobs["sample"]("--workdir=run", "--num=2", "--steps=1", "--guidance=1", "--out=samples", cut=False)
    assert done.code == 0 and done.wrote, done.err
    assert all(path.startswith(f"{place}/samples") for path in done.wrote)
    shutil.rmtree(place / "samples")


# What a checkpoint says of itself.

ABOUT = "checkpoints/1/about/metadata"
READERS = ("sample", "evaluate", "train")


@st.composite
def edits(draw):
    """Changes of a nested value, each at a place by its number among all places."""
    kinds = ("put", "put", "remove", "add", "replace", "replace", "replace")
    return [
        (draw(st.integers(0, 10**4)), draw(st.sampled_from(kinds)), draw(values), draw(keys),
         {int: draw(ints), float: draw(floats), str: draw(st.sampled_from(WORDS)), bool: draw(st.booleans())})
        for _ in range(draw(st.integers(1, 2)))
    ]  # fmt: skip


def edited(value, edit):
    number, kind, new, key, alike = edit
    value = json.loads(json.dumps(value))  # what was put there before is JSON too
    places = [path for path in paths(value) if path[:1] != ("arrays",)] * 3 + list(paths(value))  # most say little
    path = places[number % len(places)]
    if not path:
        return new
    above = functools.reduce(lambda inner, key: inner[key], path[:-1], value)
    if kind == "remove":
        del above[path[-1]]
    elif kind == "add" and isinstance(above[path[-1]], dict):
        above[path[-1]][key] = new
    else:
        above[path[-1]] = alike.get(type(above[path[-1]]), new) if kind == "replace" else new
    return value


@contextlib.contextmanager
def described(file, about, hashed):
    """A checkpoint that says this of itself, with the hash of it or with the one that it had."""
    before = file.read_bytes()
    if hashed and isinstance(about, dict):
        about["sha256"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(about))
    try:
        yield
    finally:
        file.write_bytes(before)


def description(place, run):
    """What a checkpoint says of itself, but for its hash."""
    about = json.loads((place / run / ABOUT).read_text())
    return {key: value for key, value in about.items() if key != "sha256"}


def read(jobs, job, run):
    """What a job makes of a run, which training would go on with."""
    more = [f"--config={config_file('digits.py')}", *DIGITS, "--config.train.steps=2"] if job == "train" else []
    return jobs[job](*more, f"--workdir={run}")


@fuzz(0.22)
@given(given=st.tuples(st.sampled_from(("run", "student")), edits(), st.integers(0, 7), st.sampled_from(READERS)))
def test_the_description_of_a_checkpoint(jobs, place, given):
    run, changes, hashed, job = given
    about = description(place, run)
    for change in changes:
        about = edited(about, change) if isinstance(about, dict) else about
    with described(place / run / ABOUT, about, hashed):
        before = seen(place)
        read(jobs, job, run).check()
        assert seen(place) == before


@pytest.mark.parametrize(
    ("way", "value", "message"),
    [
        (("format",), ..., "format"),
        (("meta",), ..., "damaged"),
        (("meta", "config"), ..., "does not say what was trained"),
        (("meta", "config", "train"), ..., "config.train: is missing"),
        (("meta", "config", "train"), 3, "damaged"),
        (("meta", "config", "eval"), {}, "eval.data: is missing"),
        (("meta", "config", "network", "width"), -4, "network.width: must be positive"),
        (("meta", "config", "network", "width"), 6, "was trained with another network"),
        (("meta", "config", "nothing"), {}, "config.nothing: no such section"),
        (("meta", "spec"), [], "damaged"),
        (("meta", "spec", "shape"), [-8, 8, 1], "spec: describes no data"),
        (("meta", "spec", "shape"), [10**9, 8, 1], "spec.shape: must be at most"),
        (("meta", "spec", "nothing"), 1, "spec.nothing"),
        (("meta", "teacher"), {}, "does not say what was trained"),
        (("position",), {"examples": "8"}, "damaged"),
        (("arrays", "params/net/linear_in/bias"), 3, "damaged"),
        (("arrays", "params/net/linear_in/bias"), [["4"], "float32", 0], "damaged"),
    ],
    ids=str,
)
def test_a_description_is_held_against_what_it_must_be(jobs, place, way, value, message):
    """Whoever can write it can make its hash."""
    about = description(place, "run")
    above = functools.reduce(lambda inner, key: inner[key], way[:-1], about)
    if value is ...:
        del above[way[-1]]
    else:
        above[way[-1]] = value
    with described(place / "run" / ABOUT, about, hashed=True):
        done = read(jobs, "sample", "run")
    done.check()
    assert done.code == 2 and message in done.err, done.err


# The files and folders of a checkpoint.

FOLDERS = ("abc", "-5", "0", "2", "01", "1.5", "9" * 25, "2.orbax-checkpoint-tmp", "é", "..2", "1 ", "2147483648")


@st.composite
def damages(draw):
    """What is done to a workdir, in order."""
    kinds = st.sampled_from(("put", "put", "cut", "remove", "folder", "file", "link", "rename"))
    content = st.one_of(values.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40))
    return [
        (draw(kinds), draw(st.integers(0, 100)), draw(st.sampled_from(FOLDERS)), draw(content))
        for _ in range(draw(st.integers(1, 3)))
    ]


def damage(run, kind, number, name, content):
    known = sorted(path for path in run.rglob("*") if not path.is_dir() and path.exists())
    if not known:
        return
    telling = [path for path in known if "metadata" in path.name.lower() or path.suffix in (".ocdbt", ".jsonl")]
    file = (telling * 4 + known)[number % (len(telling) * 4 + len(known))]
    new = run / "checkpoints" / name
    if kind == "put":
        file.write_bytes(content)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[: number * 7])
    elif kind == "remove":
        (shutil.rmtree if number % 2 else os.remove)(file.parent if number % 2 else file)
    elif kind == "rename":
        (run / "checkpoints/1").rename(new)
    elif kind == "folder":
        new.mkdir()
    elif kind == "file":
        new.write_bytes(content)
    else:
        new.symlink_to((run, "1", new, "/none")[number % 4])


@contextlib.contextmanager
def copied(place):
    """A copy of the run, to do with as one likes."""
    run = place / "damaged"
    shutil.copytree(place / "run", run)
    try:
        yield run
    finally:
        shutil.rmtree(run, ignore_errors=True)


@fuzz(0.12)
@given(given=st.tuples(damages(), st.sampled_from((*READERS, "goodput"))))
def test_the_files_of_a_checkpoint(jobs, place, given):
    what, job = given
    with copied(place) as run:
        for one in what:
            with contextlib.suppress(OSError):  # what was done before may be in the way
                damage(run, *one)
        before = seen(place)
        read(jobs, job, "damaged").check()
        assert seen(place) == before


@pytest.mark.parametrize(
    ("file", "content", "job", "message"),
    [
        ("checkpoints/1/_CHECKPOINT_METADATA", b"0", "sample", "metadata is damaged"),
        ("checkpoints/1/about/metadata", b"0", "sample", "damaged"),
        ("checkpoints/1/params/_METADATA", b"[]", "train", "damaged"),
        ("goodput.jsonl", b'{"attempt": 1}\n[]\n{"attempt": [], "step": "1"}\n', "goodput", "no whole line"),
    ],
    ids=str,
)
def test_a_file_that_is_no_such_thing(jobs, place, file, content, job, message):
    with copied(place) as run:
        (run / file).write_bytes(content)
        done = read(jobs, job, "damaged")
    done.check()
    assert done.code == 2 and message in done.err, done.err


def test_arrays_that_cannot_be_read_are_told_of_in_one_line(jobs, place):
    """Orbax reads many at once: where one fails, the others do so later, each with a traceback."""
    for _ in range(3):
        with copied(place) as run:
            for file in (run / "checkpoints/1/ema/d").iterdir():
                file.write_bytes(file.read_bytes()[:100])
            done = read(jobs, "sample", "damaged")
        done.check()
        assert done.code == 2 and "damaged" in done.err
