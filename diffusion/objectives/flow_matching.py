"""Flow matching and rectified flow: regression of the velocity of a path from data to noise (Lipman et al. 2023, arXiv
2210.02747; Liu et al. 2023, arXiv 2209.03003). Data and noise are coupled at random or by optimal transport within the
batch (Tong et al. 2024, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772). The contrastive loss pushes the
velocity away from those of other examples (Stoica et al. 2025, arXiv 2506.05350)."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from diffusion.core import checks
from diffusion.core.arrays import flat_mean
from diffusion.core.types import NULL, Array, Batch, Cond, InputError
from diffusion.objectives.base.gaussian import (
    Gaussian,
    ParameterizationSpec,
    ScheduleSpec,
    TimeSamplerSpec,
    WeightingSpec,
    build_parts,
)
from diffusion.process.parameterization import Coefficients


@dataclasses.dataclass(frozen=True)
class FlowMatching(Gaussian):
    """Flow matching; see `make`."""

    coupling: Literal["independent", "exact", "sinkhorn"] = "independent"
    entropy: float = 0.05
    contrastive: float = 0.0

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        key, key_pairs = jax.random.split(key)
        draws = super().draw(batch, key, step, objective_state)
        if self.coupling != "independent":
            cost = squared_distances(batch["x"], draws["eps"])
            scale, same = jnp.mean(cost), _same_class(batch["cond"])
            if self.coupling == "exact":
                rows, columns = optax.assignment.hungarian_algorithm(
                    jnp.where(same, cost, cost + len(cost) * jnp.max(cost))
                )
                partners = jnp.zeros_like(columns).at[rows].set(columns)
            else:
                log_plan = sinkhorn(jnp.where(same, cost / scale, jnp.inf), self.entropy)
                partners = jax.random.categorical(key_pairs, log_plan, axis=1)
            draws["eps"] = draws["eps"][partners]
        if self.contrastive:
            others = random_others(jax.random.fold_in(key_pairs, 0), len(batch["x"]))
            draws |= {"other_x": batch["x"][others], "other_eps": draws["eps"][others]}
        return draws

    def error(self, output: Array, batch: Batch, coefficients: Coefficients) -> Array:
        """Returns mean((F - target)^2) less `contrastive` times the same of another example's target at the same t."""
        error, draws = super().error(output, batch, coefficients), batch["draws"]
        if self.contrastive:
            other = coefficients.target(draws["other_x"], draws["other_eps"])
            error -= self.contrastive * flat_mean(jnp.square(output - other), keep=draws["t"].ndim)
        return error


def random_others(key: Array, n: int) -> Array:
    """Draws for each of n examples the index of another one, uniform among these, `[n]`."""
    if n < 2:
        raise InputError("train.batch_size", f"must be at least 2 for objective.contrastive, got {n}")
    return (jnp.arange(n) + jax.random.randint(key, (n,), 1, n)) % n


def _same_class(cond: Cond) -> Array:
    """Returns which examples may exchange their noise, `[N, N]` or `[1, 1]`: those of one class.

    Otherwise the noise of a class would not be normal, while sampling starts from normal noise.

    Raises:
      InputError: There are conditions other than a label.
    """
    names = cond.keys() - {"keep", NULL}
    if names - {"label"}:
        raise InputError("objective.coupling", f"must be independent for data with {', '.join(sorted(names))}: a "
                         "coupling ties the noise to conditions other than a label")  # fmt: skip
    return cond["label"][:, None] == cond["label"][None] if names else jnp.ones((1, 1), bool)


def squared_distances(x: Array, y: Array) -> Array:
    """Returns the squared distances `[N, M]` between `x [N, ...]` and `y [M, ...]`."""
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    return jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None] - 2 * x @ y.T


def sinkhorn(cost: Array, entropy: float, iterations: int = 100) -> Array:
    """Returns the log of the entropic optimal transport plan between two uniform sets, `[N, N]` (Cuturi 2013, arXiv
    1306.0895, in the log domain).

    Each row of the plan sums to 1, and so does each column at convergence.
    """

    def sweep(plan: Array, _: None) -> tuple[Array, None]:
        return jax.nn.log_softmax(jax.nn.log_softmax(plan, axis=0), axis=1), None

    return jax.lax.scan(sweep, -cost / entropy, None, length=iterations)[0]


def make(
    schedule: ScheduleSpec = "flow",
    parameterization: ParameterizationSpec = "velocity",
    time_sampler: TimeSamplerSpec = "uniform",
    weighting: WeightingSpec = "simple",
    coupling: Literal["independent", "exact", "sinkhorn"] = "independent",
    entropy: float = 0.05,
    contrastive: float = 0.0,
    learned_weight: bool = False,
    offset_noise: float = 0.0,
    pyramid_noise: float = 0.0,
    input_perturbation: float = 0.0,
    self_conditioning: bool = False,
) -> FlowMatching:
    """Builds flow matching from the specs of its parts, each a name or `{"name": ..., **keywords}`.

    Args:
      schedule: The interpolant. `flow` is the straight path, `trig` that of SiT; every other schedule has a velocity
        too.
      parameterization: What the network predicts: `velocity`, `x0`, `eps`, `v`, ...
      time_sampler: Any time sampler.
      weighting: Any weighting.
      coupling: How noise is assigned to the examples of a batch: `independent`; `exact`, the assignment of least
        squared distance; or `sinkhorn`, a draw from the entropic plan, which is cheaper for large batches. Examples
        with labels exchange noise within their class only; other conditions require `independent`.
      entropy: The entropic regularisation of the plan, in units of the mean cost.
      contrastive: The weight c in [0, 1) of the contrastive term, such as 0.05, which subtracts the squared error
        against the target of another example of the batch. The best F is (F* - c mean(F*)) / (1 - c) for the best F*
        without it; the denoiser does not undo this, as in the paper.
      learned_weight: Whether a weight of each noise level is learned in addition to the weighting, as EDM2 does; see
        `base.uncertainty`.
      offset_noise: The strength of noise that all pixels share, such as 0.1, for images and videos; see `base.noise`.
      pyramid_noise: The discount per level of noise at lower resolutions, such as 0.8; see `base.noise`.
      input_perturbation: The scale of noise on the network's input that the target does not contain, such as 0.1, which
        imitates the errors of sampling (Ning et al. 2023, arXiv 2301.11706).
      self_conditioning: Whether the network reads its own earlier estimate of x0 (Chen et al. 2022, arXiv 2208.04202),
        at the cost of one more forward pass in training. Requires `network.self_conditioning`.
    """
    checks.positive(entropy=entropy)
    checks.rate(contrastive=contrastive)
    if contrastive and learned_weight:
        raise InputError("contrastive", "must be 0 with learned_weight, which needs an error that is not negative")
    return FlowMatching(
        **build_parts(schedule, parameterization, time_sampler, weighting), coupling=coupling, entropy=entropy,
        contrastive=contrastive, learned_weight=learned_weight, offset_noise=offset_noise,
        pyramid_noise=pyramid_noise, input_perturbation=input_perturbation, self_conditioning=self_conditioning,
    )  # fmt: skip
