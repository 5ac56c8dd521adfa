"""Draws samples from a model with a sampler, a time grid and guidance, in one compiled scan."""

import copy
import inspect
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion.core.build import build, check, find, model_spec
from diffusion.core.checks import at_most
from diffusion.core.progress import Progress
from diffusion.core.types import (
    Array,
    Autoencoder,
    Cond,
    Denoiser,
    InputError,
    Network,
    Objective,
    Params,
    Perturbation,
    Sampler,
    Schedule,
    Spec,
    TextEncoder,
)
from diffusion.distributed import activation_sharding, sharding
from diffusion.encoders import text_conditions
from diffusion.sampling import guidance as guidances
from diffusion.sampling import loop
from diffusion.sampling.editing.common import Editing, Hooks, Known, Sampling

PLACING = ("steps", "grid", "unroll")  # options of the sampler section that are not the sampler's own
PERTURBED = ("pag", "seg", "slg")  # guidance by the network itself, also around another guidance
# Applied around the guidance, in this order.
WRAPPERS = (*PERTURBED, "scale_schedule", "rescale", "interval", "threshold", "cads")
WITHOUT_GUIDANCE = ("threshold", "cads")  # the wrappers that also apply to a model without guidance
# The scale at which guidance returns the conditional prediction.
NEUTRAL = {"cfg": 1.0, "apg": 1.0, "autoguidance": 1.0, "icg": 1.0} | dict.fromkeys(PERTURBED, 0.0)
WITHOUT_DROPPED_CONDITION = ("autoguidance", "guidance_embedding", "icg", *PERTURBED)  # work for any training
# Arguments of guidance that no config sets.
SUPPLIED = ("denoise", "guided", "plain", "schedule", "worse", "perturbed", "keys", "conditions")
MOST_STEPS, MOST_SAMPLES = 10**5, 10**7


