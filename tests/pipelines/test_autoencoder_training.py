"""A run that trains an autoencoder: previews, metrics, the folder that it becomes, and what is refused."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diffusion as df
from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Spec
from diffusion.encoders.vision import lpips
from diffusion.networks import autoencoder_vq
from diffusion.pipelines.autoencoder_training import write_folder
from diffusion.pipelines.build_training import build_training, check_training
from diffusion.pipelines.config import resolve
from diffusion.pipelines.conversion import export_run
from diffusion.pipelines.run import open_run
from diffusion.training.resilience.preemption import Preempted
from diffusion.training.trainer import Trainer
from tests.encoders import vgg
from tests.refusals import refused
from tests.test_docs import blocks
from tests.vae_folders import write_vae

TRUNK = {"block_out_channels": (2,), "layers_per_block": 1, "norm_num_groups": 2, "mid_block_add_attention": False}
CONFIG = {
    "data": {"name": "shapes", "length": 40},
    "objective": {"name": "autoencoder", "disc_weight": 0.5, "disc_start": 1, "disc_layers": 1, "disc_width": 2},
    "network": {"name": "autoencoder_tiny", "encoder_block_out_channels": (2, 2), "num_encoder_blocks": (0, 1),
                "decoder_block_out_channels": (2, 2), "num_decoder_blocks": (0, 0)},
    "ema": {"decays": (0.5,)},
    "train": {"steps": 2, "batch_size": 8, "log_every": 1, "preview_every": 2},
    "eval": {"data": {"name": "shapes", "split": "test"}, "every": 2,
             "metrics": {"reconstruction": {"num": 5, "batch_size": 3}}},
}  # fmt: skip


def config_of(**sections):
    return resolve({**CONFIG, **{name: {**CONFIG[name], **options} for name, options in sections.items()}})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The files of LPIPS."""
    return vgg.write(tmp_path_factory.mktemp("weights"))


def perceptual(paths, **sections):
    """Returns the config of a run with the perceptual term and metric."""
    metrics = {"reconstruction": {**CONFIG["eval"]["metrics"]["reconstruction"], "lpips": paths}}
    objective = {"perceptual_weight": 0.1, "perceptual_path": paths}
    return config_of(objective=objective, eval={"metrics": metrics}, **sections)


def trainer(config, path, **options):
    return Trainer(**build_training(config, str(path)), workdir=str(path), **options)


@pytest.fixture(scope="module")
def state(weights, tmp_path_factory):
    """The folder of a trained run, and its last state."""
    path = tmp_path_factory.mktemp("runs") / "run"
    return path, trainer(perceptual(weights), path).fit()


@pytest.fixture(scope="module")
def workdir(state):
    return state[0]


@pytest.fixture(scope="module")
def run(workdir):
    return open_run(str(workdir))


def test_the_preview_shows_originals_above_reconstructions(workdir, run):
    sheet = np.asarray(Image.open(workdir / "previews" / "step_0000002.png"))
    side, gap = 2 * 32, 2  # each image is enlarged to at least 48 pixels
    assert sheet.shape[:2] == (gap + 8 * (side + gap), gap + 10 * (side + gap))

    def cell(row, column):
        top, left = (gap + number * (side + gap) for number in (row, column))
        return sheet[top : top + side : 2, left : left + side : 2].astype(int)

    x = np.stack([run.source[index]["x"] for index in (0, 1, 10)])
    y = np.asarray(run.objective.reconstruct(run.network.apply, run.params, x))
    for found, expected in zip([cell(0, 0), cell(0, 1), cell(2, 0)], x, strict=True):
        assert np.abs(found - (expected + 1) * 127.5).max() <= 1
    for found, expected in zip([cell(1, 0), cell(1, 1), cell(3, 0)], y, strict=True):
        assert np.abs(found - (np.clip(expected, -1, 1) + 1) * 127.5).max() <= 1


def test_metrics_of_a_run(workdir, run, weights):
    """PSNR and LPIPS as their formulas say, over the batches of which the last is filled up."""
    held_out = build("data", CONFIG["eval"]["data"])
    x = np.stack([held_out[index]["x"] for index in range(5)])
    y = np.clip(run.objective.reconstruct(run.network.apply, run.params, x), -1, 1)
    psnr = (-10 * np.log10((((x - y) / 2) ** 2).mean((1, 2, 3)))).mean()
    values = run.evaluate()
    assert values.keys() == {"psnr", "lpips", "readable_shapes"} and values["readable_shapes"] < 1
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([values["psnr"], lines[-1]["eval/psnr"]], psnr, rtol=1e-5)
    distance = jax.jit(lpips.distance)(lpips.read(weights, ""), x, y).mean()
    np.testing.assert_allclose([values["lpips"], lines[-1]["eval/lpips"]], distance, rtol=1e-4)
    assert {"error", "lpips", "adaptive_weight", "loss_critic", "loss_generator"} <= lines[-1].keys()


