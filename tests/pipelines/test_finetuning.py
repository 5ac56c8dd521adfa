"""Fine-tuning of a pipeline of Stable Diffusion: its run, the buckets, resuming, the files, and students of the run."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs.common import CAPTIONED
from diffusion.core import trees
from diffusion.interop import diffusers_pipeline
from diffusion.pipelines.conversion import export_file, export_run, import_folder
from diffusion.pipelines.run import open_run
from tests.jobs import job
from tests.pipeline_folders import SIDE, UNET, write_captioned, write_pipeline

pytestmark = pytest.mark.slow  # each training compiles for a minute

STEPS = 100
TINY = {
    "data.size": SIDE, "data.buckets": 4, "autoencoder.dtype": "float32", "optimizer.learning_rate": 1e-2,
    "optimizer.warmup": 0, "ema.decays": (0.9,), "train.steps": STEPS, "train.batch_size": 4, "train.log_every": 1,
    "train.workers": 0, "checkpoint.every": STEPS // 2, "network.dtype": "float32", "network.remat": "none",
    **{f"network.{name}": value for name, value in UNET.items() if name != "name"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a pipeline and one of 20 images with captions, of two aspect ratios."""
    top = tmp_path_factory.mktemp("finetuning")
    return write_pipeline(top / "sd"), write_captioned(top / "images")


@pytest.fixture(scope="module")
def base(folders, tmp_path_factory):
    """The run that the pipeline is converted to."""
    workdir = str(tmp_path_factory.mktemp("runs") / "sd")
    done = job("convert", f"--from={folders[0]}", f"--to={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def tuned(folders, base, tmp_path_factory):
    """A run that starts from it, and the digests of the pipeline's files before the training."""
    workdir, before = str(tmp_path_factory.mktemp("runs") / "tuned"), digests(folders[0])
    train(folders, workdir, init_from=base)
    return workdir, before


def train(folders, workdir, config="sd15_finetune.py", **options):
    """Trains a shipped config for a tiny pipeline; in the names of options, `__` stands for a dot."""
    pipeline, images = folders
    options = {name.replace("__", "."): value for name, value in options.items()}
    given = TINY | {"data.path": images, "autoencoder.path": pipeline, "text_encoder.path": pipeline} | options
    flags = [f"--config.{name}={value}" for name, value in given.items()]
    done = job("train", f"--config=configs/{config}", *flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in pathlib.Path(folder).rglob("*") if path.is_file()}  # fmt: skip


def test_the_loss_falls_and_the_pipeline_is_not_changed(folders, base, tuned):
    workdir, before = tuned
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == STEPS and np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])
    assert digests(folders[0]) == before
    theirs, ours = (trees.by_path(open_run(path, "none").params) for path in (base, workdir))
    assert theirs.keys() == ours.keys() and all(np.any(theirs[path] != ours[path]) for path in ours)
    meta = open_run(workdir).meta
    assert meta["origin"]["step"] == 0 and meta["autoencoder"]["sha256"] and meta["text_encoder"]["sha256"]


def test_a_run_resumes_bit_for_bit(folders, base, tuned, tmp_path):
    workdir = str(tmp_path / "run")
    shutil.copytree(tuned[0], workdir)
    (last,) = [path for path in pathlib.Path(workdir).rglob(str(STEPS)) if path.is_dir()]
    shutil.rmtree(last)
    train(folders, workdir, init_from=base)
    for ema in ("none", None):
        runs = [trees.by_path(open_run(path, ema).params) for path in (tuned[0], workdir)]
        jax.tree.map(np.testing.assert_array_equal, *runs)


def test_the_result_becomes_a_folder(tuned, tmp_path):
    done = job("convert", f"--from={tuned[0]}", f"--to={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    model = diffusers_pipeline.read(str(tmp_path / "out")).model
    ours = trees.by_path(open_run(tuned[0]).params["net"])
    jax.tree.map(np.testing.assert_array_equal, trees.by_path(model.params), ours)


def test_the_text_encoder_is_trained_too(folders, base, tmp_path):
    """It starts from the folder, a dropped text is the empty one, and a folder and a file have what was learned."""
    workdir, before = str(tmp_path / "run"), digests(folders[0])
    options = {
        "text_encoder__trained": True,
        "train__steps": 2,
        "checkpoint__every": 2,
        "optimizer__learning_rate": 1e-3,
    }
    train(folders, workdir, init_from=base, **options)
    assert digests(folders[0]) == before
    run = open_run(workdir, "none")
    ours, start = (
        trees.by_path(params) for params in (run.params["net"]["text_encoder"], open_run(base).text_encoder.params)
    )
    assert ours.keys() == start.keys()
    moved = {path: np.abs(ours[path] - start[path]).max() for path in ours}
    assert all(0 < distance < 0.1 for distance in moved.values()), moved
    draw = {
        "prompts": ["a red circle", "two squares"],
        "guidance": 3.0,
        "steps": 2,
        "sampler": "ddim",
        "size": (16, 16),
    }
    x = run.sample(2, **draw)
    np.testing.assert_array_equal(run.sample(2, **draw, negative_prompt=""), x)
    assert np.abs(open_run(base).sample(2, **draw) - x).max() > 1e-3
    folder, file = str(tmp_path / "folder"), f"{tmp_path / 'model'}.safetensors"
    export_run(workdir, folder, ema="none")
    export_file(workdir, file, ema="none", dtype="float32")
    for written, tokenizer in ((folder, None), (file, folders[0])):
        import_folder(written, f"{written}_run", lambda *of: CAPTIONED, tokenizer=tokenizer)
        np.testing.assert_allclose(open_run(f"{written}_run").sample(2, **draw), x, atol=1e-4)


TABLE = {"name": "vp", "betas": "scaled_linear"}
EPS = {"name": "eps", "c_noise": "index"}
STUDENTS = {
    "latent_consistency": {"schedule": TABLE, "parameterization": EPS},
    "consistency": {"schedule": TABLE, "parameterization": {"name": "v", "c_noise": "index"}, "sigma_min": 0.0,
                    "solver": "ddim", "target": "average", "guidance": 3.0},
    "progressive_distillation": {"schedule": TABLE, "parameterization": EPS, "start_steps": 4, "round_steps": 1},
    "reflow": {"schedule": TABLE, "parameterization": EPS, "round_steps": 2, "pool": 8, "every": 1, "ode_steps": 2,
               "guidance": 3.0},
}  # fmt: skip
SAMPLERS = {
    "latent_consistency": ({"name": "lcm", "steps": 2}, {"name": "guidance_embedding", "scale": 7.5}),
    "consistency": ({"name": "consistency", "steps": 1}, {"name": "cfg"}),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_run_is_a_teacher(folders, base, tmp_path, name):
    """The loss of two steps is finite, and the text encoder and the null text are those of the teacher."""
    sampler, guidance = SAMPLERS.get(name, ({"name": "ddim", "steps": 2}, {"name": "cfg"}))
    options = {"network__scalar_conditions": ("guidance_scale",)} if name == "latent_consistency" else {}
    workdir = str(tmp_path / "student")
    train(
        folders, workdir, objective={"name": name, **STUDENTS[name], "teacher": base}, sampler=sampler,
        guidance=guidance, train__steps=2, data__buckets=None, **options,
    )  # fmt: skip
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(np.isfinite(json.loads(line)["loss"]) for line in lines)
    assert open_run(workdir).meta["teacher"]["step"] == 0