class Generator:
    """Draws samples from a model.

    Other conditions, seeds, times and numbers of guidance do not recompile it; another number of steps does.

    Args:
      network, objective, spec: The model, and what its samples look like.
      mesh: The devices; a batch is split over data x fsdp.
      sampler: A config's section: the sampler's `name` (or a `Sampler`) and options, `steps`, `grid` and `unroll`.
      guidance: A config's section: its `name` and options, and optionally any of `WRAPPERS`, each a section. Guidance
        with a neutral scale, such as 1 for `cfg`, is left out, which halves the cost.
      cond_drop_rate: The share of examples that the model was trained on without conditions.
      worse: The other model of autoguidance, and its parameters.
      always_guided: Compile the guidance even for a scale of 1, for use with other scales later.
      text_encoder: Encodes the text of a batch, once for all steps; None if the model reads none.
      autoencoder: The autoencoder whose latents the network models, and which decodes the samples; None if it models
        the data themselves.
      after_step: Changes x after each step; see `sampling.loop.sample`.
      editing: How samples agree with what is known of them, in place of `after_step`; see `sampling.editing`.
      moments: See `conditions.moments_of`.

    Raises:
      InputError: A section is invalid, or the model does not support the sampler or the guidance.
    """

    def __init__(
        self, network: Network, objective: Objective, spec: Spec, mesh: Mesh, *,
        sampler: Mapping[str, Any], guidance: Mapping[str, Any], cond_drop_rate: float,
        worse: tuple[Network, Objective, Params] | None = None, always_guided: bool = False,
        autoencoder: Autoencoder | None = None, text_encoder: TextEncoder | None = None,
        after_step: loop.AfterStep | None = None, editing: Editing | None = None,
        moments: tuple[Array, Array] | None = None,
    ):  # fmt: skip
        self.objective, self.spec, self.mesh, self.text_encoder = objective, spec, mesh, text_encoder
        self.conditions = model_spec(spec, autoencoder, text_encoder).conditions
        self.cond_drop_rate, self.editing = cond_drop_rate, editing
        placing, self.solver = _read_sampler(sampler)
        guide, static, self.numbers = _read_guidance(guidance)
        self.guided = always_guided or not is_neutral(guidance)
        self._check_guidance(guidance)
        self._place(placing)
        unroll = placing.get("unroll", 1)
        shape = spec.shape if autoencoder is None else autoencoder.shape
        self._height = shape[0]
        # Parameters that the caller does not pass.
        self._others = {
            "worse": None if worse is None else worse[2],
            "autoencoder": None if autoencoder is None else autoencoder.params,
            "text_encoder": None if text_encoder is None else text_encoder.params,
            "null_text": None if text_encoder is None else text_encoder.null,
        }
        if worse is None and self.guided and guidance["name"] == "autoguidance":
            raise InputError("guidance.name", "autoguidance reads another run, and training does not; train with cfg, "
                             "and sample with --guidance=autoguidance:...")  # fmt: skip

        def denoiser(params: Params, others: Mapping, schedule: Schedule, numbers: Mapping, keys: Array) -> Denoiser:
            denoise = plain = objective.denoiser(network.apply, params)

            def perturbed(perturbation: Perturbation) -> Denoiser:
                if network.perturbed is None:
                    raise InputError("layers", "this network has no blocks to perturb; use unet, dit, uvit or edm2")
                return objective.denoiser(network.perturbed(perturbation), params)

            supplied = {"schedule": schedule, "plain": plain, "perturbed": perturbed, "keys": keys,
                        "conditions": self.conditions}  # fmt: skip
            if self.guided:
                more = {} if worse is None else {"worse": worse[1].denoiser(worse[0].apply, others["worse"])}
                denoise = _wrap(guide, denoise, numbers["guidance"], static["guidance"], {**supplied, **more})
            for name in WRAPPERS:
                if name in numbers and (self.guided or name in WITHOUT_GUIDANCE):
                    denoise = _wrap(getattr(guidances, name), denoise, numbers[name], static[name], supplied)
            return denoise

        def encoded(others: Mapping, x: Array) -> Array:
            return x if autoencoder is None else autoencoder.encode(others["autoencoder"], x, None)

        def draw(
            params: Params, others: Mapping, keys: Array, cond: Cond, start: Array | None, known: Known | None,
            times: Array, first: Array | None, numbers: Mapping, renoise: bool,
        ) -> Array:  # fmt: skip
            schedule = objective.schedule_for(params)
            cond = text_conditions.encoded(text_encoder, others["text_encoder"], others["null_text"], cond)
            if network.prepare is not None:
                cond = network.prepare(params["net"], cond)
            guided = denoiser(params, others, schedule, numbers, keys)
            if start is None:
                x = loop.prior(schedule, times[0], keys, shape, moments)
            else:
                x = loop.noised(schedule, encoded(others, start), times[first], keys)
            hooks = Hooks(loop.bind(guided, cond), after_step)
            if known is not None:
                inner = known if autoencoder is None else Known(encoded(others, known.image), self._reduced(known.mask))
                hooks = editing.hooks(Sampling(guided, schedule, cond, inner, times, keys))
            x = loop.sample(
                hooks.denoise, schedule, self.solver, x, times, keys, first=first, after_step=hooks.after_step,
                renoise=renoise,
                self_conditioning=getattr(objective, "self_conditioning", False),
                memory=self.guided and bool(static["guidance"].get("momentum")), unroll=unroll,
            )  # fmt: skip
            if known is not None and editing.keeps is not None and autoencoder is not None:
                x = jnp.where(editing.keeps(inner), inner.image, x)
            x = x if autoencoder is None else autoencoder.decode(others["autoencoder"], x)
            if known is not None and editing.keeps is not None:
                x = jnp.where(editing.keeps(known), known.image, x)
            return x

        self._shapes = jax.eval_shape(lambda: objective.init(network, jax.random.key(0)))
        if mesh.size > 1:
            draw = activation_sharding.enabled(draw, sharding.by_example(mesh))
        # Every process receives all samples.
        self._draw = jax.jit(draw, out_shardings=sharding.replicated(mesh), static_argnums=9)
        self._compiled = {}
        self._trace()

    def with_settings(self, *, sampler: Mapping[str, Any], guidance: Mapping[str, Any]) -> "Generator":
        """Returns a generator with other times and numbers of guidance, which shares the compiled functions."""
        other = copy.copy(self)
        placing, _ = _read_sampler(sampler, build_it=False)
        other._place(placing)
        _, _, other.numbers = _read_guidance(guidance)
        other._check_guidance(guidance)
        other._trace()
        return other

    @property
    def compilations(self) -> int:
        """The number of compiled functions: one for each number of times, batch size and set of conditions."""
        return len(self._compiled)

    @property
    def evaluations(self) -> int | None:
        """The number of evaluations of the denoiser per sample; None if it varies."""
        return loop.evaluations(self.solver, np.asarray(self.times))

    def __call__(
        self, params: Params, cond: Cond, num: int, *, seed: int, batch_size: int = 250,
        title: str | None = None, start: np.ndarray | None = None, strength: float = 1.0, known: Known | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Draws `num` samples, float32 `[num, ...]`; see `batches`."""
        drawn = self.batches(
            params, cond, num, seed=seed, batch_size=batch_size, title=title, start=start, strength=strength,
            known=known,
        )  # fmt: skip
        return np.concatenate([x for x, _ in drawn])

    def batches(
        self, params: Params, cond: Cond, num: int, *, seed: int, batch_size: int = 250, title: str | None = None,
        first: int = 0, start: np.ndarray | None = None, strength: float = 1.0, known: Known | None = None,
    ) -> Iterator[tuple[np.ndarray, Cond]]:  # fmt: skip
        """Draws samples in batches, and yields each, float32 `[B, ...]`, with its conditions.

        Args:
          params: The dict of networks.
          cond: The conditions of the data, `[num, ...]` each; empty where it has none. `prompt`, texts `[num]`, is not
            one of the model, and is yielded with the samples.
          num: Number of all samples.
          seed: Sample i depends on the seed and i alone.
          batch_size: Number of samples drawn at once, rounded up to a multiple of the mesh's data x fsdp.
          title: Title of the progress line; None shows no progress.
          first: Index of the first sample to yield, below `num`. The samples are the same bits as with 0, because the
            batches that are drawn begin at the same indices.
          start: Clean examples `[num, ...]` in [-1, 1] to start from, with noise added, in place of pure noise.
          strength: The share of the steps that runs with `start`, the last ones, in (0, 1].
          known: What is known of the samples, `[num, ...]` each, for `editing`.

        Raises:
          InputError: `start` has another shape, or `strength` leaves no step.
        """
        if start is not None and (start.shape != (num, *self.spec.shape) or start.dtype.kind != "f"):
            expected = [num, *self.spec.shape]
            raise InputError("start", f"must be floats {expected} in [-1, 1], got {start.dtype}{list(start.shape)}")
        times = self.times
        if self._is_learned:
            times = sampling_times(self.objective.schedule_for(params), **self.placing)
        times = times if known is None else jnp.asarray(self.editing.times(np.asarray(times)))
        first_step = None if start is None else np.int32(_first_step(times, strength))
        renoise = _rises(times)
        shards = sharding.batch_shards(self.mesh)
        batch_size = -(-min(batch_size, num) // shards) * shards
        place = sharding.by_example(self.mesh)

        def draw(keys: Array, arrays: Cond) -> Array:
            keys, cond = sharding.spread((keys, dict(arrays)), place)
            begin, known = cond.pop("start", None), cond.pop("known", None)
            args = params, self._others, keys, cond, begin, known, times, first_step, self.numbers
            size = len(times), renoise, batch_size, start is None, jax.tree.structure((cond, known))
            if size not in self._compiled:
                self._compiled[size] = self._draw.lower(*args, renoise).compile()
            return self._compiled[size](*args)

        given = jax.tree.map(np.asarray, dict(cond))
        prompts = given.pop("prompt", None)
        if "label" in given:
            given["label"] = given["label"].astype(np.int32)
        arrays = given if start is None else {**given, "start": np.asarray(start, np.float32)}
        arrays = arrays if known is None else {**arrays, "known": known}
        progress = Progress(title, num, done=first) if title else None
        done = first // batch_size * batch_size
        try:
            for x in loop.in_batches(draw, arrays, num, batch_size, jax.random.key(seed), done):
                begin, done = max(first, done), done + len(x)
                if progress:
                    progress.update(done)
                rows = slice(begin, done)
                values = jax.tree.map(lambda value, rows=rows: value[rows], given)
                yield x[begin - done :], values if prompts is None else {**values, "prompt": prompts[rows]}
        finally:
            if progress:
                progress.close()

    def _reduced(self, mask: Array | None) -> Array | None:
        """Returns a mask of images at the size of the latents: that of the first pixel of each."""
        if mask is None:
            return None
        factor = self.spec.shape[0] // self._height
        return mask[:, ::factor, ::factor]

    @property
    def _is_learned(self) -> bool:
        """Whether the schedule is learned, so that a grid in noise levels depends on the parameters."""
        return hasattr(self.objective.schedule, "at")

    def _place(self, placing: Mapping[str, Any]) -> None:
        """Sets the times. Those of a learned schedule are not known yet; `trig`, which has every noise level, stands
        for it."""
        schedule = build("schedules", "trig") if self._is_learned else self.objective.schedule
        self.placing, self.times = placing, sampling_times(schedule, **placing)

    def _check_guidance(self, guidance: Mapping[str, Any]) -> None:
        if guidance["name"] == "cfg_pp" and guidance.get("scale", 0.0) > 1:
            problem = f"is between the two predictions for cfg_pp, from 0 to 1; got {guidance['scale']:g}"
            raise InputError("guidance.scale", f"{problem}; use cfg for a scale above 1")
        if is_neutral(guidance) or guidance["name"] in WITHOUT_DROPPED_CONDITION or callable(guidance["name"]):
            return
        if not self.conditions:
            raise InputError("guidance.scale", "the data has no conditions to guide by; use 1, or pag, for example")
        if not self.cond_drop_rate and not guidance.get("negative"):
            problem = "the model was trained with train.cond_drop_rate = 0; use 1, icg, or train it with a rate above 0"
            raise InputError("guidance.scale", problem)

    def _trace(self) -> None:
        """Traces the function, so that what the model does not support is reported before anything is computed."""
        keys = jax.random.split(jax.random.key(0), 1)
        cond = self.spec.zeros(1)
        if self.text_encoder is not None:
            cond["text"] = self.text_encoder.tokenize([""])
        arrays = self._shapes, self._others, keys, cond, None, None, self.times, None, self.numbers
        jax.eval_shape(lambda *arrays: self._draw(*arrays, _rises(self.times)), *arrays)


def check_numbers(prefix: str = "", *, seed: int, **counts: int) -> None:
    """Checks the values of these names.

    Args:
      prefix: What precedes the names in an error: `--` for flags.
      seed, counts: The values.

    Raises:
      InputError: The seed is not in [0, 2^32), or a count is not in [1, 10^7].
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"{prefix}seed", f"must be from 0 to 2^32 - 1, got {seed}")
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{prefix}{name}", f"must be at least 1, got {count}")
        at_most(MOST_SAMPLES, count, f"{prefix}{name}")