def test_the_weights_of_the_perceptual_term_are_in_no_checkpoint(workdir, run, state):
    assert run.params.keys() == state[1].params.keys() == {"net", "critic"} and "pretrained" in run.meta
    text = "".join(path.read_text(errors="replace") for path in (workdir / "checkpoints").rglob("*") if path.is_file())
    assert "conv_out" in text and "conv_28" not in text


def test_a_run_resumes_with_the_same_weights(workdir, weights, tmp_path):
    """They may be elsewhere. A trained run is read without them."""
    config = perceptual(vgg.write(tmp_path), train={"steps": 3})
    assert "3 steps" in check_training(build_training(config, str(workdir)), str(workdir))
    config = perceptual(vgg.write(tmp_path, seed=1), train={"steps": 3})
    before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    for action in (lambda: check_training(build_training(config, str(workdir)), str(workdir)),
                   trainer(config, workdir).fit):  # fmt: skip
        with refused("objective.perceptual_path"):
            action()
    assert sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*")) == before
    folder = pathlib.Path(weights[0]).parent
    moved = folder.rename(tmp_path / "moved")
    try:
        assert open_run(str(workdir)).params.keys() == {"net", "critic"}
        with refused("objective.perceptual_path"):
            trainer(config_of(objective={"perceptual_weight": 0.1, "perceptual_path": weights}), workdir)
        with refused("eval.metrics.reconstruction.lpips"):
            trainer(perceptual(weights), workdir)
    finally:
        moved.rename(folder)


@pytest.mark.slow
def test_resumed_is_uninterrupted(state, weights, tmp_path):
    with pytest.raises(Preempted):
        trainer(perceptual(weights), tmp_path, should_stop=lambda: True).fit()
    resumed = trainer(perceptual(weights), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed.fit(), state[1])
    assert resumed.step == 2


def test_a_run_becomes_a_folder(workdir, run, tmp_path):
    """It holds the averaged parameters, and encodes and decodes as the run does."""
    folder = tmp_path / "folder"
    text = export_run(str(workdir), str(folder))
    loaded = build("autoencoders", {"name": "tiny", "path": str(folder)}, shape=(32, 32, 3))
    assert f"scaling_factor {json.loads((folder / 'config.json').read_text())['scaling_factor']:.5g}" in text
    x = np.stack([run.source[index]["x"] for index in range(4)])
    y = loaded.decode(loaded.params, loaded.encode(loaded.params, x, None))
    np.testing.assert_allclose(y, run.objective.reconstruct(run.network.apply, run.params, x), atol=2e-5)
    trained = open_run(str(workdir), ema="none").params
    kernels = [net["encoder"]["layers_0"]["kernel"] for net in (run.params["net"], loaded.params, trained["net"])]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).any()
    jax.tree.map(np.testing.assert_array_equal, run.params["critic"], trained["critic"])  # which has no average


def untrained(run, name, change=lambda params: params):
    """Returns a run of another network, without a training."""
    section = {"name": name, "latent_channels": 2, **TRUNK}
    network = build("networks", section, shape=(32, 32, 3))
    params = {"net": jax.jit(lambda: change(network.init(jax.random.key(0))))()}
    return types.SimpleNamespace(network=network, params=params, config={"network": section}, source=run.source,
                                 spec=run.spec)  # fmt: skip


def test_latents_of_a_folder_have_unit_scale(run, tmp_path):
    """They are samples of the posterior; the scale is the same at every measurement, and the shift is optional."""
    found = {}
    for shift in (False, True):
        given = untrained(run, "autoencoder_kl")
        write_folder(given, str(tmp_path / f"{shift}"), shift)
        entries = json.loads((tmp_path / f"{shift}" / "config.json").read_text())
        found[shift] = entries["scaling_factor"], entries["shift_factor"]
    loaded = build("autoencoders", {"name": "kl", "path": str(tmp_path / "False")}, shape=(32, 32, 3))
    x = np.stack([run.source[index]["x"] for index in range(40)])
    z = np.asarray(loaded.encode(loaded.params, x, jax.random.key(5)))
    factor = found[False][0]
    assert abs(z.std() - 1) < 0.02 and abs(np.asarray(loaded.encode(loaded.params, x, None)).std() - 1) > 0.1
    assert found == {False: (factor, None), True: (factor, pytest.approx(float(z.mean()) / factor, abs=0.02))}


