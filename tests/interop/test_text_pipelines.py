"""Folders of text-to-image pipelines become runs that draw images from prompts, and refuse what is incomplete."""

import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs.common import CAPTIONED
from diffusion.interop import diffusers_pipeline, text_pipelines
from diffusion.pipelines.conversion import describe_folder, export_run, import_folder
from diffusion.pipelines.run import open_run
from tests.jobs import job, one_line
from tests.refusals import refused
from tests.sd_folders import KINDS, SIZE, UNET, model_of, write_pipeline
from tests.tiers import slow_except

# For each kind what follows from the folder: the sampler, its number of steps, and the guidance.
SAMPLING = {
    "sd15": ("pndm", 50, {"name": "cfg", "scale": 7.5}),
    "sd21": ("ddim", 50, {"name": "cfg", "scale": 7.5}),
    "sd_turbo": ("euler", 4, {"name": "cfg", "scale": 1.0}),
    "inpainting": ("pndm", 50, {"name": "cfg", "scale": 7.5}),
    "pix2pix": ("euler", 4, {"name": "cfg", "scale": 1.0}),
    "lcm": ("lcm", 4, {"name": "guidance_embedding", "scale": 8.5}),
    "sdxl": ("euler", 25, {"name": "cfg", "scale": 5.0}),
    "sdxl_turbo": ("euler_ancestral", 4, {"name": "cfg", "scale": 1.0}),
    "refiner": ("euler", 25, {"name": "cfg", "scale": 5.0}),
    "pixart": ("dpm_solver_pp", 25, {"name": "cfg", "scale": 4.5}),
    "pixart_sigma": ("dpm_solver_pp", 25, {"name": "cfg", "scale": 4.5}),
}  # fmt: skip


def base(*of):
    return CAPTIONED


