"""Latent consistency distillation on scikit-learn's handwritten digits, on pixels instead of latents: one or two
evaluations, with the guidance scale as an input of the network, from the model of configs/digits_ddpm_v.py.

Command:   python -m experiments.train --config=configs/digits_ddpm_v.py --workdir=runs/digits_ddpm_v
           python -m experiments.train --config=configs/digits_lcm.py --workdir=runs/digits_lcm
Hardware:  two CPU cores, about eight minutes.
Expected:  python -m experiments.evaluate --workdir=runs/digits_lcm
           docs/few_step.md has the figures.
"""

from configs import common


def get_config():
    return common.digits(
        objective=dict(
            name="latent_consistency",
            schedule=dict(name="vp", betas="cosine", num_steps=1000),
            parameterization=dict(name="v"),
            guidance=(1.0, 4.0),
            teacher="runs/digits_ddpm_v",
        ),
        network=dict(scalar_conditions=("guidance_scale",)),
        optimizer=dict(learning_rate=1e-3),
        train=dict(steps=1500, cond_drop_rate=0.0, preview_every=1000),
        checkpoint=dict(every=1000),
        sampler=dict(name="lcm", steps=2),
        guidance=dict(name="guidance_embedding", scale=1.5),
        eval=dict(metrics=dict(svc_accuracy=dict(guidance=1.0))),
    )