def is_neutral(section: Mapping[str, Any]) -> bool:
    """Returns whether a guidance section returns the conditional prediction unchanged."""
    if section["name"] not in list(NEUTRAL) or any(section.get(name) is not None for name in PERTURBED):
        return False
    return section.get("scale", 1.0) == NEUTRAL[section["name"]]


def not_a_section(wrapper: str, value: Any) -> InputError:
    """Returns the error for a wrapper of guidance that is not a section of options."""
    parameters = inspect.signature(getattr(guidances, wrapper)).parameters
    option = next((key, p.default) for key, p in parameters.items() if p.default is not inspect.Parameter.empty)
    return InputError(f"guidance.{wrapper}", f"must be a section of options, as {dict([option])}, got {value!r}")


def structure(section: Mapping[str, Any]) -> Any:
    """Returns what is compiled into a function with this guidance: everything except its numbers."""
    _, static, numbers = _read_guidance(section)
    static = jax.tree.map(lambda leaf: leaf.tolist() if hasattr(leaf, "tolist") else leaf, static)
    return section["name"], section.get("worse"), static, str(jax.tree.structure(numbers))


def sampling_times(
    schedule: Schedule, steps: int | None = None, grid: str | Mapping[str, Any] = "trailing", unroll: int = 1
) -> Array:
    """Returns the times of a `sampler` section, falling, `[steps + 1]`; those of some grids rise in between.

    A last step that does not end at t = 0 may have length 0.

    Raises:
      InputError: The number of steps is invalid, the times rise although the grid does not say so (`may_rise`), or
        float32 cannot tell them apart.
    """
    for name, value in (("steps", steps), ("unroll", unroll)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"sampler.{name}", f"must be an integer of at least 1, got {value}")
        at_most(MOST_STEPS, value, f"sampler.{name}")
    options = dict(grid) if isinstance(grid, Mapping) else {"name": grid}
    make = find("grids", options.pop("name", ""), field="sampler.grid")
    check(make, options, field="sampler.grid", later=("schedule", "steps"))
    try:
        times = np.asarray(make(schedule, steps, **options), np.float32)
    except InputError as error:
        raise error.within("sampler.grid") from None
    at_most(MOST_STEPS, len(times) - 1, "sampler.grid")
    moves = np.diff(times)
    allowed = (moves < 0) | ((moves > 0) & getattr(make, "may_rise", False))
    allowed[-1:] |= (moves[-1:] == 0) & (times[-1:] > 0)
    if not np.isfinite(times).all() or not allowed.all():
        raise InputError("sampler.grid", "its times do not fall strictly in float32; use fewer than "
                         f"{steps} steps or another grid")  # fmt: skip
    return jnp.asarray(times)


