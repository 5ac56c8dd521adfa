"""Density estimation on a mixture of eight Gaussians in the plane, whose entropy is known.

Command:   python -m experiments.train --config=configs/mixture.py:ddpm_eps --workdir=runs/mixture
           the argument is one of ddpm_eps, ddpm_x0, ddpm_v, flow, vdm
Hardware:  two CPU cores, one to two minutes.
Expected:  python -m experiments.evaluate --workdir=runs/mixture
           `nll`, by the ODE, within 0.03 nats per dimension of `entropy`, and `bound` above both.
"""

from configs import common

TIMES = dict(name="stratified")
METHODS = dict(
    ddpm_eps=dict(name="denoising", parameterization="eps", time_sampler=TIMES),
    ddpm_x0=dict(
        name="denoising", parameterization="x0", time_sampler=TIMES, weighting=dict(name="min_snr", gamma=100.0)
    ),
    ddpm_v=dict(name="denoising", parameterization="v", time_sampler=TIMES),
    flow=dict(name="flow_matching", time_sampler=TIMES),
    vdm=dict(name="vdm", schedule=dict(name="learned", gamma_min=-9.0, gamma_max=9.0), time_sampler=TIMES),
)


def get_config(method: str = "ddpm_eps"):
    return common.toy(
        "mixture",
        data=dict(labels=False),
        objective=common.choose("method", method, METHODS),
        train=dict(steps=10_000, batch_size=512, log_every=500),
        checkpoint=dict(every=10_000, keep=1),
        eval=dict(data=dict(labels=False), metrics=dict(likelihood=dict(num=2000, steps=200, bound_steps=1000))),
    )
