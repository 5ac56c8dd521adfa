"""What jobs meet outside of their own input: full and read-only disks, other locales, closed pipes, `~`, no backend.

Every job works or ends with exit code 2 and one line, and leaves nothing half-written.
"""

import importlib.util
import os
import pkgutil
import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

import experiments
import launch
from diffusion.pipelines import tables
from experiments import cli
from tests import disks
from tests.jobs import ROOT, job
from tests.tiers import slow_except

# The flags of each job: {run} is a trained run, {out} the place of its output, which has a sweep and a file for tables.
JOBS = {
    "experiments.benchmark": "--suite=loop --runs=1",
    "experiments.compare": "--runs={run} --nfe=2 --num=8 --out={out}/compare",
    "experiments.convert": "--from={unet} --to={out}/pipeline",
    "experiments.encode": "{config} --config.autoencoder.name=identity --out={out}/latents",
    "experiments.evaluate": "--workdir={run} --out={out}/evaluation",
    "experiments.fit_pca": "{config} --num=50 --out={out}/pca/pca.safetensors",
    "experiments.goodput_report": "--workdir={run}",
    "experiments.inspect_data": "{config} --num=4 --out={out}/data/data.png",
    "experiments.orders": "--samplers=ddim",
    "experiments.plan": "{config} --mesh_devices=1 --json={out}/plan/plan.json",
    "experiments.prepare_data": "{config} --out={out}/records",
    "experiments.sample": "--workdir={run} --num=30 --out={out}/samples",
    "experiments.sampler_table": "--workdirs={run} --num=8 --samplers=ddim --evaluations=2 --out={out}/table.md",
    "experiments.scaling_table": "--out={out}/table.md",
    "experiments.train": "{config} --workdir={out}/run",
    "launch.report": "--workdir={out}/sweep",
    "launch.run": "-- train {config} --workdir={out}/run",
    "launch.status": "--workdir={out}/sweep",
    "launch.sweep": "{config} --sweep={out}/points.py --workdir={out}/new",
}
# Without these, the benchmark takes minutes.
CONSTANTS = {"experiments.benchmark": {
    "diffusion.pipelines.benchmarks.LOOP_STEPS": 12, "diffusion.pipelines.benchmarks.LOOP_BATCH_SIZE": 8,
    "diffusion.pipelines.benchmarks.SMALL": {"name": "mlp", "width": 8, "depth": 1},
}}  # fmt: skip
NO_PATHS = {"experiments.benchmark", "experiments.orders"}
TPU = {"experiments.scaling_table"}  # refused without the compiler for TPUs; with it, it takes twenty minutes
WRITE_NOTHING = {"experiments.benchmark", "experiments.goodput_report", "experiments.orders", "launch.status"}
CONFIG = (
    "--config=configs/digits.py --config.train.steps=2 --config.train.batch_size=16 --config.optimizer.warmup=1 "
    "--config.train.preview_every=2 --config.sampler.steps=2 --config.network={'name':'mlp','width':8,'depth':1} "
    "--config.eval.metrics={'energy_distance':{'num':16}}"
)
UNET = CONFIG.replace(
    "'mlp','width':8,'depth':1",
    "'unet','width':8,'channel_mult':(1,),'num_res_blocks':1,'attention_resolutions':(8,),'head_dim':8,'groups':2",
)
SWEEP = "def sweep():\n    return [{'seed': 1}]\n"
DEFAULT = {("full disk", "experiments.prepare_data"), ("closed pipe", "experiments.fit_pca"),
           ("no backend", "experiments.train")}  # fmt: skip


def cases(*kinds, without=()):
    found = ((kind, name) for kind in kinds for name in JOBS if name not in without)
    return pytest.mark.parametrize(("kind", "name"), slow_except(DEFAULT, found))


def code(name):
    """Returns the exit code of a job that nothing hinders."""
    if name in TPU and importlib.util.find_spec("libtpu"):
        pytest.skip("takes twenty minutes")
    return 2 if name in TPU else 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns `runs(name)`, the workdir of a run that is trained when it is first needed."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name):
        workdir = folder / name
        if not workdir.exists():
            done = job("train", *(UNET if name == "unet" else CONFIG).split(), f"--workdir={workdir}")
            assert done.returncode == 0, done.stderr
        return workdir

    return make


def words(name, out, runs, config=CONFIG):
    """Returns the flags of a job."""
    text = JOBS[name].replace("{config}", config).replace("{out}", str(out))
    return [re.sub(r"\{(run|unet)\}", lambda found: str(runs(found[1])), word) for word in text.split()]


def prepare(out):
    """Writes to a folder what the jobs read from it."""
    (out / "points.py").write_text(SWEEP)
    (out / "table.md").write_text(f"{tables.BEGIN}\n{tables.END}\n")
    (out / "sweep").mkdir()
    (out / "sweep/sweep.json").write_text('{"launcher": "local", "points": [{"name": "a", "overrides": {}}]}')


