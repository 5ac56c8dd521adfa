"""Flow matching and rectified flow: regression of the velocity of a path from data to noise (Lipman et al. 2023, arXiv
2210.02747; Liu et al. 2023, arXiv 2209.03003). Data and noise are coupled at random or by optimal transport within the
batch (Tong et al. 2024, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772)."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from diffusion.core import checks
from diffusion.core.types import Array, Batch
from diffusion.objectives.base.gaussian import (
    Gaussian,
    ParameterizationSpec,
    ScheduleSpec,
    TimeSamplerSpec,
    WeightingSpec,
    build_parts,
)


@dataclasses.dataclass(frozen=True)
class FlowMatching(Gaussian):
    """Flow matching; see `make`."""

    coupling: Literal["independent", "exact", "sinkhorn"] = "independent"
    entropy: float = 0.05

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        key, key_pairs = jax.random.split(key)
        draws = super().draw(batch, key, step, objective_state)
        if self.coupling != "independent":
            cost = squared_distances(batch["x"], draws["eps"])
            if self.coupling == "exact":
                rows, columns = optax.assignment.hungarian_algorithm(cost)
                partners = jnp.zeros_like(columns).at[rows].set(columns)
            else:
                log_plan = sinkhorn(cost / jnp.mean(cost), self.entropy)
                partners = jax.random.categorical(key_pairs, log_plan, axis=1)
            draws["eps"] = draws["eps"][partners]
        return draws


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
) -> FlowMatching:
    """Builds flow matching from the specs of its parts, each a name or `{"name": ..., **keywords}`.

    Args:
      schedule: The interpolant. `flow` is the straight path, `trig` that of SiT; every other schedule has a velocity
        too.
      parameterization: What the network predicts: `velocity`, `x0`, `eps`, `v`, ...
      time_sampler: Any time sampler.
      weighting: Any weighting.
      coupling: How noise is assigned to the examples of a batch: `independent`; `exact`, the assignment of least
        squared distance; or `sinkhorn`, a draw from the entropic plan, which is cheaper for large batches.
      entropy: The entropic regularisation of the plan, in units of the mean cost.
    """
    checks.positive(entropy=entropy)
    return FlowMatching(
        **build_parts(schedule, parameterization, time_sampler, weighting), coupling=coupling, entropy=entropy
    )
