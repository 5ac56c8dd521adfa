"""Runs that were read from pipelines of diffusers draw the same images from the same noise and prompts as the pipelines
do, with the schedulers and their options, guidance and negative prompts."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import CAPTIONED
from diffusion.core.arrays import fold, normal, sample_keys
from diffusion.core.types import Autoencoder
from diffusion.interop import diffusers_pipeline
from diffusion.pipelines.conversion import import_folder
from diffusion.pipelines.generator import sampling_times
from diffusion.pipelines.run import Run, open_run
from tests.sd_folders import BETAS, SIZE, write_pipeline

needs_peer = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
pytestmark = [pytest.mark.peers, needs_peer]

PROMPTS, NEGATIVE = ["a red circle", "two blue squares"], "a green triangle"
NOISE_LEVELS = ("Euler", "Heun", "LMS", "KDPM2")  # classes whose x is x0 + sigma eps
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING, LINSPACE = {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}
# For each case: the kind of the pipeline, the class of the scheduler, its options, and the number of steps. All of them
# run with guidance and a negative prompt.
SCHEDULERS = {
    "ddim_trailing": ("sd15", "DDIMScheduler", {**TRAILING, "clip_sample": False, "set_alpha_to_one": True}, 5),
    "ddim_zero_snr": ("sd21", "DDIMScheduler", {**TRAILING, "clip_sample": False, "rescale_betas_zero_snr": True,
                      "prediction_type": "v_prediction"}, 4),
    "ddpm": ("sd15", "DDPMScheduler", {**LEADING, "clip_sample": False}, 5),
    "euler_karras": ("sd15", "EulerDiscreteScheduler", {**LINSPACE, "use_karras_sigmas": True}, 5),
    "euler_trailing": ("sdxl", "EulerDiscreteScheduler", TRAILING, 5),
    "euler_v": ("sd21", "EulerDiscreteScheduler", {**LEADING, "prediction_type": "v_prediction"}, 5),
    "euler_ancestral": ("sdxl", "EulerAncestralDiscreteScheduler", LINSPACE, 5),
    "heun": ("sd15", "HeunDiscreteScheduler", {**LEADING, "use_karras_sigmas": True}, 4),
    "lms": ("sd15", "LMSDiscreteScheduler", LINSPACE, 5),
    "kdpm2": ("sd15", "KDPM2DiscreteScheduler", LINSPACE, 4),
    "dpm_multistep": ("sdxl", "DPMSolverMultistepScheduler", {**LINSPACE, "euler_at_final": True}, 5),
    "dpm_multistep_sigma_min": ("sd15", "DPMSolverMultistepScheduler",
                                {**LEADING, "final_sigmas_type": "sigma_min", "solver_type": "heun"}, 5),
    "dpm_singlestep": ("sd15", "DPMSolverSinglestepScheduler", {"lower_order_final": True}, 4),
    "unipc": ("sd21", "UniPCMultistepScheduler", {**TRAILING, "prediction_type": "v_prediction"}, 5),
    "deis": ("sd15", "DEISMultistepScheduler", LINSPACE, 5),
}  # fmt: skip
# For each kind with its own scheduler: the guidance scales, with and without a negative prompt.
GUIDED = {
    "sd15": ((1.0, None), (7.5, None), (7.5, NEGATIVE)),
    "sd21": ((1.0, None), (7.5, None)),
    "sdxl": ((1.0, None), (7.5, None), (7.5, NEGATIVE)),
    "sdxl_turbo": ((1.0, None), (7.5, NEGATIVE)),
    "sd_turbo": ((1.0, None),),
    "lcm": ((1.0, None), (7.5, None)),
    "pixart": ((1.0, None), (7.5, None), (7.5, NEGATIVE)),
    "pixart_sigma": ((7.5, None),),
}


def from_diffusers(folder, stream, monkeypatch, steps, scale, negative, first):
    """Returns the latents and the images in [0, 1] of diffusers, NHWC, whose noise is that of the stream.

    Args:
      first: alpha and sigma where the samples start.
    """
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(
        f"{type(pipe.scheduler).__module__}.randn_tensor", lambda *args, **kwargs: next(stream), raising=False
    )
    pipe.scheduler.set_timesteps(steps)
    alpha, sigma = first
    level = sigma / alpha if type(pipe.scheduler).__name__.startswith(NOISE_LEVELS) else sigma
    latents = next(stream) * (level / float(pipe.scheduler.init_noise_sigma))
    options = {"negative_prompt": [negative] * len(PROMPTS)} if negative is not None else {}
    if "PixArt" in type(pipe).__name__:
        options |= {"clean_caption": False, "use_resolution_binning": False}
    z = pipe(prompt=PROMPTS, latents=latents, num_inference_steps=steps, guidance_scale=scale, output_type="latent",
             **options).images  # fmt: skip
    with torch.no_grad():
        decoded = pipe.vae.decode(z / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return z.numpy().transpose(0, 2, 3, 1), pipe.image_processor.postprocess(decoded, output_type="np")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run that returns latents, with its texts encoded in float32, as diffusers does here, and its autoencoder."""

    run: Run
    autoencoder: Autoencoder


