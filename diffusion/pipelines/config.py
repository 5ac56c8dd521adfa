"""Reads, overrides, completes and checks configs.

A config file defines `get_config()`, which returns an `ml_collections.ConfigDict` of sections. It spells only what
differs from the defaults. In the library a config is a plain dict with tuples for lists. `resolve` adds the default of
every option, read from the signatures of the parts, so each option can be overridden by its path
(`objective.schedule.beta_end`) and a checkpoint records what a run used.
"""

import ast
import contextlib
import difflib
import inspect
import os
import re
import runpy
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from glob import glob
from typing import Any, Literal

import numpy as np
import optax

from diffusion.core.build import call, check, defaults, find, is_a, is_external, names
from diffusion.core.checks import at_least, at_most
from diffusion.core.types import InputError, Spec
from diffusion.distributed.mesh import make_mesh
from diffusion.distributed.sharding import FSDP_MIN_SIZE, Rule
from diffusion.pipelines.generator import MOST_SAMPLES, PLACING, SUPPLIED, WRAPPERS, not_a_section, sampling_times
from diffusion.sampling import guidance
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.options import CONFIG_VERSION, CheckpointOptions, Options

REQUIRED = ("data", "objective", "network", "train")
SAMPLER = {"name": "ddim", "steps": 50}
GUIDANCE = {"name": "cfg", "scale": 1.0}
SUPPLIED_TO_NETWORKS = ("shape", "num_classes", "conditions")
SUPPLIED_TO_AUTOENCODERS = ("shape", "weights")
SUPPLIED_TO_TEXT_ENCODERS = ("weights", "place", "stored", "captions", "num_captions")


def sharding_options(
    rules: tuple[Rule, ...] = (), sequence: Literal["model"] | None = None, fsdp_min_size: int = FSDP_MIN_SIZE
) -> dict[str, Any]:
    """Returns the `sharding` section; see `training.program.make_program`."""
    return {"rules": rules, "sequence": sequence, "fsdp_min_size": fsdp_min_size}


def eval_options(
    data: Mapping[str, Any], metrics: Mapping[str, Any], every: int = 0, batch_size: int = 250
) -> dict[str, Any]:
    """Returns the `eval` section.

    Args:
      data: The held-out data.
      metrics: The keywords of each metric by its name.
      every: Steps of the training between two evaluations; 0 evaluates only by `experiments.evaluate`.
      batch_size: Number of samples that these evaluations draw at once.
    """
    at_least(0, every=every)
    at_least(1, batch_size=batch_size)
    at_most(MOST_SAMPLES, batch_size, "batch_size")
    if every and not metrics:
        raise InputError("every", "there is nothing to evaluate; set eval.metrics, or every to 0")
    return {"data": data, "metrics": metrics, "every": every, "batch_size": batch_size}


# Sections that configure one function each, and the arguments of it that the config does not set.
SECTIONS = {
    "optimizer": (make_optimizer, ("steps",)),
    "ema": (make_ema, ()),
    "train": (Options, ()),
    "checkpoint": (CheckpointOptions, ()),
    "mesh": (make_mesh, ("devices",)),
    "sharding": (sharding_options, ()),
}
FAMILIES = {
    ("data",): "data",
    ("autoencoder",): "autoencoders",
    ("text_encoder",): "text_encoders",
    ("objective",): "objectives",
    ("network",): "networks",
    ("sampler",): "samplers",
    ("sampler", "grid"): "grids",
    ("guidance",): "guidance",
    ("eval", "data"): "data",
}
OPEN_ENDED = (["eval", "metrics"], ["adapters"], ["optimizer"])  # sections whose keys no signature lists
ALL_SECTIONS = ("version", "seed", "init_from", "data", "autoencoder", "text_encoder", "objective", "network",
                "adapters", *SECTIONS, "sampler", "guidance", "eval")  # fmt: skip


