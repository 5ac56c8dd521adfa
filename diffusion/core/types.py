"""The contracts that the parts of the library meet. Everything else imports this file; it imports nothing of ours.

Conventions held everywhere:
  - Time `t` is in [0, 1]: 0 is data, 1 is noise. `x_t = alpha(t) x0 + sigma(t) eps`.
  - Images are NHWC in [-1, 1], tokens `[B, N, D]`; B is the batch.
  - A condition is a dict of arrays with leading axis B, plus `keep [B]` bool: where it is False the network uses
    its own null embedding in place of the condition. An absent `keep` means True everywhere.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

import jax

Array = jax.Array
Params = Any  # nested dicts with string keys and array leaves
Cond = Mapping[str, Array]


class InputError(ValueError):
    """A user's input that cannot be used: which field it is, and how to mend it, in one line.

    Parts raise it with the name of their own keyword; whoever built the part puts its own name in front
    (`within`), so the user reads the whole path, as in `objective.schedule.beta_start: must be ...`.
    """

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem

    def within(self, parent: str) -> "InputError":
        return InputError(f"{parent}.{self.field}", self.problem)

    def __reduce__(self):
        return InputError, (self.field, self.problem)  # it crosses from a data worker's process


class Batch(TypedDict):
    """One batch of examples."""

    x: Array  # [B, ...] data in [-1, 1]
    cond: Cond  # conditions, each [B, ...]
    draws: NotRequired[Mapping[str, Array]]  # what `Objective.draw` drew, each [B, ...]
    skipped: NotRequired[Array]  # [B] bool, another example stands in for one that cannot be read


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a data set's examples look like; the network's shape comes from here and nowhere else.

    Attributes:
      shape: of one example `x`, without the batch axis.
      num_classes: labels are `0 .. num_classes - 1`; 0 means that there are none.
      low, high: the values that -1 and 1 stand for in the raw data.
      captions: whether an example has one, in English.
    """

    shape: tuple[int, ...]
    num_classes: int = 0
    low: float = 0.0
    high: float = 255.0
    captions: bool = False

    @property
    def is_image(self) -> bool:
        """Whether an example is a picture of 8 bits a channel, and not points or an autoencoder's latents."""
        return len(self.shape) == 3 and self.shape[-1] in (1, 3) and (self.low, self.high) != (-1.0, 1.0)


@runtime_checkable
class Source(Protocol):
    """Random access to examples: dicts of numpy arrays without a batch axis, `{"x": ..., "cond": {...}}`, with a string
    `caption` where `spec.captions` says so.

    `source[index]` has nothing random in it. These a source may have beside it:
      draw(index, rng: np.random.Generator): the example as training sees it, with its random crop and flip.
      class_names: a tuple of `spec.num_classes` strings.
      buckets: `[len]` integers; examples of one number have one shape of `x`, and a batch is of one number.
      stages: pairs of a name and a function, which one after the other make `source[index]` of `index`.
    """

    spec: Spec

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denoised:
    """A denoiser's answer, `[B, ...]` each.

    Attributes:
      x0: its estimate of E[x0 | x_t].
      log_variance: of the reverse step, if it is learned: where it lies in the log between the posterior's two
        variances, 0 for beta-tilde and 1 for beta (`posterior.Posterior.log_variance`), so it suits steps of any size.
      conditional: E[x0 | x_t, cond] as the model gave it, where guidance has made something else of it.
      x0_for_eps: the x0 that the noise is read from, where that is not `x0` itself (CFG++). A solver that goes by x0 alone
        cannot follow it, and `sample.sample` refuses the pair.
      kind: what x0 is: the `mean`, as above; the `end` of the ODE's path through x_t, as a consistency model gives it;
        or that of the straight `step` which leads to where the path is at time `cond["target_time"]`, as a flow map has it.
    """

    x0: Array
    log_variance: Array | None = None
    conditional: Array | None = None
    x0_for_eps: Array | None = None
    kind: Literal["posterior_mean", "consistency", "flow_map"] = dataclasses.field(
        default="posterior_mean", metadata={"static": True}
    )


# denoise(x [B, ...], t [] or [B], cond) -> Denoised; `cond` is bound last (`sample.bind`): denoise(x, t, **more_cond).
Denoiser = Callable[..., Denoised]


class Schedule(Protocol):
    """`x_t = alpha(t) x0 + sigma(t) eps`, exact at both ends. All take and return arrays of one shape."""

    def alpha(self, t: Array) -> Array: ...

    def sigma(self, t: Array) -> Array: ...

    def log_snr(self, t: Array) -> Array:
        """`log(alpha^2 / sigma^2)`, falling in t."""
        ...

    def time(self, log_snr: Array) -> Array:
        """The inverse of `log_snr`."""
        ...