@pytest.fixture(scope="module")
def opened_of(tmp_path_factory):
    """Returns a function that returns the run of a pipeline with a scheduler, which is read once per objective."""
    root, found = tmp_path_factory.mktemp("pipelines"), {}

    def open_it(kind, scheduler=None):
        name = "own" if scheduler is None else scheduler["_class_name"] + str(len(found))
        folder = pathlib.Path(write_pipeline(root / f"{kind}_{name}", kind, scheduler))
        sections = diffusers_pipeline.read(str(folder), weights="named").sections
        key = kind, str(sections["objective"])
        if key not in found:
            path = str(root / f"run{len(found)}")
            import_folder(str(folder), path, lambda *of: CAPTIONED)
            run = open_run(path, text_encoder={"dtype": "float32"})
            autoencoder, run.autoencoder = run.autoencoder, undecoded(run.autoencoder)
            found[key] = Opened(run, autoencoder)
        return folder, found[key], sections

    return open_it


def undecoded(autoencoder):
    return dataclasses.replace(autoencoder, decode=lambda params, z: z)


def compare(folder, opened, sections, monkeypatch, steps, cases):
    """Compares the latents and the images of a run, sampled as the sections say, and of the pipeline in a folder."""
    import torch

    run, schedule, side = opened.run, opened.run.objective.schedule, 2 * SIZE
    sizes = {"time_ids": np.array([[side, side, 0, 0, side, side]], np.float32)}
    cond = {name: sizes[name] for name in run.spec.conditions}
    keys, sampler = sample_keys(jax.random.key(0), jnp.arange(len(PROMPTS))), sections["sampler"] | {"steps": steps}

    def noises():
        for index in range(100):
            yield torch.tensor(np.array(normal(fold(keys, index), (SIZE, SIZE, 4))).transpose(0, 3, 1, 2))

    for scale, negative in cases:
        guidance = {**sections["guidance"], "scale": scale}
        t = sampling_times(schedule, steps, sampler["grid"])[0]
        first = float(schedule.alpha(t)), float(schedule.sigma(t))
        z = run.sample(
            len(PROMPTS), prompts=PROMPTS, negative_prompt=negative, cond=cond, sampler=sampler, guidance=guidance
        )
        x = np.asarray(opened.autoencoder.decode(opened.autoencoder.params, jnp.asarray(z)))
        with monkeypatch.context() as patch:
            theirs, images = from_diffusers(folder, noises(), patch, steps, scale, negative, first)
        case = f"guidance {scale}, negative {negative!r}"
        # PixArt's alpha is 0.006 at the start, so that random weights give latents of a deviation of 500, whose float32
        # rounding exceeds 1e-3 in diffusers too.
        scale_of_latents = theirs.std() if run.config["network"]["name"] == "dit" else 1.0
        np.testing.assert_allclose(z, theirs, atol=1e-3 * scale_of_latents, rtol=0, err_msg=case)
        np.testing.assert_allclose(np.clip(x / 2 + 0.5, 0, 1), images, atol=2 / 255, err_msg=case)
        assert theirs.std() > 0.1 and images.std() > 0.05


@pytest.mark.parametrize("kind", GUIDED)
def test_pipelines_draw_the_same_images(kind, opened_of, monkeypatch):
    steps = 4 if kind in ("lcm", "sdxl_turbo", "sd_turbo") else 5
    compare(*opened_of(kind), monkeypatch, steps, GUIDED[kind])


@pytest.mark.parametrize("case", SCHEDULERS)
def test_schedulers_draw_the_same_images(case, opened_of, monkeypatch):
    kind, name, options, steps = SCHEDULERS[case]
    scheduler = {"_class_name": name, **BETAS, **options}
    compare(*opened_of(kind, scheduler), monkeypatch, steps, [(7.5, NEGATIVE)])
