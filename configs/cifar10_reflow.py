"""Rectified flow, reflow and distillation on CIFAR-10 without classes, as in Liu et al. 2023 (arXiv 2209.03003).

Command:   python -m experiments.train --config=configs/cifar10_reflow.py:flow --workdir=runs/cifar10_flow
           python -m experiments.train --config=configs/cifar10_reflow.py:reflow --workdir=runs/cifar10_reflow
           python -m experiments.train --config=configs/cifar10_reflow.py:distill --workdir=runs/cifar10_reflow_distill
           the argument is `flow`, trained on the data; `reflow`, trained on pairs from the first; or `distill`, one
           step trained on pairs from the second
Data:      python -m experiments.prepare_data --config=configs/cifar10_reflow.py
           (TFDS downloads it; 50,000 and 10,000 images)
Hardware:  eight GPUs or a TPU v3-8; days for `flow` (not measured).
Expected:  FID of 50,000 samples of the averaged parameters against the training set (recalled): 2.58 for `flow` with
           the adaptive Runge-Kutta method, which takes 127 calls of the network; in one Euler step 12.21 for `reflow`
           and 4.85 for `distill`. The paper distills with LPIPS, this config with the squared error. It draws about
           four million pairs beforehand with Runge-Kutta (recalled); here, 100 Euler steps renew a pool of pairs.
"""

from configs import common

RUNS = dict(flow=800_000, reflow=300_000, distill=300_000)  # training steps


def get_config(run: str = "reflow"):
    steps = common.choose("run", run, RUNS)
    reflow = dict(
        name="reflow",
        rounds=1 if run == "reflow" else 0,
        round_steps=steps,
        distill=run == "distill",
        pool=16_384,
        every=8,
        ode_steps=100,
        teacher="runs/cifar10_flow" if run == "reflow" else "runs/cifar10_reflow",
    )
    runge_kutta = dict(name="rk45", rtol=1e-5, atol=1e-5, steps=1)
    return common.cifar10(
        objective=dict(name="flow_matching") if run == "flow" else reflow,
        network=dict(common.DDPMPP, channel_mult=(1, 2, 2, 2), dropout=0.15 if run == "flow" else 0.0),
        optimizer=dict(name="adam", learning_rate=2e-4, warmup=5000),
        ema=dict(decays=(0.999999,)),
        train=dict(steps=steps, batch_size=128),
        sampler=runge_kutta if run == "flow" else dict(name="euler", steps=1),
    )