def read_config(path: str, overrides: Iterable[tuple[str, Any]] = ()) -> dict[str, Any]:
    """Reads a config file and returns the resolved config.

    Args:
      path: `FILE.py`, or `FILE.py:ARGUMENT` to call `get_config("ARGUMENT")`.
      overrides: see `override`.

    Raises:
      InputError: the file does not exist or raises, or an override or option is unknown.
    """
    path = os.path.expanduser(path)
    file, _, argument = (path, "", "") if os.path.isfile(path) else path.partition(":")
    if not os.path.isfile(file):
        nearest = difflib.get_close_matches(file, glob(os.path.join(os.path.dirname(file) or "configs", "*.py")), n=1)
        raise InputError("--config", f"no file {file!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
    try:
        with _importable(os.path.abspath(file)):
            get_config = runpy.run_path(file).get("get_config")
            if not callable(get_config):
                raise InputError("--config", f"{file} has no get_config()")
            _check_arguments(get_config, file, argument)
            found = get_config(argument) if argument else get_config()
            config = from_config_dict(found)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a config file may raise anything
        raise InputError(f"--config={path}", f"raised {type(error).__name__}: {error}") from error
    if not isinstance(config, Mapping):
        problem = f"{file}: get_config() must return a ConfigDict or a dict, got {type(found).__name__}"
        raise InputError("--config", problem)
    _check_values(config, "config")
    return resolve(override(config, overrides))


def from_config_dict(config: Any) -> dict[str, Any]:
    """Returns a `ConfigDict`, or a mapping, as nested dicts with tuples for lists and Python's own numbers."""
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(config, Mapping):
        return {key: from_config_dict(value) for key, value in config.items()}
    if isinstance(config, (np.generic, np.ndarray)):
        config = config.tolist()
    return tuple(map(from_config_dict, config)) if isinstance(config, (list, tuple)) else config


def from_json(value: Any) -> Any:
    """Returns a value with mappings as dicts and lists as tuples, which is how configs are written.

    The texts that `core.files.plain` writes for infinity and NaN become these numbers.
    """
    if isinstance(value, Mapping):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(from_json(item) for item in value)
    return float(value) if isinstance(value, str) and value in ("Infinity", "-Infinity", "NaN") else value


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with the default of every section and option that it leaves out, and with parts as sections.

    Options without a default stay absent if they are missing; building the part reports them.

    Raises:
      InputError: an unknown or missing section, one of another type, an unknown part, or a config of another version.
    """
    for name in config:
        if name not in ALL_SECTIONS:
            raise InputError(f"config.{name}", f"no such section{_nearest(str(name), ALL_SECTIONS)}")
    for name in REQUIRED:
        if name not in config:
            raise InputError(f"config.{name}", "is missing")
    config = {name: {"name": spec} if (name,) in FAMILIES and isinstance(spec, str) else spec
              for name, spec in config.items()}  # fmt: skip
    for name, section in config.items():
        is_absent = name in ("autoencoder", "text_encoder") and section is None
        if name not in ("seed", "version", "init_from") and not is_absent and not isinstance(section, Mapping):
            raise InputError(f"config.{name}", f"must be a section, got {section!r}")
    version, seed = config.get("version", CONFIG_VERSION), config.get("seed", 0)
    if version != CONFIG_VERSION:
        problem = f"is {version}, and this code reads {CONFIG_VERSION}; use the version of the code that wrote it"
        raise InputError("config.version", problem)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise InputError("config.seed", f"must be an integer from 0 to 2^32 - 1, got {seed!r}")
    init_from = config.get("init_from")
    if not isinstance(init_from, str | None):
        raise InputError("config.init_from", f"must be WORKDIR[:EMA[:EXPRESSION]], got {init_from!r}")
    data, autoencoder = _part("data", config["data"], "data"), config.get("autoencoder")
    text_encoder = config.get("text_encoder")
    found = {
        "version": version,
        "seed": seed,
        "init_from": init_from,
        "data": data,
        "autoencoder": autoencoder and _part("autoencoders", autoencoder, "autoencoder", SUPPLIED_TO_AUTOENCODERS),
        "text_encoder": text_encoder
        and _part("text_encoders", text_encoder, "text_encoder", SUPPLIED_TO_TEXT_ENCODERS),
        "objective": _part("objectives", config["objective"], "objective"),
        "network": _part("networks", config["network"], "network", later=SUPPLIED_TO_NETWORKS),
        "adapters": {name: _adapter(name, keywords) for name, keywords in config.get("adapters", {}).items()},
    }
    for name, (function, later) in SECTIONS.items():
        found[name] = _keywords(function, config.get(name, {}), name, later)
    factory = getattr(optax, str(found["optimizer"]["name"]), None)  # `make_optimizer` reports an unknown name
    if inspect.isfunction(factory):
        found["optimizer"] = {**_simple(defaults(factory, later=("learning_rate",))), **found["optimizer"]}
    name = found["objective"].get("name")  # absent in a stored run whose objective was an object
    default = SAMPLER if name is None else default_sampler(find("objectives", name, field="objective.name"))
    found["sampler"] = _sampler(config.get("sampler", {}), default)
    found["guidance"] = _guidance(config.get("guidance", GUIDANCE))
    metrics = config.get("eval", {}).get("metrics", {})
    if not isinstance(metrics, Mapping):
        raise InputError("eval.metrics", f"must be a section, got {metrics!r}")
    found["eval"] = {
        **defaults(eval_options),
        **config.get("eval", {}),
        "data": _part("data", config.get("eval", {}).get("data", data), "eval.data"),
        "metrics": {name: _metric(name, keywords) for name, keywords in metrics.items()},
    }
    return found


def override(config: Mapping[str, Any], overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a config with options replaced.

    Args:
      config: need not be resolved.
      overrides: pairs of a dotted path and a value. A text that reads as a number, tuple, dict, boolean or None becomes
        one. Shorter paths apply first, so that `network.name` may be given together with the new network's options;
        a new name keeps those options that the new part has as well.

    Raises:
      InputError: a path that no option has; the field is `config.PATH`.
    """
    config = from_json(config)
    # A part's name before its options, and sections before their parts.
    for path, value in sorted(overrides, key=lambda pair: (pair[0].count("."), not pair[0].endswith(".name"))):
        keys = path.split(".")
        known = resolved = resolve(config)
        for depth, key in enumerate(keys):
            open_ended = known is None or keys[:depth] in OPEN_ENDED
            if not isinstance(known, Mapping) and known is not None:
                raise InputError(f"config.{path}", f"{'.'.join(keys[:depth])} is {known!r} and has no options")
            if not open_ended and key not in known and not _is_option(config, keys[: depth + 1]):
                raise InputError(f"config.{path}", f"the config has no {key!r}{_nearest(key, list(known))}")
            known = None if known is None else known.get(key)
        if isinstance(value, str):
            value = _value(value, known, _annotation(config, keys))
        if isinstance(value, str) and _family_at(config, keys):
            keys.append("name")
        _set(config, keys, value, resolved)
    return config


def parse_value(text: str) -> Any:
    """Returns what a text stands for: a number, tuple, dict, boolean or None; otherwise the text itself."""
    if text in ("true", "false"):
        return text == "true"
    in_python = re.sub(r"\binf\b", "1e999", text)  # Python has no literal for infinity
    if text[:1] in ("{", "(", "["):
        in_python = re.sub(r"(?<=[:,(\[ ])(true|false)(?=[,)\]} ])", lambda match: match[1].capitalize(), in_python)
    for spelling in (text, in_python):
        try:
            return from_json(ast.literal_eval(spelling))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def _value(text: str, known: Any, annotation: Any) -> Any:
    """Returns what a text stands for at an option: the first reading that has the type that the option takes.

    Args:
      known: The present value.
      annotation: The type; None if it is unknown, and then text stays text where the present value is one.
    """
    parsed = parse_value(text)
    if annotation is not None:
        whole = [int(parsed)] if isinstance(parsed, float) and parsed.is_integer() else []
        for reading in (parsed, *whole, text, (parsed,)):  # a single item of a tuple needs no comma
            if is_a(reading, annotation):
                return reading
    return text if isinstance(known, str) and text[:1] not in ("{", "(", "'", '"') else parsed


def check_config(config: Mapping[str, Any]) -> None:
    """Checks the parts of a resolved config that are not built before a training: its `eval` section.

    Raises:
      InputError: an unknown metric or option of one.
    """
    section = call(eval_options, config["eval"], field="eval")
    for name, options in section["metrics"].items():
        field = f"eval.metrics.{name}"
        metric = find("evaluation", name, field="eval.metrics")
        check(metric, options, field=field, later=("train", "held_out"))
        at_most(MOST_SAMPLES, options.get("num", 0), f"{field}.num")


def external_names(value: Any) -> set[str]:
    """Returns the names `"package.module:attribute"` of all parts in a config, or in a checkpoint's `meta`."""
    if isinstance(value, Mapping):
        found = set().union(*map(external_names, value.values()))
        name = value.get("name")
        return found | {name} if isinstance(name, str) and is_external(name) else found
    return set().union(*map(external_names, value)) if isinstance(value, (list, tuple)) else set()


def cond_drop_rate(config: Mapping[str, Any], spec: Spec) -> float:
    """Returns the share of examples that a model was trained on without any of their conditions.

    Args:
      spec: What the network models.
    """
    return call(Options, config["train"], field="train").unconditional_share(spec.conditions)


@contextlib.contextmanager
def _importable(file: str) -> Iterator[None]:
    """Lets a config import the modules next to its folder (`from configs import common`), and those in it."""
    inner = os.path.dirname(file)
    outer, is_new = os.path.dirname(inner), inner not in sys.path
    sys.path.insert(0, outer)
    if is_new:
        sys.path.append(inner)
    try:
        yield
    finally:
        sys.path.remove(outer)
        if is_new and inner in sys.path:
            sys.path.remove(inner)


def _check_arguments(get_config: Callable[..., Any], file: str, argument: str) -> None:
    """Checks that `get_config` can be called with the argument of `--config=FILE:ARGUMENT`, or without one."""
    try:
        signature = inspect.signature(get_config)
    except ValueError:  # of some callables of C extensions
        return
    try:
        signature.bind(*([argument] if argument else []))
    except TypeError:
        problem = f"takes no argument, got {argument!r}" if argument else f"needs an argument: --config={file}:ARGUMENT"
        raise InputError("--config", f"get_config{signature} of {file} {problem}") from None


def _check_values(value: Any, field: str) -> None:
    """Checks that a config holds nothing but what JSON can."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(field, f"must have names as keys, got {key!r}")
            _check_values(item, f"{field}.{key}")
    elif isinstance(value, tuple):
        for item in value:
            _check_values(item, field)
    elif not isinstance(value, bool | int | float | str | None):
        raise InputError(field, f"must be a number, a text, a tuple, a dict or None, got {value!r}")


def _part(family: str, spec: Any, field: str, later: tuple[str, ...] = ()) -> Any:
    """Returns a part's section with its defaults; an object that is no name or section stays as it is."""
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or "object" in spec:  # a part that was given as an object; see `Trainer`
        return spec
    if "name" not in spec:
        raise InputError(f"{field}.name", f"is missing; one of: {', '.join(names(family))}")
    make = find(family, spec["name"], field=f"{field}.name")
    keywords = {key: value for key, value in spec.items() if key != "name"}
    if is_external(spec["name"]):
        later = (*later, *inspect.signature(make).parameters.keys() & set(SUPPLIED_TO_NETWORKS))
    return {"name": spec["name"], **_keywords(make, keywords, field, later)}


def _keywords(make: Any, keywords: Mapping[str, Any], field: str, later: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns keywords with the defaults of `make`, nested parts included."""
    found = {**_simple(defaults(make, later=later)), **keywords}
    for key, parameter in inspect.signature(make).parameters.items():
        family, supplied = _family(parameter.annotation)
        if family and found.get(key) is not None:
            found[key] = _part(family, found[key], f"{field}.{key}", supplied)
    return found


def _family(annotation: Any) -> tuple[str | None, tuple[str, ...]]:
    """Returns the family of the parts that a parameter takes, and the keywords that they receive from their parent.

    Both are the metadata of `Annotated[PartSpec, family, keywords]`.
    """
    for kind in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(kind) is typing.Annotated and isinstance(kind.__metadata__[0], str):
            family, *supplied = kind.__metadata__
            return family, supplied[0] if supplied else ()
    return None, ()


def _simple(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those defaults that a config can hold."""

    def is_simple(value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return all(map(is_simple, value))
        if isinstance(value, Mapping):
            return all(map(is_simple, value.values()))
        return value is None or isinstance(value, (bool, int, float, str))

    return {key: from_json(value) for key, value in keywords.items() if is_simple(value)}


def default_sampler(objective: Any) -> dict[str, Any]:
    """Returns the `sampler` section for an objective without one: `SAMPLER` of its module, or the usual sampler.

    Args:
      objective: The function that builds it, or its class.
    """
    return getattr(inspect.getmodule(objective), "SAMPLER", SAMPLER)


def _sampler(section: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    if section.get("name", default["name"]) == default["name"]:
        section = {**default, **section}
    placing = {"steps": SAMPLER["steps"], **defaults(sampling_times, later=("steps",))}
    placing |= {key: section[key] for key in PLACING if key in section}
    grid = _part("grids", placing["grid"], "sampler.grid", later=("schedule", "steps"))
    part = {key: value for key, value in section.items() if key not in PLACING}
    return {**_part("samplers", part, "sampler"), **placing, "grid": grid}


def _guidance(section: Mapping[str, Any]) -> dict[str, Any]:
    section = {"name": GUIDANCE["name"], **section}
    wrappers = {name: section.get(name) for name in WRAPPERS}
    for name, keywords in wrappers.items():
        if keywords is not None and not isinstance(keywords, Mapping):
            raise not_a_section(name, keywords)
        if keywords is not None:
            wrappers[name] = _keywords(getattr(guidance, name), keywords, f"guidance.{name}", later=SUPPLIED)
    part = {key: value for key, value in section.items() if key not in WRAPPERS}
    return {**_part("guidance", part, "guidance"), **wrappers}


def _adapter(name: str, keywords: Any) -> dict[str, Any]:
    if not isinstance(keywords, Mapping):
        raise InputError(f"adapters.{name}", f"must be a section, as {{'rank': 8}}, got {keywords!r}")
    make = find("adapters", name, field="adapters")
    return _keywords(make, keywords, f"adapters.{name}", later=("network",))


def _metric(name: str, keywords: Any) -> dict[str, Any]:
    if not isinstance(keywords, Mapping):
        raise InputError(f"eval.metrics.{name}", f"must be a section, as {{'num': 1000}}, got {keywords!r}")
    return _keywords(find("evaluation", name, field="eval.metrics"), keywords, f"eval.metrics.{name}")


def _family_at(config: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Returns the family of the part at a path; None if no part stands there."""
    if tuple(keys) in FAMILIES:
        return FAMILIES[tuple(keys)]
    parent = _maker(config, keys[:-1]) if len(keys) > 1 else None
    parameters = inspect.signature(parent).parameters if parent else {}
    return _family(parameters[keys[-1]].annotation)[0] if keys[-1] in parameters else None


def _maker(config: Mapping[str, Any], keys: Sequence[str]) -> Callable[..., Any] | None:
    """Returns the function whose keywords are the options at a path, or None."""
    if len(keys) == 1 and keys[0] in SECTIONS:
        return SECTIONS[keys[0]][0]
    if tuple(keys) == ("eval",):
        return eval_options
    for above, family in ((("eval", "metrics"), "evaluation"), (("adapters",), "adapters")):
        if tuple(keys[:-1]) == above:
            return find(family, keys[-1], field=".".join(above))
    node, family = config, _family_at(config, keys)
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    name = node.get("name") if isinstance(node, Mapping) else node
    return None if family is None or name is None else find(family, name, field=f"{'.'.join(keys)}.name")


def _annotation(config: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Returns the type of the option at a path; None if it is unknown, or if the option is a part."""
    if _family_at(config, keys):
        return None
    maker = _maker(config, keys[:-1]) if len(keys) > 1 else None
    parameter = inspect.signature(maker).parameters.get(keys[-1]) if maker else None
    if parameter is None or parameter.annotation is inspect.Parameter.empty or isinstance(parameter.annotation, str):
        return None
    return parameter.annotation


def _is_option(config: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Returns whether a path is an option without a default, which is absent from a resolved config."""
    if len(keys) == 1:
        return keys[0] in ALL_SECTIONS
    maker = _maker(config, keys[:-1])
    return maker is not None and keys[-1] in inspect.signature(maker).parameters


def _set(config: dict[str, Any], keys: Sequence[str], value: Any, resolved: Mapping[str, Any]) -> None:
    """Sets the option at a path; a part that gets another name keeps the options that both parts have.

    A part that the config does not spell starts from its defaults in the `resolved` config.
    """
    node, default, spelled = config, resolved, True
    for key in keys[:-1]:
        default = default.get(key) or {} if isinstance(default, Mapping) else {}
        spelled = isinstance(node.get(key), dict)
        if not spelled:
            node[key] = dict(default) if "name" in default else {}
        node = node[key]
    family = _family_at(config, keys[:-1]) if keys[-1] == "name" else None
    if family and value != node.get("name"):
        make = find(family, value, field=f"config.{'.'.join(keys)}")
        accepted = {*inspect.signature(make).parameters, *PLACING, *WRAPPERS}
        kept = {key: item for key, item in node.items() if spelled and key in accepted}
        node.clear()
        node.update(kept)
    node[keys[-1]] = value


def _nearest(name: str, known: Iterable[str]) -> str:
    guess = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {guess[0]!r}?" if guess else f"; one of: {', '.join(known)}"
