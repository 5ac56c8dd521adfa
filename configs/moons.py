"""Flow matching on two moons in the plane, with noise coupled to the examples of a batch at random or by transport.

Command:   python -m experiments.train --config=configs/moons.py:exact --workdir=runs/moons
           the argument is the coupling: independent, exact or sinkhorn
Hardware:  two CPU cores, under a minute; a few minutes for exact, whose assignment is slow on a CPU.
Expected:  python -m experiments.evaluate --workdir=runs/moons
           `path_curvature` of exact and sinkhorn under a third of that of independent.
"""

from configs import common


def get_config(coupling: str = "independent"):
    return common.toy(
        "moons",
        objective=dict(name="flow_matching", time_sampler="stratified", coupling=coupling, entropy=0.05),
        train=dict(steps=4000, batch_size=256, log_every=200),
        checkpoint=dict(every=4000, keep=1),
        eval=dict(metrics=dict(straightness=dict(num=2000, steps=200))),
    )