def test_scales_that_cannot_be_written(run, tmp_path):
    with refused("--shift"):
        write_folder(untrained(run, "autoencoder_vq"), str(tmp_path / "a"), True)
    zeros = untrained(run, "autoencoder_vq", lambda params: jax.tree.map(jnp.zeros_like, params))
    with refused("--from"):
        write_folder(zeros, str(tmp_path / "b"), False)


class Data:
    """Three images, whose values are codes 0, 1, 1 of a codebook of three."""

    spec = Spec(ArraySpec((2, 2, 1)))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"x": np.full((2, 2, 1), (-1.0, 0.5, 0.5)[index], np.float32), "cond": {}}


def test_codes_and_perfect_reconstructions():
    class Coded:
        encode = staticmethod(lambda x: x)
        output = features = encode

        def quantize(self, z):
            codes = jnp.array([-1.0, 0.5, 0.75])
            indices = jnp.argmin(jnp.abs(z - codes), -1)
            return autoencoder_vq.Quantized(z, z, indices)

    network = autoencoder_vq.Apply("autoencoder_vq", lambda params: Coded(), (2, 2, 1), (2, 2, 1), ())
    metric = build("evaluation", {"name": "reconstruction", "codes": True, "batch_size": 2}, train=Data(),
                   held_out=Data())  # fmt: skip
    metric.check(network)
    expected = {"psnr": 100.0, "codes_used": 2.0, "perplexity": 3 / 4 ** (1 / 3)}
    assert metric(network, {}) == pytest.approx(expected)
    tiny = build("networks", CONFIG["network"], shape=(32, 32, 3)).apply
    with refused("eval.metrics.reconstruction.codes"):
        metric.check(tiny)
    odd = Data()
    odd.spec = Spec(ArraySpec((32, 33, 3)))
    with refused("eval.data"):
        build("evaluation", "reconstruction", train=odd, held_out=odd).check(tiny)


def test_the_examples_of_the_documentation_run(workdir, tmp_path, monkeypatch):
    write_vae(tmp_path / "models" / "shapes64_kl", (64, 64, 3))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes64_kl").symlink_to(workdir)
    monkeypatch.chdir(tmp_path)
    for name, side in (('df.build("autoencoders"', 64), ("run.network.apply.encode", 32)):
        (example,) = (block for block in blocks("docs/python.md") if name in block)
        found = {"df": df, "x": jnp.zeros((1, side, side, 3))}
        exec(example, found)
        assert found["z"].shape[1] == side // 2 and found["y"].shape == found["x"].shape


def test_refusals(run, tmp_path):
    with refused("objective.name"):
        run.sample(2)
    with refused("objective.name"):
        run.denoiser()
    for field, sections in (
        ("network.name", {"network": {"name": "mlp", "width": 4, "depth": 1}}),
        ("autoencoder", {"autoencoder": "identity"}),
        ("objective.disc_start", {"objective": {**CONFIG["objective"], "disc_start": 2}}),
        ("train.trainable",
         {"network": {"name": "autoencoder_vq", **TRUNK}, "objective": {"name": "autoencoder", "codebook": "ema"},
          "train": {**CONFIG["train"], "trainable": ("decoder",)}}),
        ("objective.perceptual_path", {"objective": {**CONFIG["objective"], "perceptual_weight": 1.0}}),
        ("eval.metrics.held_out_loss", {"eval": {**CONFIG["eval"], "metrics": {"held_out_loss": {}}}}),
        ("eval.metrics.readable_shapes", {"eval": {**CONFIG["eval"], "metrics": {"readable_shapes": {}}}}),
        ("eval.metrics.reconstruction.codes",
         {"eval": {**CONFIG["eval"], "metrics": {"reconstruction": {"codes": True}}}}),
        ("eval.metrics.reconstruction.codes",
         {"eval": {**CONFIG["eval"], "every": 0, "metrics": {"reconstruction": {"codes": True}}}}),
        ("eval.metrics.energy_distance", {"eval": {**CONFIG["eval"], "every": 0, "metrics": {"energy_distance": {}}}}),
        ("eval.data", {"eval": {**CONFIG["eval"], "data": {"name": "digits", "split": "test"}}}),
    ):  # fmt: skip
        with refused(field):
            keywords = build_training(resolve({**CONFIG, **sections}), str(tmp_path))
            jax.eval_shape(lambda: keywords["objective"].init(keywords["network"], jax.random.key(0)))  # noqa: B023
    denoising = {"objective": "flow_matching", "network": {"name": "mlp", "width": 4, "depth": 1}}
    for every in (0, 2):
        with refused("eval.metrics.reconstruction"):
            build_training(resolve({**CONFIG, **denoising, "eval": {**CONFIG["eval"], "every": every}}), str(tmp_path))
    build_training(config_of(objective={"disc_weight": 0.0, "disc_start": 9}), str(tmp_path))