def rewrite(path, **changes):
    """Changes entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Returns a function that returns the folder of a pipeline, which is written once."""
    root = tmp_path_factory.mktemp("pipelines")
    return lambda kind: root / kind if (root / kind).exists() else pathlib.Path(write_pipeline(root / kind, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_sections_that_follow_from_a_folder(kind, folder_of):
    folder = folder_of(kind)
    pipeline = diffusers_pipeline.read(str(folder), weights="named")
    assert (pipeline.kind, pipeline.scheduler) == (KINDS[kind][0], KINDS[kind][3]["_class_name"])
    assert pipeline.model.spec == model_of(kind).spec
    sampler, steps, guidance = SAMPLING[kind]
    assert (pipeline.sections["sampler"]["name"], pipeline.sections["sampler"]["steps"]) == (sampler, steps)
    assert pipeline.sections["guidance"] == guidance
    assert pipeline.sections["autoencoder"] == {"name": "kl", "path": str(folder / "vae")}
    text = pipeline.sections["text_encoder"]
    expected = {"sdxl": "joined", "sdxl_turbo": "joined", "pixart": "t5", "pixart_sigma": "t5"}.get(kind, "clip")
    assert text["name"] == expected and text["path"] == str(folder)
    assert text.get("length") == {"pixart": 120, "pixart_sigma": 300}.get(kind)
    assert text.get("part") == ("text_encoder_2" if kind == "refiner" else None)


def test_a_dry_run_says_what_a_folder_contains(folder_of, tmp_path):
    """Nothing is written, and the numbers of the weights are not read."""
    folder = shutil.copytree(folder_of("sdxl"), tmp_path / "folder")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    lines = dict(line.split(maxsplit=1) for line in describe_folder(str(folder), base).splitlines())
    assert lines["folder"] == "StableDiffusionXLPipeline, draws 16 x 16 x 3"
    count = sum(leaf.size for leaf in jax.tree.leaves(model_of("sdxl").params))
    assert lines["network"] == f"unet_text, {count:,} parameters, models 8 x 8 x 4"
    assert "16 tokens of width 16, pooled 6" in lines["text_encoder"] and lines["autoencoder"].startswith("kl, ")
    assert (lines["prediction"], lines["scheduler"]) == ("epsilon", "EulerDiscreteScheduler")
    assert lines["sampler"] == "euler, 25 steps on the grid leading:steps_offset=1"
    assert (lines["guidance"], lines["conditions"]) == ("cfg:scale=5.0", "time_ids 6")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "none" in describe_folder(str(folder / "unet"), base).splitlines()[-1]
    shutil.rmtree(folder / "tokenizer_2")
    with refused("--from.folder"):
        describe_folder(str(folder), base)


@pytest.mark.slow
def test_the_job_of_a_dry_run(folder_of):
    done = job("convert", f"--from={folder_of('lcm')}", "--dry_run")
    assert done.returncode == 0 and "guidance_embedding:scale=8.5" in done.stdout, done.stderr
    assert one_line(job("convert", f"--from={folder_of('lcm')}")).startswith("error: --to")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_becomes_a_run_that_draws_images(kind, folder_of, tmp_path):
    import_folder(str(folder_of(kind)), str(tmp_path / "run"), base)
    run = open_run(str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, run.params["net"], model_of(kind).params)
    assert run.spec.shape == (2 * SIZE, 2 * SIZE, 3) and run.spec.captions and run.spec.is_image
    assert run.meta["autoencoder"]["sha256"] == run.autoencoder.digest
    assert run.meta["text_encoder"]["sha256"] == run.text_encoder.digest
    rng = np.random.default_rng(0)
    cond = {name: rng.normal(size=(2, *condition.shape)).astype(np.float32)
            for name, condition in run.spec.conditions.items()}  # fmt: skip
    options = dict(prompts=["a red circle", "two squares"], cond=cond, steps=4)
    plain, guided = (run.sample(2, guidance=scale, **options) for scale in (1.0, 7.5))
    assert plain.shape == (2, 2 * SIZE, 2 * SIZE, 3) and np.isfinite(plain).all()
    assert np.abs(plain - guided).max() > 1e-3
    assert np.abs(plain - run.sample(2, guidance=1.0, **options | {"prompts": "a blue one"})).max() > 1e-3


@pytest.mark.slow
def test_two_commands_draw_images(folder_of, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    done = job("convert", f"--from={folder_of('sd15')}", f"--to={run}")
    assert done.returncode == 0 and "autoencoder from" in done.stdout, done.stderr
    flags = ["--prompts=a red circle; a square", "--guidance=7.5", "--num=2", "--steps=3", "--out_format=png"]
    done = job("sample", f"--workdir={run}", f"--out={out}", *flags)
    assert done.returncode == 0, done.stderr
    assert len(list((out / "images").glob("*.png"))) == 2
    moved = shutil.copytree(folder_of("sd15"), tmp_path / "moved")
    run_of = lambda **paths: open_run(str(run), **paths)  # noqa: E731
    assert run_of(autoencoder={"path": str(moved / "vae")}, text_encoder={"path": str(moved)}).text_encoder
    done = job("convert", f"--from={run}", f"--to={tmp_path / 'run'}")
    assert one_line(done).startswith("error: --to")


def test_a_run_refers_to_the_weights(folder_of, tmp_path):
    """It holds none of them, and needs exactly those that were converted, however they are distributed over files."""
    folder, run = shutil.copytree(folder_of("sd15"), tmp_path / "folder"), tmp_path / "run"
    import_folder(str(folder), str(run), base)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    stored = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert stored < 0.5 * weights.stat().st_size
    opened = open_run(str(run))
    jax.tree.map(np.testing.assert_array_equal, opened.params["net"], model_of("sd15").params)
    assert opened.ema is None
    tensors = safetensors.numpy.load_file(weights)
    index, names = {}, sorted(tensors)
    for number, half in enumerate((names[::2], names[1::2])):
        safetensors.numpy.save_file({name: tensors[name] for name in half}, weights.with_name(f"{number}.safetensors"))
        index |= dict.fromkeys(half, f"{number}.safetensors")
    weights.unlink()
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": index}))
    open_run(str(run))
    changed = {name: tensors[name] * np.float32(2) for name in names[::2]}
    safetensors.numpy.save_file(changed, weights.with_name("0.safetensors"))
    with refused("workdir"):
        open_run(str(run))
    shutil.rmtree(folder / "unet")
    with refused("workdir"):
        open_run(str(run))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_an_incomplete_folder_is_refused(part, folder_of, tmp_path):
    folder = shutil.copytree(folder_of("sd15"), tmp_path / "folder")
    shutil.rmtree(folder / part)
    with refused("--from.folder") as caught:
        import_folder(str(folder), str(tmp_path / "run"), base)
    assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_pickles_alone_are_refused(part, folder_of, tmp_path):
    folder = shutil.copytree(folder_of("sd15"), tmp_path / "folder")
    (folder / f"{part}.safetensors").rename(folder / f"{part}.bin")
    with refused("") as caught:
        import_folder(str(folder), str(tmp_path / "run"), base)
    assert "safe_serialization" in str(caught.value) and part.partition("/")[0] in str(caught.value)


def test_the_second_encoder_of_sdxl_is_required(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("sdxl"), tmp_path / "folder")
    rewrite(folder / "model_index.json", text_encoder_2=[None, None])
    shutil.rmtree(folder / "text_encoder_2")
    with refused("folder") as caught:
        diffusers_pipeline.read(str(folder), weights="named")
    assert "text_encoder_2" in str(caught.value)


@pytest.mark.parametrize("zeros", [True, False, None])
def test_the_empty_negative_prompt_of_sdxl(zeros, folder_of, tmp_path):
    folder = shutil.copytree(folder_of("sdxl"), tmp_path / "folder")
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    given = {} if zeros is None else {"force_zeros_for_empty_prompt": zeros}
    (folder / "model_index.json").write_text(json.dumps(index | given))
    text = diffusers_pipeline.read(str(folder), weights="named").sections["text_encoder"]
    assert text["null"] == ("empty" if zeros is False else "zeros")


def test_a_class_that_is_not_known_is_refused(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("sd15"), tmp_path / "folder")
    rewrite(folder / "model_index.json", _class_name="StableDiffusionUpscalePipeline")
    with refused("model_index.json._class_name") as caught:
        diffusers_pipeline.read(str(folder), weights="named")
    assert str(folder / "unet") in str(caught.value)
    assert diffusers_pipeline.read(str(folder / "unet"), weights="named").sections is None


def test_parts_of_different_models_are_refused(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("sd15"), tmp_path / "folder")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folder_of("pixart") / "text_encoder", folder / "text_encoder")
    with refused("--from.text_encoder.path"):
        import_folder(str(folder), str(tmp_path / "run"), base)
    xl = shutil.copytree(folder_of("sdxl"), tmp_path / "xl")
    shutil.rmtree(xl / "unet")
    shutil.copytree(folder_of("sd15") / "unet", xl / "unet")
    with refused("--from.text_encoder"):
        import_folder(str(xl), str(tmp_path / "run"), base)


def test_outdated_schedulers_and_sizes(folder_of, tmp_path):
    """Early folders of Stable Diffusion lack `steps_offset`, clip samples, and have the wrong size in the U-Net."""
    folder = shutil.copytree(folder_of("sd15"), tmp_path / "folder")
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    rewrite(folder / "unet" / "config.json", _diffusers_version="0.2.2", sample_size=32)
    pipeline = diffusers_pipeline.read(str(folder), weights="named")
    assert pipeline.sections["sampler"]["grid"] == {"name": "leading", "steps_offset": 1}
    assert "threshold" not in pipeline.sections["guidance"] and pipeline.model.spec.shape == (64, 64, 4)


def test_parts_without_the_variant_are_read_without_one(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("sdxl"), tmp_path / "folder")
    for part in ("unet/diffusion_pytorch_model", "text_encoder_2/model"):
        shutil.copy(folder / f"{part}.safetensors", folder / f"{part}.fp16.safetensors")
    sections = diffusers_pipeline.read(str(folder), variant="fp16", weights="named").sections
    assert sections["text_encoder"]["variant"] == "fp16" and "variant" not in sections["autoencoder"]
    chosen = text_pipelines.variants(str(folder), ["unet", "vae", "text_encoder", "text_encoder_2"], "fp16")
    assert chosen == {"unet": "fp16", "vae": None, "text_encoder": None, "text_encoder_2": "fp16"}
    with refused("folder"):
        diffusers_pipeline.read(str(folder), variant="bf16", weights="named")


@pytest.mark.slow
def test_a_network_alone_has_no_encoders(folder_of, tmp_path):
    import_folder(str(folder_of("sd15") / "unet"), str(tmp_path / "run"), base)
    run = open_run(str(tmp_path / "run"))
    assert run.config["autoencoder"] is None and run.config["text_encoder"] is None
    assert run.spec == model_of("sd15").spec


def tensors_of(folder):
    """Returns the bytes of all tensors of a pipeline, by part and name."""
    found = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        for name, tensor in safetensors.numpy.load_file(path).items():
            found[path.parent.name, name] = tensor.dtype.name, tensor.shape, tensor.tobytes()
    return found


@pytest.fixture(scope="module")
def written_back(folder_of, tmp_path_factory):
    """Returns a function that writes a folder as a run and that as a folder, once, which it returns."""
    root = tmp_path_factory.mktemp("written")

    def write(kind):
        if not (root / kind).exists():
            import_folder(str(folder_of(kind)), str(root / f"{kind}_run"), base)
            assert KINDS[kind][0] in export_run(str(root / f"{kind}_run"), str(root / kind))
        return root / kind

    return write


@pytest.mark.parametrize("kind", slow_except(("sdxl",), KINDS))
def test_a_run_is_written_as_the_folder_that_it_was(kind, folder_of, written_back):
    """All tensors are the same, bit for bit, and the scheduler and the parts are read as before."""
    first, second = folder_of(kind), written_back(kind)
    assert tensors_of(first) == tensors_of(second) and len(tensors_of(first)) > 50
    before, after = (diffusers_pipeline.read(str(folder), weights="named") for folder in (first, second))
    for name in ("objective", "sampler", "guidance"):
        assert after.sections[name] == before.sections[name]
    assert (after.kind, after.scheduler, after.model.spec) == (before.kind, before.scheduler, before.model.spec)
    index = [json.loads((folder / "model_index.json").read_text()) for folder in (first, second)]
    assert index[0].items() <= index[1].items()
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
    configs = [json.loads((folder / "vae" / "config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("forced", [True, False])
def test_null_texts_of_sdxl_are_written_as_they_were(forced, folder_of, tmp_path):
    """The option `null` decides, and `model_index.json` for `auto` alone."""
    folder = shutil.copytree(folder_of("sdxl"), tmp_path / "folder")
    rewrite(folder / "model_index.json", force_zeros_for_empty_prompt=forced)
    for null, expected in (("auto", forced), ("zeros", True), ("empty", False)):
        text = {"name": "joined", "path": str(folder), "layout": "sdxl", "null": null}
        sections = {"autoencoder": {"name": "kl", "path": str(folder)}, "text_encoder": text}
        index = text_pipelines.write_parts(str(tmp_path / null), "StableDiffusionXLPipeline", sections)
        assert index["force_zeros_for_empty_prompt"] is expected


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "StableDiffusionPipeline"),
        ({"text_encoder": {"name": "small"}}, None),
        ({"text_encoder": None}, None),
        ({"autoencoder": {"name": "pca"}}, None),
        ({"autoencoder": None}, None),
        ({"text_encoder": {"name": "joined", "layout": "flux"}}, None),
    ],
)
def test_the_class_of_a_run(change, kind):
    sections = {"objective": {"name": "denoising"}, "autoencoder": {"name": "kl"}, "text_encoder": {"name": "clip"}}
    assert text_pipelines.class_of(UNET, model_of("sd15").spec, sections | change) == kind


@pytest.mark.peers
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_opens_what_is_written(kind, folder_of, written_back, tmp_path):
    """Its parts have the tensors that they had, and a folder that diffusers saves is read."""
    from diffusers import DiffusionPipeline

    first, second = (DiffusionPipeline.from_pretrained(folder) for folder in (folder_of(kind), written_back(kind)))
    assert type(first) is type(second) and type(first.scheduler) is type(second.scheduler)
    for name in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2"):
        if (part := getattr(first, name, None)) is not None:
            other = getattr(second, name).state_dict()
            assert part.state_dict().keys() == other.keys()
            assert all((tensor == other[key]).all() for key, tensor in part.state_dict().items())
    texts = ["a red circle", "two (blue) squares!"]
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(first, name, None) is not None:
            assert getattr(first, name)(texts)["input_ids"] == getattr(second, name)(texts)["input_ids"]
    second.save_pretrained(tmp_path / "saved")
    read = [diffusers_pipeline.read(str(folder)) for folder in (folder_of(kind), tmp_path / "saved")]
    jax.tree.map(np.testing.assert_array_equal, *(pipeline.model.params for pipeline in read))
    for section in ("objective", "sampler", "guidance"):
        assert read[0].sections[section] == read[1].sections[section]