def _rises(times: Array) -> bool:
    """Returns whether the times rise anywhere, where noise is added; this is compiled in."""
    return bool((np.diff(times) > 0).any())


def _first_step(times: Array, strength: float) -> int:
    """Returns the index of the time from which min(int(steps * strength), steps) steps are left.

    If the times also rise, a step is one to a time below all before it.
    """
    lows = np.minimum.accumulate(np.asarray(times))
    steps = np.flatnonzero(np.diff(lows, prepend=np.inf) < 0)
    count = min(int((len(steps) - 1) * strength), len(steps) - 1) if 0 < strength <= 1 else 0
    if not count:
        raise InputError(
            "strength", f"must be in (0, 1], and leave at least one of {len(steps) - 1} steps; got {strength}"
        )
    return int(steps[-1 - count])


def _read_sampler(section: Mapping[str, Any], build_it: bool = True) -> tuple[dict[str, Any], Sampler | None]:
    """Returns the options of the time grid, and the sampler."""
    placing = {key: section[key] for key in PLACING if key in section}
    own = {key: value for key, value in section.items() if key not in PLACING}
    if not build_it or hasattr(own.get("name"), "step"):
        return placing, own.get("name")
    return placing, build("samplers", own, field="sampler")


def _read_guidance(section: Mapping[str, Any]) -> tuple[Callable, dict[str, dict], dict[str, dict]]:
    """Returns the guidance function, and for it and each wrapper the static options and those that are traced."""
    guide = find("guidance", section.get("name", ""), field="guidance.name")
    if section["name"] in WRAPPERS and section["name"] not in PERTURBED:
        raise InputError("guidance.name", f"{section['name']} wraps guidance: set guidance.{section['name']}")
    keywords = {"guidance": {k: v for k, v in section.items() if k not in ("name", "worse", *WRAPPERS)}}
    for name in WRAPPERS:
        if section.get(name) is not None:
            if not isinstance(section[name], Mapping):
                raise not_a_section(name, section[name])
            keywords[name] = dict(section[name])
    static, numbers = {}, {}
    for name, given in keywords.items():
        function = guide if name == "guidance" else getattr(guidances, name)
        field = name if name == "guidance" else f"guidance.{name}"
        parameters = inspect.signature(function).parameters
        check(function, given, field=field, later=[key for key in SUPPLIED if key in parameters])
        traced = {key for key in given if _is_traced(parameters[key].annotation)}
        numbers[name] = {key: _number(value) for key, value in given.items() if key in traced}
        static[name] = {key: value for key, value in given.items() if key not in traced}
    interval = keywords.get("interval", {})
    low, high = interval.get("low", 0.0), interval.get("high", float("inf"))
    if not low < high:
        raise InputError("guidance.interval", f"low = {low} must be below high = {high}")
    return guide, static, numbers


def _is_traced(annotation: Any) -> bool:
    """Returns whether a keyword is a number, or a mapping to numbers, that may change without recompilation."""
    kinds = typing.get_args(annotation)
    return Array in kinds or any(map(_is_traced, kinds))


def _number(value: Any) -> Any:
    """Returns a traced keyword. JAX sorts the keys of a dict, but not of an `OrderedDict`."""
    if isinstance(value, Mapping):
        return OrderedDict((key, jnp.float32(number)) for key, number in value.items())
    return jnp.float32(value)


def _wrap(function: Any, denoise: Denoiser, numbers: Mapping, static: Mapping, supplied: Mapping[str, Any]) -> Denoiser:
    """Applies guidance to a denoiser, with those of `supplied` that the function accepts."""
    accepted = {key: value for key, value in supplied.items() if key in inspect.signature(function).parameters}
    try:
        return function(denoise, **numbers, **static, **accepted)
    except InputError as error:
        raise error.within(f"guidance.{function.__name__}") from None