class Apply(Protocol):
    """A network as a pure function. `key=None` switches dropout off."""

    def __call__(self, params: Params, x: Array, c_noise: Array, cond: Cond, *, key: Array | None = None) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Network:
    """A network split once into its two halves.

    Attributes:
      init: `init(key) -> params`.
      apply: of the form `Apply`.
      outputs: values that it gives for each channel of x: 1, or 2 if it has a second head (a learned variance).
      project: what its parameters are brought back to after every optimizer step, and by `init`; None if they are free.
      scalar_conditions: the numbers, each `[B]`, that it takes in `cond` beside the noise label: `r`, `guidance`.
    """

    init: Callable[[Array], Params]
    apply: Apply
    outputs: int = 1
    project: Callable[[Params], Params] | None = None
    scalar_conditions: tuple[str, ...] = ()


class Objective(Protocol):
    """Ties schedule, parameterization, law of t and weighting together, for training and sampling alike.

    Attributes:
      schedule: the noise schedule that training and sampling share (a learned one: as it is before training).
      frozen: names in the dict of networks that no gradient trains (a teacher, a target): they get neither optimizer
        state nor EMA, and `denoiser` does without them.
    """

    schedule: Schedule
    frozen: tuple[str, ...]

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        """The dict of networks, `{"net": ...}` and whatever else the method trains or reads.

        Args:
          teacher: the dict of networks of the trained model that the objective was built with, if it was; without it
            the shapes are right and the values are not.
        """
        ...

    def schedule_for(self, params: Mapping) -> Schedule:
        """The schedule to sample with."""
        ...

    def initial_state(self) -> Mapping[str, Array]:
        """What the objective keeps from step to step beside its parameters, before the first; a part of the state."""
        ...

    def before_step(
        self,
        params: Mapping,
        ema_params: Mapping,
        batch: Batch,
        objective_state: Mapping[str, Array],
        key: Array,
        step: Array,
    ) -> tuple[dict[str, Params], Mapping[str, Array]]:
        """What comes before a step: the dict of networks, with those that follow others and no gradient brought up to
        date (a target, the teacher of the next round), and the memory."""
        ...

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> Mapping[str, Array]:
        """All randomness of one loss, each entry `[B, ...]`: drawn for the whole batch, so that neither gradient
        accumulation nor sharding changes it."""
        ...

    def update_state(
        self, objective_state: Mapping[str, Array], noise: Mapping[str, Array], loss: Array
    ) -> tuple[Mapping[str, Array], dict[str, Array]]:
        """The memory after a whole batch's noise and losses `[B]`, and metrics of them."""
        ...

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Loss `[B]` and scalar metrics. Uses `batch["draws"]` if it is there, and draws it if not."""
        ...

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser: ...


class Sampler(Protocol):
    """One step of a solver, in the shape of an optax transformation; `diffusion.sample.sample` scans over it.

    `t` and `s` are scalars, `t > s`; a solver of the ODE also goes up, from `t` to `s > t`. `keys` holds one key a
    sample, so a sample does not depend on its neighbours.

    Attributes:
      evaluations: `evaluations(steps)`, how often a run that ends at t = 0 asks the denoiser; None if it depends.
      stochastic: whether it draws noise, and so solves no ODE that could be inverted.
      uses_separate_eps: whether it follows a noise that is not read from x0 (`Denoised.x0_for_eps`).
    """

    stochastic: bool
    uses_separate_eps: bool

    def evaluations(self, steps: int) -> int | None: ...

    def init(self, x: Array, times: Array) -> Any: ...

    def step(self, carry: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Any: ...

    def finish(self, carry: Any) -> Array: ...


@runtime_checkable
class SampleMetric(Protocol):
    """A figure of merit of samples. `num` and `guidance` say what to draw for it."""

    num: int
    guidance: float

    def __call__(self, x: Any, labels: Sequence[int] | None) -> Mapping[str, float]:
        """Args: `x [N, ...]` samples in [-1, 1], `labels [N]` the classes asked for."""
        ...


class ModelMetric(Protocol):
    """A figure of merit of a model itself."""

    def __call__(self, denoise: Denoiser, schedule: Schedule, key: Array) -> Mapping[str, float]:
        """Args: `denoise(x, t, cond)`, and the schedule it was trained with."""
        ...
