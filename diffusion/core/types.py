"""The contracts between the parts of the library. Every other module imports this file; it imports none of them.

Conventions used throughout:
  - Time `t` is in [0, 1]: 0 is data, 1 is noise. `x_t = alpha(t) x0 + sigma(t) eps`.
  - Images are NHWC in [-1, 1], tokens are `[B, N, D]`; B is the batch size.
  - Conditions are a dict of values with leading axis B, arrays or `Text`, plus `keep`: where it is False the network
    uses its own null embedding instead of the condition. It is one array `[B]` for all conditions, or a dict of arrays
    by their names. Absent means True. `null` may hold values in place of the network's embeddings.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

import jax
import numpy as np

Array = jax.Array
Params = Any  # nested dicts with string keys and array leaves
Label = int | str  # a class, by its number or its name
Cond = Mapping[str, Any]  # arrays or `Text`, each [B, ...], and `keep`

# Conditions that objectives and guidance add to those of the data; see `Network.scalar_conditions`.
SCALAR_CONDITIONS = ("step_size", "guidance_scale")
# The condition of self-conditioning, an earlier estimate of x0 `[B, ...]`; see `Network.self_conditioning`.
PREVIOUS_X0 = "previous_x0"
# Values that replace conditions that are not kept, by name, `[B, ...]` each. A condition that is not among them is
# replaced by the network's own null value.
NULL = "null"
# The condition of noisy labels: a pytree of arrays `[B, ...]` that, called with the embeddings of the labels `[B, D]`,
# returns noisy ones; see `guidance.cads`. A module calls it through `layers.conditioner.with_noise`.
LABEL_NOISE = "label_noise"


class InputError(ValueError):
    """An error in a user's input. Its one-line message names the field and says how to fix it.

    A part raises it with the name of a keyword, and each caller that builds the part prepends its name (`within`), so
    that the user sees the full path, as in `objective.schedule.beta_start: must be ...`.
    """

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem

    def within(self, parent: str) -> "InputError":
        """Returns the same error with `parent` prepended to the field."""
        return InputError(f"{parent}.{self.field}", self.problem)

    def __reduce__(self):
        return InputError, (self.field, self.problem)  # pickled by the data workers' processes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text:
    """A text condition; a pytree.

    Attributes:
      tokens: Embedded tokens `[B, L, D]`, or integers `[B, L]` that the network embeds itself.
      mask: Bool `[B, L]`, False for padding, which never affects the network's output.
      pooled: An embedding of the whole text, `[B, P]`, or None.
    """

    tokens: Array
    mask: Array
    pooled: Array | None = None


class Batch(TypedDict):
    """A batch of examples."""

    x: Array  # [B, ...] data in [-1, 1], or 8-bit images, which the train step scales
    cond: Cond  # conditions, each [B, ...]
    draws: NotRequired[Mapping[str, Array]]  # the result of `Objective.draw`, each [B, ...]
    skipped: NotRequired[Array]  # [B] bool, True for an example that replaces one that cannot be read


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """A description of the data `x` of one example.

    Attributes:
      shape: Shape without the batch axis.
      kind: `image`: 8 bits per channel. `latent`: the output of an autoencoder. `video`: frames first. `points`: other.
      low, high: Values of the raw data that are mapped to -1 and 1.
      dtype: `float32`, or `uint8` for values from 0 to 255 that `arrays.scaled` maps to [-1, 1] on the device. It says
        how the data are delivered, not what they are, so specs that differ in it are equal.
    """

    shape: tuple[int, ...]
    kind: Literal["image", "latent", "video", "points"] = "image"
    low: float = 0.0
    high: float = 255.0
    dtype: Literal["float32", "uint8"] = dataclasses.field(default="float32", compare=False)

    def __post_init__(self):
        if not self.shape or min(self.shape) < 1:
            raise InputError("shape", f"must be one or more positive sizes, got {self.shape}")


def earlier_kind(shape: tuple[int, ...], low: float, high: float) -> Literal["image", "latent", "video", "points"]:
    """Returns the kind of data whose description was stored before there were kinds."""
    if len(shape) == 3 and shape[-1] in (1, 3) and (low, high) != (-1, 1):
        return "image"
    return {3: "latent", 4: "video"}.get(len(shape), "points")


@dataclasses.dataclass(frozen=True)
class ConditionSpec:
    """A description of one condition.

    Attributes:
      kind: `label`: an integer. `scalar`: a number. `vector`: an array `[D]`. `text`: a `Text`. `image`: an array
        `[H, W, C]` with the height and width of `x`.
      shape: Shape of one value: `()` for labels and scalars, `(D,)`, `(H, W, C)`; for a text, that of its tokens, `(L,
        D)`, or `(L,)` for integers.
      num_classes: Labels are `0 .. num_classes - 1`.
      class_names: The names of the classes by label, or none. Specs that differ in them alone are equal.
      vocabulary: Integer tokens are `0 .. vocabulary - 1`; 0 if the tokens of a text are vectors.
      pooled: Width of the pooled embedding of a text; 0 if it has none.
    """

    kind: Literal["label", "scalar", "vector", "text", "image"]
    shape: tuple[int, ...] = ()
    num_classes: int = 0
    vocabulary: int = 0
    pooled: int = 0
    class_names: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self):
        axes = {"vector": 1, "image": 3, "text": 1 if self.vocabulary else 2}.get(self.kind, 0)
        if len(self.shape) != axes or min(self.shape, default=1) < 1:
            raise InputError("shape", f"must be {axes} positive sizes for a {self.kind}, got {self.shape}")
        if min(self.vocabulary, self.pooled) < 0 or (self.num_classes < 1) == (self.kind == "label"):
            raise InputError("num_classes", f"must be positive for labels, and 0 otherwise, got {self.num_classes}")
        if len(self.class_names) not in (0, self.num_classes):
            raise InputError("class_names", f"must be {self.num_classes} names, got {len(self.class_names)}")

    def zeros(self, num: int) -> Any:
        """Returns `num` values as NumPy arrays; a text has no padding."""
        if self.kind == "label":
            return np.zeros(num, np.int32)
        values = np.zeros((num, *self.shape), np.int32 if self.vocabulary else np.float32)
        if self.kind != "text":
            return values
        pooled = np.zeros((num, self.pooled), np.float32) if self.pooled else None
        return Text(values, np.ones((num, self.shape[0]), bool), pooled)


NO_CONDITIONS: Mapping[str, ConditionSpec] = types.MappingProxyType({})


def class_labels(num_classes: int, class_names: Sequence[str] = ()) -> dict[str, ConditionSpec]:
    """Returns the conditions of data with `num_classes` classes: `label`, or none for 0."""
    if not num_classes:
        return {}
    return {"label": ConditionSpec("label", num_classes=num_classes, class_names=tuple(class_names))}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A description of a data set's examples. A network's input shape comes from here and nowhere else.

    Attributes:
      x: The data.
      conditions: The conditions by name.
      captions: Whether each example has a caption, in English.
    """

    x: ArraySpec
    conditions: Mapping[str, ConditionSpec] = dataclasses.field(default_factory=dict, hash=False)
    captions: bool = False

    def __post_init__(self):
        for name in self.conditions:
            if name in ("keep", "joint", "target_time", "memory", NULL, PREVIOUS_X0, LABEL_NOISE, *SCALAR_CONDITIONS):
                raise InputError("conditions", f"the name {name!r} is reserved; choose another")
            if (name == "label") != (self.conditions[name].kind == "label"):
                raise InputError(
                    "conditions", "a condition of the kind 'label' must be the only one and have that name"
                )

    def with_text(self, text: ConditionSpec) -> "Spec":
        """Returns the spec with the condition `text` in place of captions."""
        return dataclasses.replace(self, conditions={**self.conditions, "text": text}, captions=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `x`, without the batch axis."""
        return self.x.shape

    @property
    def num_classes(self) -> int:
        """The number of classes of the condition `label`; 0 if there is none."""
        return self.conditions["label"].num_classes if "label" in self.conditions else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes by label; empty if there are none."""
        return self.conditions["label"].class_names if "label" in self.conditions else ()

    def classes(self, most: int = 20) -> str:
        """Returns the labels and names of the first classes, as in `0 cat, 1 dog`; empty if they have no names."""
        more = f", ... ({self.num_classes - most:,} more)" if len(self.class_names) > most else ""
        return ", ".join(f"{label} {name}" for label, name in enumerate(self.class_names[:most])) + more

    @property
    def is_image(self) -> bool:
        """Whether an example is an image of 8 bits per channel, as opposed to points or an autoencoder's latents."""
        return self.x.kind == "image"

    def zeros(self, num: int) -> dict[str, Any]:
        """Returns `num` values of each condition as NumPy arrays, for tracing."""
        return {name: condition.zeros(num) for name, condition in self.conditions.items()}


@runtime_checkable  # `build` checks the arguments `train` and `held_out` of a metric
class Source(Protocol):
    """Random access to examples.

    An example is a dict of numpy arrays without a batch axis, `{"x": ..., "cond": {...}}`, with x of `spec.x.dtype`. It
    has a string `caption` if `spec.captions` is True. `source[index]` is deterministic. A source may also define:
      draw(index, rng: np.random.Generator): Returns the example for training, with a random crop and flip.
      buckets: Integers `[len]`. Examples with the same number have the same shape of `x`, and a batch has one number.
      stages: Pairs of a name and a function. Composed in order, the functions map `index` to `source[index]`.
      encoder, decoded_spec: For data that were encoded in advance, the digest of the autoencoder and the spec of what
        it decodes them to. Then x is what `Autoencoder.posterior` returns.
      text_encoder, caption(index): For captions that were encoded in advance, the digest of the text encoder, and a
        function that returns the first caption of an example. Then `cond["text"]` is a `Text` of vectors.
    """

    spec: Spec

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denoised:
    """The output of a denoiser, `[B, ...]` each.

    Attributes:
      x0: The estimate of x0; `kind` says of which kind.
      log_variance: The learned variance of the reverse step, or None. It interpolates between the logarithms of the
        posterior's two variances, 0 for beta-tilde and 1 for beta (`posterior.Posterior.log_variance`), so that it
        applies to steps of any size.
      conditional: The model's own E[x0 | x_t, cond], if guidance has changed `x0`.
      x0_for_eps: The x0 from which eps is computed, if it is not `x0` itself (CFG++, or clipping that keeps the noise).
        Solvers that use x0 alone cannot follow it, and `sampling.loop.sample` rejects the combination.
      memory: What the first evaluation of a step leaves for those of the next step, which receive it as
        `cond["memory"]`: an array `[B, ...]`, zeros at first; None for a denoiser without memory. See
        `sampling.loop.sample`.
      kind: What `x0` estimates. `posterior_mean`: E[x0 | x_t]. `consistency`: the end, at t = 0, of the ODE trajectory
        through x_t. `flow_map`: the x0 for which one first-order step from t lands on the ODE trajectory at time
        `cond["target_time"]`.
    """

    x0: Array
    log_variance: Array | None = None
    conditional: Array | None = None
    x0_for_eps: Array | None = None
    memory: Array | None = None
    kind: Literal["posterior_mean", "consistency", "flow_map"] = dataclasses.field(
        default="posterior_mean", metadata={"static": True}
    )


# denoise(x [B, ...], t [], [B] or [B, T], cond) -> Denoised; t [B, T] is a time per frame of x [B, T, ...].
# `cond` may hold `target_time [B]`, the time that a flow map steps to. Samplers call a denoiser with the condition
# bound (`sampling.loop.bind`): denoise(x, t, **more_cond).
Denoiser = Callable[..., Denoised]


class Schedule(Protocol):
    """A noise schedule `x_t = alpha(t) x0 + sigma(t) eps`, exact at both ends.

    All methods are elementwise: they take and return arrays of the same shape.
    """

    def alpha(self, t: Array) -> Array: ...

    def sigma(self, t: Array) -> Array: ...

    def log_snr(self, t: Array) -> Array:
        """Returns `log(alpha^2 / sigma^2)`, which decreases in t."""
        ...

    def time(self, log_snr: Array) -> Array:
        """Returns the time at which the log-SNR has the given value; the inverse of `log_snr`."""
        ...


class Apply(Protocol):
    """A network as a pure function. `key=None` disables dropout."""

    def __call__(self, params: Params, x: Array, c_noise: Array, cond: Cond, *, key: Array | None = None) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A change of some blocks of a network. It makes the predictions worse, so that guidance can move away from them.

    Attributes:
      kind: `identity`: in the self-attention of the blocks, each token attends to itself alone. `blur`: the queries of
        the self-attention are blurred over the image by a Gaussian. `skip`: the blocks are left out.
      layers: Numbers of the blocks from 0, in the order of the forward pass; in a U-Net, of those with self-attention.
        Empty for the block in the middle.
      sigma: Standard deviation of the blur, in tokens; infinite for the mean over the image.
    """

    kind: Literal["identity", "blur", "skip"]
    layers: tuple[int, ...] = ()
    sigma: float = math.inf


# Options of networks that change neither parameters nor, up to rounding, results. They may differ between training,
# resuming and sampling, because they depend on the machine.
MACHINE_OPTIONS = ("dtype", "kernel", "remat", "unroll")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as a pair of pure functions.

    Attributes:
      init: `init(key) -> params`.
      apply: The forward pass; see `Apply`.
      outputs: Output values per channel of x: 1, or 2 if the network has a second head (a learned variance).
      project: Applied to the parameters after `init` and after every optimizer step (forced weight normalization, for
        example), or None.
      scalar_conditions: Names of the scalars, each `[B]`, that the network receives in `cond` in addition to the noise
        label. `step_size`: for flow maps, the length of the step, or a function of it. `guidance_scale`: the
        scale that a guidance-distilled network reproduces.
      trainable: Regular expressions on the paths of the parameters that are trained unless a config says otherwise.
        None stands for all. An adapter names its own parameters.
      base: The key under which the parameters of an adapted network stand in `params`, or None.
      perturbed: `perturbed(perturbation)` returns the forward pass with some blocks changed. It raises InputError for
        `layers` if the network lacks these blocks, or cannot change them so. None if it has no such blocks.
      self_conditioning: Whether the network reads `cond["previous_x0"]`, which is 0 if it is absent and is never
        dropped.
      prepare: `prepare(params, cond) -> cond` computes what the network makes of the conditions alone, so that it is
        done once per sample and not once per step. `apply` accepts its result, and calls it for other conditions. None
        if there is nothing to compute.
      multiple: What the height and the width of x must be multiples of. None if they must be those that the network was
        built for.
    """

    init: Callable[[Array], Params]
    apply: Apply
    outputs: int = 1
    project: Callable[[Params], Params] | None = None
    scalar_conditions: tuple[str, ...] = ()
    trainable: tuple[str, ...] | None = None
    base: str | None = None
    perturbed: Callable[[Perturbation], Apply] | None = None
    self_conditioning: bool = False
    prepare: Callable[[Params, Cond], Cond] | None = None
    multiple: int | None = None


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A frozen autoencoder next to the network, which then models its latents.

    Attributes:
      params: The parameters, a pytree of arrays, or of their shapes to plan with. They are passed to the functions, and
        are no part of a train state.
      posterior: `posterior(params, x [B, ...]) -> moments [B, ...]`, what `sample` needs to know of x: the mean and the
        log-variance of a variational autoencoder, and the latents themselves of others.
      decode: `decode(params, z [B, ...]) -> x [B, ...]` in [-1, 1].
      shape: The shape of one latent.
      digest: SHA-256 of the parameters, which checkpoints record; empty if there are none.
      sample: `sample(moments [B, ...], key) -> z [B, ...]`, of unit scale. `key` draws the sample of a variational
        autoencoder; None takes the mean.
    """

    params: Params
    posterior: Callable[[Params, Array], Array]
    decode: Callable[[Params, Array], Array]
    shape: tuple[int, ...]
    digest: str = ""
    sample: Callable[[Array, Array | None], Array] = lambda moments, key: moments

    def encode(self, params: Params, x: Array, key: Array | None) -> Array:
        """Returns latents `[B, ...]` of x `[B, ...]`: `sample` of `posterior`."""
        return self.sample(self.posterior(params, x), key)

    def latent_spec(self, spec: Spec) -> Spec:
        """Returns the spec of the latents of data of a spec, with the same conditions."""
        return dataclasses.replace(spec, x=ArraySpec(self.shape, "latent", low=-1.0, high=1.0))


@dataclasses.dataclass(frozen=True)
class TextPart:
    """Where the output of one encoder is in the `Text` of several, as ranges `(start, stop)`.

    Attributes:
      tokens: Its tokens, on axis 1 of `Text.tokens`.
      features: Its features, on axis 2.
      pooled: Its features of `Text.pooled`; empty if it has none.
    """

    tokens: tuple[int, int]
    features: tuple[int, int]
    pooled: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """What turns captions and prompts into the condition `text` of the network.

    Attributes:
      tokenize: `tokenize(texts) -> tokens` on the host, a pytree of NumPy arrays with the leading axis of the texts: a
        `Text` of integers, or a dict of these by the names of `parts`. It can be pickled.
      condition: The condition that the network reads, of the kind `text`.
      params: The parameters, a pytree of arrays, or of their shapes to plan with. They are passed to `encode`, and are
        no part of a train state. None if `attach` adds them to the network.
      encode: `encode(params, tokens) -> Text` of vectors; None if `attach` does it.
      null: The `Text` `[1, ...]` that stands for a dropped one; None if the network has a learned one.
      parts: For encoders that can be dropped one by one, where each one's output is.
      digest: SHA-256 of the parameters and the tokenizer, which checkpoints record; empty if there are no parameters.
      tokenizer: The tokenizer as a text, if it was fitted to the data, for the checkpoints.
      attach: For an encoder that is trained with the network: `attach(network) -> network`, which reads integer tokens
        in place of vectors. `network` reads `condition`.
      start: The parameters that such an encoder starts from, a pytree of arrays; None: random ones.
      skipping: For CLIP, `skipping(count)` returns `encode` without the last `count` layers, in addition to those
        that it leaves out. None for other encoders.
      encode_null: Encodes what is given in place of a dropped text; `encode` if None.
    """

    tokenize: Callable[[Sequence[str]], Any]
    condition: ConditionSpec
    params: Params = None
    encode: Callable[[Params, Any], Text] | None = None
    null: Text | None = None
    parts: Mapping[str, TextPart] = dataclasses.field(default_factory=dict, hash=False)
    digest: str = ""
    tokenizer: str = ""
    attach: Callable[[Network], Network] | None = None
    start: Params = None
    skipping: Callable[[int], Callable[[Params, Any], Text]] | None = None
    encode_null: Callable[[Params, Any], Text] | None = None

    @property
    def record(self) -> dict[str, str]:
        """What checkpoints say of it, JSON-able."""
        return {"sha256": self.digest, "tokenizer": self.tokenizer}


@dataclasses.dataclass(frozen=True)
class Player:
    """One side of an objective that trains networks against each other.

    Attributes:
      networks: Names of the networks that the player's loss trains.
      every: The player makes a step at every step of the training whose number is divisible by this.
      averaged: Whether its networks have moving averages.
    """

    networks: tuple[str, ...]
    every: int = 1
    averaged: bool = True


class Objective(Protocol):
    """A training method: schedule, parameterization, time distribution and loss weighting, for training and sampling.

    Attributes:
      schedule: The noise schedule shared by training and sampling; for a learned one, its state before training.
      frozen: Names of networks that are not trained by gradients (a teacher, an EMA target). They have neither
        optimizer state nor EMA, and `denoiser` does not use them.

    An objective with several losses defines, in place of `loss`, `players: Mapping[str, Player]` and `losses`, which
    takes the arguments of `loss` and returns the loss `[B]` of each player by name, and metrics.

    An objective whose loss reads trained networks that nothing changes defines `pretrained: Mapping[str, Params]`, with
    names that are also in `frozen`; its option `NAME_path` says where they are. The loss finds them in `params`. They
    are in neither the train state nor its checkpoints, which record their SHA-256.

    An objective that trains an autoencoder defines `reconstruct(net, params, x [B, ...]) -> x [B, ...]`, and raises
    InputError for the schedule and the denoiser, since there is nothing to sample.
    """

    schedule: Schedule
    frozen: tuple[str, ...]

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        """Returns the dict of networks: `{"net": ...}` and any others that the method trains or reads.

        Args:
          teacher: The networks of the trained model that the objective was built with, if there is one. If it is
            omitted, the result has the right shapes but not the right values.
        """
        ...

    def schedule_for(self, params: Mapping) -> Schedule:
        """Returns the schedule to sample with."""
        ...

    def initial_state(self, params: Mapping) -> Mapping[str, Array]:
        """Returns the objective state before the first step, from the networks that `init` returns.

        The objective state holds what the method carries from step to step in addition to its parameters. It is stored
        in the train state.
        """
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
        """Runs before each step and returns the updated dict of networks and objective state.

        It updates what is not trained by gradients (an EMA target, the teacher of the next round, a codebook). The
        updates depend on the arguments alone, and are kept if the step is bad.
        """
        ...

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> Mapping[str, Array]:
        """Draws all random numbers of one loss, each entry `[B, ...]`.

        They are drawn for the whole batch, so that they depend on neither gradient accumulation nor sharding.
        """
        ...

    def update_state(
        self, objective_state: Mapping[str, Array], draws: Mapping[str, Array], loss: Any
    ) -> tuple[Mapping[str, Array], dict[str, Array]]:
        """Returns the objective state after a step, and metrics.

        Args:
          objective_state: What `before_step` returned.
          draws: What `draw` returned.
          loss: The losses of the whole batch, `[B]`, summed over players, or `for_state` in their place; see `loss`.
        """
        ...

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss `[B]` and scalar metrics. `batch["draws"]` must hold the result of `draw`.

        The entry `for_state` of the metrics, if there is one, is not a metric: `update_state` receives it in place of
        the loss. It is one array `[B, ...]`, or a dict of them: the part of the loss that depends on the time, or
        what else of the forward pass the objective state depends on.
        """
        ...

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        """Returns the denoiser of a trained model."""
        ...


class Sampler(Protocol):
    """One step of a solver, in the form of an optax transformation; `sampling.loop.sample` scans over it.

    As an optax transformation receives the parameters next to its state, a sampler receives x next to its state, which
    holds what it remembers of earlier steps. The caller may change x between two steps. `sampling.ode.first_order` has
    base classes that define everything but `step`.

    `t` and `s` are scalars with `t > s`; ODE solvers also integrate towards noise, with `s > t`. `keys` holds one key
    per sample, so that a sample does not depend on the others in its batch.

    Attributes:
      stochastic: Whether the sampler draws noise, in which case it does not solve an invertible ODE.
      uses_separate_eps: Whether it supports a noise that is not computed from x0 (`Denoised.x0_for_eps`).
      elementwise: Whether t and s may be arrays that broadcast with x, so that parts of x have different times.
      few_step: Whether it is for models of few steps, whose x0 is not a posterior mean; it checks their kind itself.
      brownian: Whether the noise is a function of the interval of times (`sampling.ode.brownian`), so that `step`
        receives the same keys at every step.
    """

    stochastic: bool
    uses_separate_eps: bool
    elementwise: bool
    few_step: bool
    brownian: bool

    def evaluations(self, steps: int, to_data: bool = True) -> int | None:
        """Returns how often `steps` steps call the denoiser; None if it varies.

        Args:
          to_data: Whether the last step ends at t = 0.
        """
        ...

    def init(self, x: Array, times: Array, index: Array | int = 0) -> Any:
        """Returns the state without any memory.

        Args:
          x: The initial x `[B, ...]`, at `times[index]`.
          times: All times.
          index: The number of the next step. It is greater than 0 where noise has been added to x, and the solver
            restarts without its history.
        """
        ...

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        """Takes the step from time t to time s.

        Returns:
          x at time s, the denoiser's x0 of the first evaluation, at x and t, and the state.
        """
        ...

    def time(self, state: Any, t: Array) -> Array:
        """Returns the time of x, which is t unless the sampler places inner points between the times of the grid."""
        ...

    def replace(self, state: Any, old: Array, new: Array) -> Any:
        """Returns the state after the caller has replaced x, from which the next step continues.

        It is also called with the initial x as both `old` and `new`, so that the state has a fixed structure.
        """
        ...


# model(params) -> (denoise, schedule): a trained model as a function of its dict of networks. `denoise(x, t, cond)`.
Model = Callable[[Params], tuple[Denoiser, Schedule]]


class SampleMetric(Protocol):
    """A metric of samples, computed from one batch after the other.

    A metric keeps what it needs of a batch in its state: sums, or small features, but not the images.

    Attributes:
      kind: `"samples"`.
      names: Names of the values that `result` returns.
      num: Number of samples.
      guidance: Guidance scale of the samples.
    """

    kind: Literal["samples"]
    names: tuple[str, ...]
    num: int
    guidance: float

    def init(self) -> Any:
        """Returns the state before the first batch."""
        ...

    def update(self, state: Any, images: Any, conditions: Mapping[str, Any]) -> Any:
        """Returns the state after a batch; it may change `state` in place.

        Args:
          images: NumPy array `[B, ...]` in [-1, 1]: images as they are saved, that is, rounded to 8 bits; points and
            latents unchanged.
          conditions: What each sample is conditioned on, such as `label [B]`; empty for data without conditions.
        """
        ...

    def result(self, state: Any) -> Mapping[str, float]:
        """Returns the values by name."""
        ...


class ModelMetric(Protocol):
    """A metric of a model itself.

    Attributes:
      kind: `"model"`.
      names: Names of the values that a call returns.
    """

    kind: Literal["model"]
    names: tuple[str, ...]

    def __call__(self, model: Model, params: Params, key: Array) -> Mapping[str, float]:
        """Returns the values by name.

        Args:
          model: Called inside of what the metric compiles, with `params` as an argument of the compiled function, so
            that measuring the model at another step does not compile again.
          params: The dict of networks.
        """
        ...


class AutoencoderMetric(Protocol):
    """A metric of an autoencoder that an objective trains (`Objective`, `reconstruct`).

    Attributes:
      kind: `"autoencoder"`.
      names: Names of the values that a call returns.
    """

    kind: Literal["autoencoder"]
    names: tuple[str, ...]

    def check(self, network: Any) -> None:
        """Raises InputError for an `AutoencoderApply` that it cannot measure."""
        ...

    def __call__(self, network: Any, params: Params) -> Mapping[str, float]:
        """Returns the values by name.

        Args:
          network: The functions of the autoencoder, an `AutoencoderApply`.
          params: Its parameters.
        """
        ...


Metric = SampleMetric | ModelMetric | AutoencoderMetric
