"""The public Python API: what importing it does, and the examples that show it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import diffusion as df
from diffusion.core.build import build
from tests.jobs import job
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SIDE_EFFECTS = """
import os, signal, sys, time
environment, handlers = dict(os.environ), [signal.getsignal(number) for number in signal.valid_signals()]
start = time.perf_counter()
import diffusion
seconds = time.perf_counter() - start
assert dict(os.environ) == environment and not {"jax", "numpy", "absl"} & set(sys.modules)
for name in dir(diffusion):
    getattr(diffusion, name)
from absl import flags
assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
assert not [module for module in flags.FLAGS.flags_by_module_dict() if module.startswith("diffusion")]
print(seconds)
"""
EXAMPLE = """
import sys
import jax
import jax.numpy as jnp
import diffusion as df

digits = df.load(sys.argv[1])
x = digits.sample(num=16, labels=[3], sampler="unipc", steps=20, guidance=1.5)
assert x.shape == (16, 8, 8, 1)

trainer = df.Trainer(source={"name": "toy", "kind": "moons"}, network={"name": "mlp", "width": 16, "depth": 1},
                     objective="flow_matching", batch_size=16)
trainer.fit(steps=4)
assert df.sample(trainer, num=3, steps=4).shape == (3, 2)

def linear(shape):
    return df.Network(lambda key: {"w": jnp.zeros(shape)}, lambda params, x, c_noise, cond, key=None: params["w"] * x)

trainer = df.Trainer(source={"name": "toy", "kind": "moons"}, network=linear, objective="flow_matching", batch_size=16)
trainer.fit(steps=4)
assert df.sample(trainer, num=3, steps=4).shape == (3, 2)
assert "experiments" not in sys.modules and "launch" not in sys.modules
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A short run on digits, made by the job."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    done = job("train", f"--config={ROOT}/configs/digits.py", "--config.train.steps=2", "--config.train.batch_size=16",
               "--config.network={'name': 'mlp', 'width': 32, 'depth': 1}", "--config.train.preview_every=0",
               f"--workdir={path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path


def test_importing_has_no_side_effects():
    """`import diffusion` takes at most 0.1 s, and not even using all its names defines flags or changes anything."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SIDE_EFFECTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1


def test_a_run_is_what_the_job_trained(workdir, tmp_path):
    run = df.load(str(workdir))
    done = job("sample", f"--workdir={workdir}", "--num=7", "--steps=3", "--labels=3,1", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    x = run.sample(num=7, steps=3, labels=[3, 1])
    np.testing.assert_array_equal(df.images.to_uint8(x), np.load(tmp_path / "samples.npz")["arr_0"])
    assert run.step == 2 and run.ema == "0.998" and run.config["network"]["width"] == 32
    denoised = run.denoiser(label=np.array([3, 1]))(x[:2], np.float32(0.5))
    assert denoised.x0.shape == (2, 8, 8, 1) and run.network.apply and run.params["net"]


def test_settings_share_what_is_compiled(workdir):
    run = df.load(str(workdir))
    for guidance, labels, seed in ((2.0, [1], 0), (3.0, [2], 1)):
        run.sample(num=4, steps=2, guidance=guidance, labels=labels, seed=seed)
    assert len(run._generators) == 1 and next(iter(run._generators.values())).compilations == 1


def test_parts_may_be_objects_names_or_functions(workdir):
    """The same sampler and guidance given as a name, a section, an object and a function draw the same samples."""
    run, guidance = df.load(str(workdir)), build_guidance(2.0)
    expected = run.sample(num=4, sampler="heun", steps=3, guidance=2.0)
    for sampler in ({"name": "heun"}, build("samplers", "heun"), "diffusion.sampling.samplers.heun:make"):
        np.testing.assert_array_equal(run.sample(num=4, sampler=sampler, steps=3, guidance=2.0), expected)
    np.testing.assert_allclose(run.sample(num=4, sampler="heun", steps=3, guidance=guidance), expected, atol=1e-5)


def build_guidance(scale):
    from diffusion.sampling.guidance import cfg

    return lambda denoise: cfg(denoise, scale)


@pytest.mark.slow
def test_a_trainer_without_names_is_loaded_with_its_objects(tmp_path, digits):
    network = df.build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=(8, 8, 1), num_classes=10)
    objective = df.build("objectives", "flow_matching")
    trainer = df.Trainer(digits, network, objective, workdir=str(tmp_path), batch_size=16)
    trainer.fit(2)
    run = df.load(str(tmp_path), network=network, objective=objective)
    np.testing.assert_array_equal(run.sample(4, steps=2), df.sample(trainer, 4, steps=2))
    with refused("network"):
        df.load(str(tmp_path))


def linear(shape, scale: float = 1.0):
    """A network outside of the library, for `"tests.test_api:linear"`."""
    return df.Network(lambda key: {"w": jax.numpy.full(shape, scale)}, lambda params, x, *_, key=None: params["w"] * x)


@pytest.mark.slow
def test_parts_of_other_packages_are_imported_only_if_allowed(tmp_path, digits):
    trainer = df.Trainer(digits, {"name": linear, "scale": 0.5}, "flow_matching", workdir=str(tmp_path), batch_size=16)
    trainer.fit(1)
    name = f"{linear.__module__}:linear"
    assert trainer.meta["config"]["network"] == {"name": name, "scale": 0.5}
    with refused("workdir"):
        df.load(str(tmp_path))
    sys.modules.setdefault(linear.__module__, sys.modules[__name__])
    for allow_imports in (True, {name}):
        assert df.load(str(tmp_path), allow_imports=allow_imports).sample(4, steps=2).shape == (4, 8, 8, 1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"labels": [10]}, "labels"),
        ({"num": 0}, "num"),
        ({"sampler": "dimm"}, "sampler.name"),
        ({"steps": 0}, "sampler.steps"),
        ({"guidance": "cfgg"}, "guidance.name"),
        ({"grid": {"name": "karras", "rhoo": 3}}, "sampler.grid.rhoo"),
    ],
)
def test_bad_arguments_name_their_field(workdir, options, field):
    with refused(field):
        df.load(str(workdir)).sample(**options)


def test_unknown_names():
    with pytest.raises(AttributeError):
        df.nothing  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path):
    """Runs the code cells of a notebook in order, with fewer steps."""
    namespace: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            exec(compile(code, str(path), "exec"), namespace)
            if "STEPS" in code:
                namespace["STEPS"] = min(namespace["STEPS"], 20)
    jax.clear_caches()


@pytest.mark.slow
def test_an_installed_package_needs_no_checkout(tmp_path, workdir):
    """`pip install .` installs the packages that users run and import; the example and jobs run elsewhere."""
    source, target = tmp_path / "source", tmp_path / "site"  # a copy, since building leaves files in the source
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "build"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(pip, check=True, cwd=tmp_path)
    installed = {path.name for path in target.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")}
    assert installed == {"configs", "diffusion", "experiments", "launch"}
    training = [f"--config={target}/configs/digits.py", f"--workdir={tmp_path}/new"]
    for command in (
        ["-c", EXAMPLE, str(workdir)],
        ["-m", "experiments.train", *training, "--check"],
        ["-m", "launch.run", "--dry_run", "--launcher=slurm", "--", "train", *training],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(target)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
