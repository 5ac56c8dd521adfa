"""Random invalid input: every job ends with exit code 0, or with 2 and one line, and writes nothing.

The jobs run in this process through `cli.run`. They are cut off where they would start to write or to draw samples,
since everything that can be refused is refused before. `make fuzz` tries 2,500 random examples, other runs fixed ones.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import sys
import typing

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from diffusion.core import files
from diffusion.core.build import find, names
from diffusion.core.types import InputError
from diffusion.objectives.denoising import Denoising
from diffusion.pipelines.config import read_config
from diffusion.pipelines.generator import Generator
from experiments import cli

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("FUZZ", 40))
SECONDS, MEMORY = 60, 8 * 2**30  # limits of an example, so that endless loops and gigantic arrays fail
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
    """Returns the settings of a test that runs a share of all examples."""
    return settings(
        max_examples=max(1, round(share * EXAMPLES)), derandomize="FUZZ" not in os.environ, deadline=None,
        database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
    )  # fmt: skip


# The jobs, in this process.


class Reached(Exception):
    """The job has accepted its input, and would start to write or to draw samples."""


def reached(*_, **__):
    raise Reached


@dataclasses.dataclass(frozen=True)
class Done:
    """How a job ended, and what it wrote."""

    code: int
    out: str
    err: str
    was_cut: bool
    wrote: list[str]

    def check(self):
        """Checks for success, or one line that names a field; nothing is written in either case."""
        lines = [line for line in self.err.splitlines() if not line.startswith("warning: ")]
        assert self.wrote == []
        if self.code == 0:
            assert lines == []
            return
        assert self.code == 2 and len(lines) == 1 and self.out == "", (self.code, self.err, self.out)
        assert re.match(r"error: (flag |Flag |Unknown command line flag )?\S.*(: | ).*\S", lines[0]), lines[0]


class Job:
    """`experiments.NAME`. Its flags exist while it runs, since those of two jobs may have the same name."""

    def __init__(self, name):
        before, self.name = set(flags.FLAGS), name
        sys.modules.pop("experiments.sampling_flags", None)  # two jobs define these flags
        cli._config = None
        self.main, self.config = importlib.import_module(f"experiments.{name}").main, cli._config
        self.flags = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - before}
        self._remove()

    def _remove(self):
        for name in self.flags:
            delattr(flags.FLAGS, name)

    def __call__(self, *given, cut=True):
        for name, flag in self.flags.items():
            flags.FLAGS[name] = flag
        cli._config = self.config
        if self.config:
            self.config.overrides.clear()
            self.config.__dict__.pop("value", None)
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
                    patch.setattr(Generator, "batches", reached)
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
    """Applies the limits of an example."""

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


WATCHES = []  # lists that receive the paths of what is written
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
    """Yields a list that receives the absolute paths of what is written, created, moved or removed."""
    WATCHES.append([])
    try:
        yield WATCHES[-1]
    finally:
        WATCHES.pop()


@pytest.fixture(scope="module")
def jobs():
    return {name: Job(name) for name in ("train", *FLAGS)}


def seen(folder):
    """Returns every path in a folder with its time of modification and size."""
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in pathlib.Path(folder).rglob("*")}


@pytest.fixture(scope="module")
def place(tmp_path_factory, jobs):
    """The working directory of all jobs, with a trained run and a student of it."""
    folder = tmp_path_factory.mktemp("place")
    with contextlib.chdir(folder):
        for workdir, given in (("run", DIGITS), ("student", STUDENT)):
            done = jobs["train"](f"--config={ROOT}/configs/digits.py", *given, f"--workdir={workdir}", cut=False)
            assert done.code == 0, done.err
            assert done.wrote and all(path.startswith(f"{folder}/{workdir}") for path in done.wrote)
        yield folder


# Values.

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
    """Returns values of the type of a value, which are accepted more often."""
    for kind, strategy in LIKE.items():
        if isinstance(value, kind):
            return strategy
    return st.lists(ints if 2 in value or 4 in value else floats, max_size=4).map(tuple) if value else values


def for_parameter(parameter):
    """Returns values that suit the annotation or default of a keyword."""
    options = typing.get_args(parameter.annotation)
    if typing.get_origin(parameter.annotation) is typing.Literal:
        return st.sampled_from(options)
    if parameter.default not in (inspect.Parameter.empty, None):
        return like(parameter.default)
    return {int: ints, float: floats, str: st.sampled_from(WORDS)}.get((*options, parameter.annotation)[0], values)


def spelled(value):
    """Returns a value as text, as on a command line."""
    return value if isinstance(value, str) else repr(value)


def paths(value, above=()):
    """Yields the paths to everything in nested dicts and lists."""
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
    "digits_mean_flow.py": (*TINY, NETWORK.replace("}", ", 'scalar_conditions': ('step_size', 'guidance_scale')}")),
    "student": STUDENT,
}


def config_file(base):
    return f"{ROOT}/configs/{'digits.py' if base == 'student' else base}"


def config_of(base):
    """Returns the resolved config of one of BASES, without its flags."""
    return read_config(config_file(base))


CONFIGS = {base: config_of(base) for base in BASES}
# The sections that name a part, and its family.
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
    """A part with any value for one of its keywords, or for a keyword that it does not have."""
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
    """A config, and overrides that may be invalid."""
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
    """Adds an example to `test_overrides_of_a_config`."""
    return example(given=(base, [f"--config.{flag}" for flag in given], check))


@pytest.mark.slow
# Absurd numbers, faults that were found earlier, and names that lead out of the workdir.
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
@wrong("network={'name': 'unet', 'resample_filter': (1, 'a', 'a', 1)}")
@wrong("objective.schedule.num_steps=2147483647")
@wrong("data={'name': 'toy', 'size': 2147483647}", base="moons.py:sinkhorn")
@wrong("sampler.steps=2147483647")
@wrong("sampler.grid={'name': True}")
@wrong("guidance={'name': 'autoguidance', 'scale': 2.0}", base="moons.py:sinkhorn")
@wrong("seed=18446744073709551616")
@wrong("seed=-1")
@wrong("optimizer.mask={'G': -7.8e-284}", base="digits_mean_flow.py")
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
    ("job", "given", "field"),
    [
        ("train", "--config.seed=18446744073709551616", "--config.seed"),
        ("train", "--config.eval.metrics={'x': {}}", "eval.metrics"),
        ("train", "--config.eval.metrics={'svc_accuracy': {'nun': 2}}", "eval.metrics.svc_accuracy.nun"),
        ("train", "--config.train.batch_size=12", "train.batch_size"),
        ("train", "--config.sharding.rules=(('[', ('fsdp',)),)", "sharding.rules[0]"),
        ("train", "--config.sharding.rules=(('a', (1,)),)", "sharding.rules"),
        ("train", "--config.sampler.eta=nan", "sampler.eta"),
        ("sample", "--seed=-1", "--seed"),
        ("evaluate", "--seed=-1", "--seed"),
        ("sample", "--num=1000000000000000", "--num"),
        ("sample", "--steps=1000000000000", "--steps"),
    ],
    ids=str,
)
def test_refusals_name_their_field(jobs, place, job, given, field):
    config = [f"--config={ROOT}/configs/digits.py", "--check"] if job == "train" else []
    done = jobs[job](*config, given, f"--workdir={'run' if job == 'sample' else 'new'}")
    assert done.code == 2 and done.err.startswith(f"error: {field}: "), done.err


def test_check_prints_one_line(jobs, place):
    done = jobs["train"](f"--config={ROOT}/configs/digits.py", "--workdir=new", "--check")
    assert (done.code, done.err, done.wrote) == (0, "", []) and not (place / "new").exists()
    assert done.out.count("\n") == 1 and "756,417 parameters" in done.out


def test_check_traces_the_step(jobs, place, monkeypatch):
    """Errors that only a step meets are found as well."""

    def loss(*_):
        raise InputError("objective.loss", "cannot be")

    monkeypatch.setattr(Denoising, "loss", loss)
    done = jobs["train"](f"--config={ROOT}/configs/digits.py", *BASES["digits.py"], "--workdir=new", "--check")
    assert (done.code, done.err) == (2, "error: objective.loss: cannot be\n")


# The flags of the other jobs.


@st.composite
def part_text(draw, family):
    """A text such as `heun:churn=40`, with keywords of the part."""
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
    "evaluate": {**AXES, **DRAWING},
    "compare": {
        **DRAWING, "num": counts, "nfe": several(counts), "docs": st.sampled_from(("none.md", "run", "")),
        "runs": several(st.sampled_from(("run", "student", "none", "run/", "../run", ""))),
    },
    "convert": {
        "from": st.sampled_from(("run", "none", "run/checkpoints", "run/config.json", "")), "step": counts,
        "ema": DRAWING["ema"], "null_class": st.sampled_from(("true", "x")),
        "shift": st.sampled_from(("true", "x")),
    },
    "inspect_data": {"num": counts},
    "goodput_report": {},
}  # fmt: skip
NEEDED = {
    "compare": ["--runs=run,student"], "convert": ["--from=run", "--to=new"],
    "inspect_data": [f"--config={config_file('digits.py')}"],
}  # fmt: skip


@st.composite
def job_flags(draw):
    job = draw(st.sampled_from(["sample"] * 6 + sorted(FLAGS)))
    chosen = draw(st.lists(st.sampled_from(sorted(FLAGS[job])), max_size=3, unique=True)) if FLAGS[job] else []
    right = {name: draw(st.integers(0, 4)) for name in chosen}  # values are mostly of the right kind
    given = [f"--{name}={draw(FLAGS[job][name] if right[name] else scalars.map(spelled))}" for name in chosen]
    if draw(st.integers(0, 9)) == 9:
        given.append(draw(st.one_of(text, st.sampled_from(SYNTAX), text.map("--{}".format))))
    workdirs = ("student", "none", "", "run/config.json", "run/checkpoints", "../run")
    return job, given, draw(st.sampled_from(("run",) * 6 + workdirs))


def bad_flags(job, *given, workdir="run"):
    """Adds an example to `test_flags_of_the_other_jobs`."""
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


def test_sampling_writes_to_its_folder_only(jobs, place):
    done = jobs["sample"]("--workdir=run", "--num=2", "--steps=1", "--guidance=1", "--out=samples", cut=False)
    assert done.code == 0 and done.wrote, done.err
    assert all(path.startswith(f"{place}/samples") for path in done.wrote)
    shutil.rmtree(place / "samples")


# Corrupt files of a checkpoint.


@st.composite
def corruptions(draw):
    """Changes of a workdir's files, in order."""
    kinds = st.sampled_from(("put", "put", "cut", "remove"))
    content = st.one_of(values.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40))
    return [(draw(kinds), draw(st.integers(0, 100)), draw(content)) for _ in range(draw(st.integers(1, 3)))]


def corrupt(run, kind, number, content):
    known = sorted(path for path in run.rglob("*") if path.is_file())
    if not known:
        return
    file = known[number % len(known)]
    if kind == "put":
        file.write_bytes(content)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[: number * 7])
    else:
        os.remove(file)


@fuzz(0.12)
@given(given=st.tuples(corruptions(), st.sampled_from(("sample", "train", "goodput_report"))))
def test_corrupt_files_of_a_checkpoint(jobs, place, given):
    """A corrupt checkpoint is refused in one line, and nothing of it is changed."""
    changes, job = given
    run = place / "corrupt"
    shutil.copytree(place / "run", run)
    try:
        for change in changes:
            corrupt(run, *change)
        before = seen(place)
        more = [f"--config={config_file('digits.py')}", *DIGITS, "--config.train.steps=2"] if job == "train" else []
        jobs[job](*more, "--workdir=corrupt").check()
        assert seen(place) == before
    finally:
        shutil.rmtree(run, ignore_errors=True)
