"""Guidance by name: each function maps a denoiser to a denoiser, so that they nest: `rescale(cfg(denoise, 3.0), 0.7)`.

    predictions with and without the conditions   cfg, apg, cfg_zero, cfg_pp, fdg
    the same with one condition after another     cfg_per_condition
    predictions with given and random conditions  icg
    predictions of two models                     autoguidance
    a network, and with some blocks made worse    pag, seg, slg
    a network with the scale as an input          guidance_embedding
    any denoiser's output, modified               scale_schedule, rescale, interval, threshold
    any denoiser's conditions, modified           cads

Traced and static keywords. Keywords annotated `Traced` (`float | Array`), or a mapping to it, enter the compiled
sampler as arguments: a new value does not recompile it. All other keywords are static: they are compiled in.
`diffusion.pipelines.generator` reads the annotations to decide which is which, so a new guidance function must annotate
its numbers with `Traced` unless they affect shapes or Python control flow. The keywords `denoise`, `guided`, `plain`,
`worse`, `perturbed`, `schedule`, `keys` and `conditions` are not options: the caller supplies them.
"""

from diffusion.sampling.guidance.classifier_free import apg, cfg, cfg_per_condition, cfg_pp, cfg_zero, fdg
from diffusion.sampling.guidance.common import Traced
from diffusion.sampling.guidance.conditions import cads, icg
from diffusion.sampling.guidance.modifiers import interval, rescale, scale_schedule, threshold
from diffusion.sampling.guidance.networks import autoguidance, guidance_embedding
from diffusion.sampling.guidance.perturbed import pag, seg, slg

__all__ = [
    "Traced",
    "apg",
    "autoguidance",
    "cads",
    "cfg",
    "cfg_per_condition",
    "cfg_pp",
    "cfg_zero",
    "fdg",
    "guidance_embedding",
    "icg",
    "interval",
    "pag",
    "rescale",
    "scale_schedule",
    "seg",
    "slg",
    "threshold",
]