def ends_well(done, codes):
    """Checks the exit code, and that an error is one line."""
    text = done.stderr
    assert done.returncode in codes and "Traceback" not in text and "Exception ignored" not in text, (text, done.stdout)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if done.args[0] != "launch.sweep":  # reports the errors of its runs in a table
        assert len(errors) == (done.returncode == 2), text


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@cases("full disk", "read-only disk", without=NO_PATHS)
def test_a_disk_that_cannot_be_written(kind, name, runs, tmp_path):
    out = tmp_path / "out"
    with disks.mounted(out, "256k") as remount:
        prepare(out)
        disks.fill(out)
        if kind == "read-only disk":
            remount("ro")
        before, given = contents(out), words(name, out, runs)
        done = job(name, *given)
        ends_well(done, [0] if name in WRITE_NOTHING else [2])
        assert contents(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "encode", "prepare_data", "sample"])
def test_a_disk_that_fills_up(name, runs, tmp_path):
    """What is new is complete or absent."""
    out = tmp_path / "out"
    with disks.mounted(out, "24k"):
        given = words(f"experiments.{name}", out, runs)
        given += {"sample": ["--out_format=png", "--num=300"], "prepare_data": ["--config.data.name=shapes"]}.get(
            name, []
        )
        done = job(name, *given)
        ends_well(done, [2])
        if name in ("convert", "prepare_data"):
            assert not list(out.iterdir())
        assert not list(out.rglob("*.partial"))


@cases("below a file", without=NO_PATHS)
def test_a_path_below_a_file(kind, name, runs, tmp_path):
    (tmp_path / "file").touch()
    reads_only = name in WRITE_NOTHING - {"launch.status"}
    ends_well(job(name, *words(name, tmp_path / "file", runs)), [0] if reads_only else [2])


@cases("closed pipe")
def test_output_that_nobody_reads(kind, name, runs, tmp_path):
    """The job does its work."""
    prepare(tmp_path)
    before, given = contents(tmp_path), words(name, tmp_path, runs)
    ends_well(job(name, *given, read=False, constants=CONSTANTS.get(name)), [code(name)])
    assert (contents(tmp_path) == before) == (name in WRITE_NOTHING | TPU)


@cases("home", without=NO_PATHS)
def test_paths_in_the_home_folder(kind, name, runs, tmp_path):
    prepare(tmp_path)
    before, given = contents(tmp_path), words(name, "~", runs)
    ends_well(job(name, *given, HOME=str(tmp_path)), [code(name)])
    assert (contents(tmp_path) == before) == (name in WRITE_NOTHING | TPU)
    assert not (ROOT / "~").exists()


@cases("no backend")
def test_a_backend_that_is_missing(kind, name, runs, tmp_path):
    prepare(tmp_path)
    given = words(name, tmp_path, runs)
    done = job(name, *given, JAX_PLATFORMS="cuda")
    ends_well(done, [0, 2])
    if name in ("experiments.train", "experiments.sample"):
        assert done.stderr.startswith("error: JAX_PLATFORMS: 'cuda' ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locale", "name"),
    [*(("ascii", name) for name in JOBS), ("latin-1", "experiments.inspect_data"), ("latin-1", "launch.status")],
)
def test_other_locales(locale, name, runs, tmp_path):
    """Classes and files may have names that the locale cannot encode; they are escaped."""
    data = tmp_path / "d\u00e4ta"
    for label in ("caf\u00e9", "\u732b"):
        (data / label).mkdir(parents=True)
        for index in range(20):
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(data / label / f"\u00fc{index}.png")
    data.rename(tmp_path / "data")
    prepare(tmp_path)
    folder = f"--config.data={{'name':'folder','path':'{tmp_path}/data','size':8}}"
    config = " ".join([*CONFIG.split()[:-1], folder])  # without metrics
    given = words(name, tmp_path, runs, config)
    variables = {"ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                 "latin-1": {"PYTHONIOENCODING": "latin-1"}}[locale]  # fmt: skip
    start = ["-m", name]
    if name in CONSTANTS:
        start = ["-c", f"import sys, tests.jobs as t; t.start({name!r}, sys.argv[1:], {CONSTANTS[name]})"]
    expected = [code(name)]
    done = subprocess.run(
        [sys.executable, *start, *given], cwd=ROOT, capture_output=True, text=True, errors="replace",
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **variables},
    )  # fmt: skip
    ends_well(done, expected)


def test_every_job_has_a_case_and_expands_its_paths():
    """A flag whose help speaks of a folder or a file is a path."""
    for package in (experiments, launch):
        for module in pkgutil.iter_modules(package.__path__):
            path, name = os.path.join(package.__path__[0], f"{module.name}.py"), f"{package.__name__}.{module.name}"
            with open(path, encoding="utf-8") as file:
                source = file.read()
            assert ('__name__ == "__main__"' in source) == (name in JOBS), name
            for kind, flag, text in re.findall(r'(\w+)\(\s*"(\w+)",\s*(?:[^"]*?,\s*)?f?"([^"]+)"', source):
                if kind.startswith("DEFINE") and re.match(r"(New |The |A )?(folder|file|workdir)", text, re.IGNORECASE):
                    raise AssertionError(f"{name}: --{flag} is a path; define it by cli.define_path")


def test_an_empty_path_is_refused(tmp_path):
    values = flags.FlagValues()
    cli.define_path("workdir", None, "Folder.", values)
    with pytest.raises(flags.Error, match="is empty"):
        values(["", "--workdir="])
    values(["", "--workdir=~/x"])
    assert values.workdir == os.path.expanduser("~/x")
