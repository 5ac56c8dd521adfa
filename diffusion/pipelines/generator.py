"""Draws samples from a model: a sampler, a grid and guidance, as a config's sections name them, in one compiled
scan."""

import copy
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion.core.build import build, check, find
from diffusion.core.checks import at_most
from diffusion.core.progress import Progress
from diffusion.core.types import Array, Denoiser, InputError, Network, Objective, Params, Schedule, Spec
from diffusion.distributed import sharding
from diffusion.sampling import guidance as guidances
from diffusion.sampling import loop

PLACING = ("steps", "grid", "unroll")  # the sampler section's own keywords; all others are the sampler's
MOST_STEPS, MOST_SAMPLES = 10**5, 10**7
WRAPPERS = ("rescale", "interval", "threshold")  # from inside out: what is guided, where, and in which range


class Generator:
    """Labels, seed, guidance's numbers and the times of a grid do not recompile it; another number of steps does.

    Args:
      sampler: the config's section: the sampler's name and keywords, `steps`, the `grid` they lie on, and `unroll`.
      guidance: the config's section: its name and keywords, and `rescale`, `interval` and `threshold`, each a section
        of its own. Guidance by a scale of 1 is none, and costs half as much.
      cond_drop_rate: what the model was trained with.
      worse: the other model of autoguidance, with its parameters bound.
      always_guided: compile the guidance even for a scale of 1, for scales that come later.

    Raises:
      InputError: a bad section, or a sampler or guidance that the model does not suit.
    """

    def __init__(
        self, network: Network, objective: Objective, spec: Spec, mesh: Mesh, *,
        sampler: Mapping[str, Any], guidance: Mapping[str, Any], cond_drop_rate: float,
        worse: tuple[Network, Objective, Params] | None = None, always_guided: bool = False,
    ):  # fmt: skip
        self.objective, self.spec, self.mesh = objective, spec, mesh
        self.cond_drop_rate = cond_drop_rate
        placing = {key: sampler[key] for key in PLACING if key in sampler}
        self.solver = build("samplers", {key: sampler[key] for key in sampler if key not in placing}, field="sampler")
        guide, static, self.numbers = _read_guidance(guidance)
        self.guided = always_guided or not is_plain(guidance)
        self._check_guidance(guidance)
        self.times = _times(objective.schedule, **placing)
        unroll = placing.get("unroll", 1)
        worse_params = None if worse is None else worse[2]
        if worse is None and self.guided and guidance["name"] == "autoguidance":
            raise InputError("guidance.name", "autoguidance reads another run, and training does not; train with cfg, "
                             "and sample with --guidance=autoguidance:...")  # fmt: skip

        def denoiser(params: Params, worse_params: Params, schedule: Schedule, numbers: Mapping) -> Denoiser:
            denoise = plain = objective.denoiser(network.apply, params)
            if self.guided:
                given = {"schedule": schedule, "plain": plain}
                if worse is not None:
                    given["worse"] = worse[1].denoiser(worse[0].apply, worse_params)
                denoise = _wrap(guide, denoise, numbers["guidance"], static["guidance"], given)
            for name in WRAPPERS:
                if name in numbers and (self.guided or name == "threshold"):
                    given = {"schedule": schedule, "plain": plain}
                    denoise = _wrap(getattr(guidances, name), denoise, numbers[name], static[name], given)
            return denoise

        def draw(
            params: Params, worse_params: Params, keys: Array, cond: Mapping[str, Array], times: Array, numbers: Mapping
        ) -> Array:
            schedule = objective.schedule_for(params)
            denoise = loop.bind(denoiser(params, worse_params, schedule, numbers), cond)
            x = loop.prior(schedule, times[0], keys, spec.shape)
            return loop.sample(denoise, schedule, self.solver, x, times, keys, unroll=unroll)

        self._shapes = jax.eval_shape(lambda: objective.init(network, jax.random.key(0)))
        # Every process has all samples.
        self._draw = jax.jit(draw, out_shardings=sharding.replicated(mesh))
        self._worse, self._compiled = worse_params, {}
        self._trace()

    def with_settings(self, *, sampler: Mapping[str, Any], guidance: Mapping[str, Any]) -> "Generator":
        """The same with other times and other numbers of guidance; what is compiled is shared."""
        other = copy.copy(self)
        placing = {key: sampler[key] for key in PLACING if key in sampler}
        other.times = _times(self.objective.schedule, **placing)
        _, _, other.numbers = _read_guidance(guidance)
        other._check_guidance(guidance)
        other._trace()
        return other

    @property
    def compilations(self) -> int:
        return len(self._compiled)

    def __call__(
        self, params: Params, labels: Sequence[int] | None, num: int, *, seed: int, batch_size: int = 250,
        title: str | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Draws `num` samples, float32 `[num, ...]`.

        Args:
          labels: `[num]`, or None where the data has no classes.
          seed: sample i depends on this and i alone.
          batch_size: samples at a time, rounded up to a multiple of the mesh's data x fsdp.
          title: of the progress line; None for none.
        """
        shards = sharding.batch_shards(self.mesh)
        batch_size = -(-min(batch_size, num) // shards) * shards
        place = sharding.by_example(self.mesh)

        def draw(keys: Array, cond: Mapping[str, np.ndarray]) -> Array:
            keys, cond = sharding.spread((keys, cond), place)
            args = params, self._worse, keys, cond, self.times, self.numbers
            size = len(self.times), batch_size
            if size not in self._compiled:
                self._compiled[size] = self._draw.lower(*args).compile()
            return self._compiled[size](*args)

        cond = {} if labels is None else {"label": np.asarray(labels, np.int32)}
        progress = Progress(title, num) if title else None
        drawn = []
        for x in loop.in_batches(draw, cond, num, batch_size, jax.random.key(seed)):
            drawn.append(x)
            if progress:
                progress.update(sum(map(len, drawn)))
        if progress:
            progress.close()
        return np.concatenate(drawn)

    def _check_guidance(self, guidance: Mapping[str, Any]) -> None:
        if is_plain(guidance) or guidance["name"] in ("autoguidance", "guidance_embedding"):
            return
        field = "guidance.scale"
        if not self.spec.num_classes:
            raise InputError(field, "the data has no classes to guide by; use 1")
        if not self.cond_drop_rate and not guidance.get("negative"):
            problem = "the model was trained with train.cond_drop_rate = 0; use 1, or train it with a rate above 0"
            raise InputError(field, problem)

    def _trace(self) -> None:
        """Once without computing anything, so that what the model cannot do is refused before anything is drawn."""
        cond = {"label": jnp.zeros(1, jnp.int32)} if self.spec.num_classes else {}
        keys = jax.random.split(jax.random.key(0), 1)
        jax.eval_shape(self._draw, self._shapes, self._worse, keys, cond, self.times, self.numbers)


def _read_guidance(section: Mapping[str, Any]) -> tuple[Any, dict[str, dict], dict[str, dict]]:
    """The guidance function; the keywords it and each wrapper are built with; and those that are numbers to be
    traced."""
    guide = find("guidance", section.get("name", ""), field="guidance.name")
    if section["name"] in WRAPPERS:
        raise InputError("guidance.name", f"{section['name']} goes around guidance: set guidance.{section['name']}")
    own = {key: value for key, value in section.items() if key not in ("name", "worse", *WRAPPERS)}
    for name in WRAPPERS:
        if not isinstance(section.get(name, {}), Mapping):
            raise InputError(f"guidance.{name}", f"must be a section, as {{'name': value}}, got {section[name]!r}")
    keywords = {"guidance": own} | {name: dict(section[name]) for name in WRAPPERS if name in section}
    static, numbers = {}, {}
    for name, given in keywords.items():
        function = guide if name == "guidance" else getattr(guidances, name)
        field = name if name == "guidance" else f"guidance.{name}"
        parameters = inspect.signature(function).parameters
        later = ("denoise", "guided", "plain", "schedule", "worse")
        check(function, given, field=field, later=[key for key in later if key in parameters])
        traced = {key for key in given if Array in typing.get_args(parameters[key].annotation)}
        numbers[name] = {key: jnp.float32(value) for key, value in given.items() if key in traced}
        static[name] = {key: value for key, value in given.items() if key not in traced}
    interval = keywords.get("interval", {})
    low, high = interval.get("low", 0.0), interval.get("high", float("inf"))
    if not low < high:
        raise InputError("guidance.interval", f"is upside down: low = {low} must be below high = {high}")
    return guide, static, numbers


def check_numbers(*, seed: int, **counts: int) -> None:
    """Refuses what the flags of these names cannot be."""
    if not 0 <= seed < 2**32:
        raise InputError("--seed", f"must be from 0 to 2^32 - 1, got {seed}")
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"--{name}", f"must be at least 1, got {count}")
        at_most(MOST_SAMPLES, count, f"--{name}")


def is_plain(section: Mapping[str, Any]) -> bool:
    """Whether the guidance does nothing; `guidance_embedding` tells the network a scale of 1 like any other."""
    return section["name"] in ("cfg", "apg", "autoguidance") and section.get("scale", 1.0) == 1.0


def structure(section: Mapping[str, Any]) -> Any:
    """What of guidance is compiled in: all but its numbers."""
    _, static, numbers = _read_guidance(section)
    traced = {name: sorted(given) for name, given in numbers.items()}
    return section["name"], section.get("worse"), static, traced


def _wrap(function: Any, denoise: Denoiser, numbers: Mapping, static: Mapping, given: Mapping[str, Any]) -> Denoiser:
    """The denoiser wrapped, with those of `given` that the function takes."""
    taken = {key: value for key, value in given.items() if key in inspect.signature(function).parameters}
    try:
        return function(denoise, **numbers, **static, **taken)
    except InputError as error:
        raise error.within(f"guidance.{function.__name__}") from None


def _times(
    schedule: Schedule, steps: int | None = None, grid: str | Mapping[str, Any] = "trailing", unroll: int = 1
) -> Array:
    """The times that a `sampler` section names, `[steps + 1]`."""
    for name, value in (("steps", steps), ("unroll", unroll)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"sampler.{name}", f"must be an integer of at least 1, got {value}")
        at_most(MOST_STEPS, value, f"sampler.{name}")
    options = {"name": grid} if isinstance(grid, str) else dict(grid)
    make = find("grids", options.pop("name", ""), field="sampler.grid")
    check(make, options, field="sampler.grid", later=("schedule", "steps"))
    try:
        times = make(schedule, steps, **options).astype(np.float32)
    except InputError as error:
        raise error.within("sampler.grid") from None
    if not (np.isfinite(times).all() and (np.diff(times) < 0).all()):
        raise InputError("sampler.grid", f"its times do not fall in steps that float32 can tell apart; use fewer than "
                         f"{steps} steps or another grid")  # fmt: skip
    return jnp.asarray(times)
