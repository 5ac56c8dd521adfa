"""Twelve ways to train on digits: the objective, the learning rate, the decay of the average.

Command:   python -m launch.sweep --config=configs/digits.py --sweep=configs/sweeps/digits.py --workdir=runs/sweep \\
               --config.train.steps=500 --evaluate --jobs=2
Hardware:  two CPU cores, about half an hour.
"""

from launch import vary


def sweep():
    return vary.product(
        vary.over("config", ["configs/digits.py", "configs/digits_flow.py", "configs/digits_edm.py"]),
        vary.over("optimizer.learning_rate", [1e-3, 2e-3]),
        vary.over("ema.decays", [(0.99,), (0.998,)]),
    )


def sweep_random():
    """The learning rate and the weight decay, drawn at random."""
    return vary.random(
        8, seed=0, **{
            "optimizer.learning_rate": vary.log_uniform(3e-4, 1e-2),
            "optimizer.weight_decay": vary.log_uniform(1e-6, 1e-2),
        },
    )  # fmt: skip


def sweep_sampling():
    """Samplers and their steps, of one trained model: give --checkpoint in place of --config."""
    return vary.chain(
        vary.product(vary.over("sampler", ["ddim", "dpm_solver_pp:order=2"]), vary.over("steps", [5, 10, 20])),
        vary.product(vary.over("sampler", ["heun"]), vary.over("evaluations", [10, 20]), vary.over("guidance", [1, 2])),
    )
