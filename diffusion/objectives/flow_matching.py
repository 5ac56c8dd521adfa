"""Flow matching and rectified flow: regress the velocity of a path from data to noise (Lipman et al. 2023, arXiv
2210.02747; Liu et al. 2023, arXiv 2209.03003), pairs coupled at random or by optimal transport within the batch (Tong
et al. 2024, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772)."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from diffusion.core.types import Array, Batch, InputError
from diffusion.objectives.base.gaussian import Gaussian, PartSpec, build_parts


@dataclasses.dataclass(frozen=True)
class FlowMatching(Gaussian):
    """See `make`."""

    coupling: Literal["independent", "exact", "sinkhorn"] = "independent"
    entropy: float = 0.05

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        key, key_pairs = jax.random.split(key)
        noise = super().draw(batch, key, step, objective_state)
        if self.coupling != "independent":
            cost = squared_distances(batch["x"], noise["eps"])
            if self.coupling == "exact":
                rows, columns = optax.assignment.hungarian_algorithm(cost)
                partners = jnp.zeros_like(columns).at[rows].set(columns)
            else:
                plan = sinkhorn(cost / jnp.mean(cost), self.entropy)
                partners = jax.random.categorical(key_pairs, plan, axis=1)
            noise["eps"] = noise["eps"][partners]
        return noise


def squared_distances(x: Array, y: Array) -> Array:
    """`[N, ...]`, `[M, ...]` -> `[N, M]`."""
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    return jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None] - 2 * x @ y.T


def sinkhorn(cost: Array, entropy: float, iterations: int = 100) -> Array:
    """The log of the entropic optimal plan between two uniform sets, `[N, N]` -> `[N, N]`; each row and, at
    convergence, each column of the plan sums to 1 (Cuturi 2013, arXiv 1306.0895, in the log domain)."""

    def sweep(plan: Array, _: None) -> tuple[Array, None]:
        return jax.nn.log_softmax(jax.nn.log_softmax(plan, axis=0), axis=1), None

    return jax.lax.scan(sweep, -cost / entropy, None, length=iterations)[0]


def make(
    schedule: PartSpec = "flow",
    parameterization: PartSpec = "velocity",
    time_sampler: PartSpec = "uniform",
    weighting: PartSpec = "simple",
    coupling: Literal["independent", "exact", "sinkhorn"] = "independent",
    entropy: float = 0.05,
) -> FlowMatching:
    """Flow matching from the specs of its parts, each a name or `{"name": ..., **keywords}`.

    Args:
      schedule: the interpolant: `flow` is the straight one, `trig` SiT's; any other path has a velocity too.
      parameterization: what the network's head gives: `velocity`, `x0`, `eps`, `v`, ...
      coupling: which noise belongs to which example of a batch: `independent`; `exact`, the assignment of least squared
        distance; or `sinkhorn`, drawn from the entropic plan, which is cheaper for large batches.
      entropy: of the entropic plan, in units of the mean cost.
    """
    if entropy <= 0:
        raise InputError("entropy", f"must be positive, got {entropy}")
    return FlowMatching(
        **build_parts(schedule, parameterization, time_sampler, weighting), coupling=coupling, entropy=entropy
    )
