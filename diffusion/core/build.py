"""Builds a part from its name and keywords: `build("samplers", {"name": "ddim", "eta": 0.5})`.

There is no registry. A family is either a package whose modules each define `make` (`diffusion.sampling.samplers`), or
a module or package whose parts are the functions listed in its `__all__` (`diffusion.sampling.guidance`), or a module
without `__all__` whose parts are its public functions (`diffusion.process.weighting`). Adding a file or a function adds
a part. Wherever a name is accepted, so are `"package.module:attribute"` and a callable, so that a part may be defined
outside this package.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import pkgutil
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable

from diffusion.core.types import Array, Autoencoder, InputError, Network, Spec, TextEncoder

FAMILIES = {
    "adapters": "diffusion.adapters",
    "autoencoders": "diffusion.encoders.autoencoders",
    "data": "diffusion.data.sources",
    "discretization": "diffusion.objectives.base.discretization",
    "editing": "diffusion.sampling.editing",
    "evaluation": "diffusion.evaluation",
    "grids": "diffusion.sampling.grids",
    "guidance": "diffusion.sampling.guidance",
    "networks": "diffusion.networks",
    "objectives": "diffusion.objectives",
    "parameterization": "diffusion.process.parameterization",
    "samplers": "diffusion.sampling.samplers",
    "schedules": "diffusion.process.schedules",
    "text_encoders": "diffusion.encoders.text",
    "time_sampling": "diffusion.process.time_sampling",
    "weighting": "diffusion.process.weighting",
}
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, (2 - 2.0**-23) * 2.0**127  # of int32 and float32, JAX's default precision

_NUMBERS = BeartypeConf(is_pep484_tower=True)  # accepts an int where a float is expected


def build(
    family: str, spec: str | Mapping[str, Any] | Callable[..., Any], *, field: str | None = None, **given: Any
) -> Any:
    """Builds one part.

    Args:
      family: A key of `FAMILIES`.
      spec: `{"name": ..., **keywords}` as in a config, or a bare name, which is short for `{"name": name}`. The name
        may also be `"package.module:attribute"` or a callable, which is called with the keywords.
      field: The path of `spec` in the config, for error messages; defaults to the name of the family.
      **given: Keywords that the caller supplies and no config may set (a network's `shape`, for example). A callable
        or attribute receives only those that its signature accepts.

    Raises:
      InputError: The name is unknown, a keyword is unknown, missing or of the wrong type, or the part rejects a value.
    """
    field = field or family
    if isinstance(spec, str) or callable(spec):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not (isinstance(spec.get("name"), str) or callable(spec.get("name"))):
        raise InputError(f"{field}.name", f"is missing; one of: {', '.join(names(family))}")
    keywords = {key: value for key, value in spec.items() if key != "name"}
    clash = sorted(keywords.keys() & given.keys())
    if clash:
        raise InputError(f"{field}.{clash[0]}", "is derived from other parts of the config; remove it")
    make = find(family, spec["name"], field=f"{field}.name")
    if is_external(spec["name"]):
        named, takes_any = _keywords_of(make)
        given = {key: value for key, value in given.items() if takes_any or key in named}
    return call(make, {**keywords, **given}, field=field)


def build_network(
    section: str | Mapping[str, Any] | Callable[..., Any], spec: Spec, *, field: str = "network"
) -> Network:
    """Builds the network for a data set: its `shape`, `num_classes` and other `conditions` come from the spec.

    Raises:
      InputError: See `build`; or the network cannot be conditioned on what the data provide.
    """
    name = section.get("name") if isinstance(section, Mapping) else section
    conditions = {key: condition for key, condition in spec.conditions.items() if key != "label"}
    given = {"shape": spec.shape, "num_classes": spec.num_classes}
    if name is not None:
        named, takes_any = _keywords_of(find("networks", name, field=f"{field}.name"))
        if "conditions" in named or (takes_any and conditions):
            given["conditions"] = conditions
        elif conditions:
            problem = f"{name} cannot be conditioned on {next(iter(conditions))!r}"
            raise InputError(f"{field}.name", f"{problem}; use unet, dit or uvit")
    return build("networks", section, field=field, **given)


def build_accepting(
    family: str, spec: str | Mapping[str, Any] | Callable[..., Any], *, field: str, **given: Any
) -> Any:
    """Builds one part as `build` does, with those of the keywords `given` that it accepts."""
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    if name is not None:
        named, takes_any = _keywords_of(find(family, name, field=f"{field}.name"))
        given = {key: value for key, value in given.items() if takes_any or key in named}
    return build(family, spec, field=field, **given)


def model_spec(spec: Spec, autoencoder: Autoencoder | None, text_encoder: TextEncoder | None = None) -> Spec:
    """Returns the spec of what a network models: latents in place of data, and encoded text in place of captions."""
    spec = spec if autoencoder is None else autoencoder.latent_spec(spec)
    return spec if text_encoder is None else spec.with_text(text_encoder.condition)


def find(family: str, name: str | Callable[..., Any], *, field: str) -> Callable[..., Any]:
    """Returns the callable that builds the part `name` of a family.

    Raises:
      InputError: There is no such part, or `"package.module:attribute"` cannot be imported.
    """
    if callable(name):
        return name
    if isinstance(name, str) and is_external(name):
        return _import(name, field)
    if not isinstance(name, str) or name not in names(family):
        raise InputError(field, f"no {name!r} in {family}{nearest(str(name), names(family))}")
    module = importlib.import_module(FAMILIES[family])
    if _has_files(module):
        return importlib.import_module(f"{FAMILIES[family]}.{name}").make
    return getattr(module, name)


def is_external(name: Any) -> bool:
    """Returns whether `name` is a callable or `"package.module:attribute"`, rather than the name of a family's part."""
    return callable(name) or (isinstance(name, str) and ":" in name)


def names(family: str) -> list[str]:
    """Returns the names of a family's parts, found by listing its package's files or its module's functions.

    Raises:
      InputError: There is no such family.
    """
    if family not in FAMILIES:
        raise InputError("family", f"there is no {family!r}{nearest(str(family), list(FAMILIES))}")
    module = importlib.import_module(FAMILIES[family])
    if _has_files(module):
        modules = (info.name for info in pkgutil.iter_modules(module.__path__) if not info.ispkg)
        return sorted(name for name in modules if _has_make(f"{FAMILIES[family]}.{name}"))
    if hasattr(module, "__all__"):
        return sorted(name for name in module.__all__ if isinstance(getattr(module, name), types.FunctionType))
    return sorted(
        name
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__ and name[0] != "_"
    )


def defaults(make: Callable[..., Any], *, later: Collection[str] = ()) -> dict[str, Any]:
    """Returns the default of every keyword of `make` that has one, except those named in `later`."""
    parameters = inspect.signature(make).parameters
    return {
        key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty and key not in later
    }


def changed(stored: Mapping[str, Any], section: Mapping[str, Any], may_change: Collection[str] = ()) -> str | None:
    """Returns an option of a stored section that has another value in a section, the name of the part first, or None.

    Options that the stored section lacks were added to the project since and are not compared, unless it is empty.
    """
    for key in sorted(stored or section, key=lambda key: key != "name"):
        if key not in may_change and not _is_same(stored.get(key), section.get(key)):
            return key
    return None


def _is_same(stored: Any, value: Any) -> bool:
    """Returns whether two values are equal; of sections, the options that the stored one has."""
    if isinstance(stored, Mapping) and isinstance(value, Mapping):
        return all(_is_same(item, value.get(key)) for key, item in stored.items())
    return stored == value


def call(make: Callable[..., Any], keywords: Mapping[str, Any], *, field: str) -> Any:
    """Returns `make(**keywords)` after `check`.

    Integers become floats where `make` expects floats, and `~` at the start of a text becomes the home folder, also in
    tuples.

    Raises:
      InputError: See `check`; errors that `make` itself raises get `field` as a prefix.
    """
    check(make, keywords, field=field)
    parameters = inspect.signature(make).parameters
    floats = {
        key: float(value)
        for key, value in keywords.items()
        if type(value) is int and key in parameters and _expects_float(parameters[key].annotation)
    }
    paths = {key: _expanded(value) for key, value in keywords.items()}
    try:
        return make(**{**keywords, **paths, **floats})
    except InputError as error:
        raise error.within(field) from None


def _expanded(value: Any) -> Any:
    """Returns a text, or the texts of a tuple, with the home folder in place of a `~` at the start."""
    if type(value) is tuple:
        return tuple(map(_expanded, value))
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def check(make: Callable[..., Any], keywords: Mapping[str, Any], *, field: str, later: Collection[str] = ()) -> None:
    """Checks keywords against the signature and the type annotations of `make`.

    Args:
      later: Parameters that the caller will supply when it calls `make`.

    Raises:
      InputError: A keyword is unknown, missing or of the wrong type, or a number is NaN, out of the range of int32 or
        float32, or infinite where the default is not.
    """
    parameters = inspect.signature(make).parameters
    named, takes_any = _keywords_of(make)
    named = [key for key in named if key not in later]
    where = (getattr(make, "__module__", None) or type(make).__module__).replace(".", "/") + ".py"
    for key, value in keywords.items():
        if key not in named:
            if takes_any:
                continue
            raise InputError(f"{field}.{key}", f"{where} takes no {key!r}{nearest(key, named)}")
        _check_numbers(value, f"{field}.{key}", by_default=parameters[key].default)
        expected = parameters[key].annotation
        if expected is inspect.Parameter.empty or isinstance(expected, str):
            continue
        if not is_a(value, expected):
            raise InputError(f"{field}.{key}", f"{where} expects {_spell(expected)}, got {value!r}")
    for key in named:
        if key not in keywords and parameters[key].default is inspect.Parameter.empty:
            raise InputError(f"{field}.{key}", f"is missing; {where} requires it")


def _keywords_of(make: Callable[..., Any]) -> tuple[list[str], bool]:
    """Returns the names of the keywords of `make`, and whether it accepts any other keyword as well."""
    parameters = inspect.signature(make).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def is_a(value: Any, expected: Any) -> bool:
    """Returns whether a value matches a type. Checks every item of a tuple; beartype checks only a random one."""
    kinds = typing.get_args(expected)
    if typing.get_origin(expected) is typing.Annotated:
        return is_a(value, kinds[0])
    if getattr(expected, "_is_protocol", False) and not getattr(expected, "_is_runtime_protocol", False):
        return True  # a protocol that cannot be checked
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return any(is_a(value, kind) for kind in kinds)
    if typing.get_origin(expected) is tuple and kinds[-1] is ...:
        return isinstance(value, tuple) and all(is_a(item, kinds[0]) for item in value)
    if typing.get_origin(expected) is tuple and kinds:
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(is_a, value, kinds))
    return is_bearable(value, expected, conf=_NUMBERS) and not (isinstance(value, bool) and expected in (int, float))


def _expects_float(annotation: Any) -> bool:
    # An integer given for a float must become one: its square may exceed int32 where that of a float fits float32.
    kinds = typing.get_args(annotation) or (annotation,)
    return float in kinds and int not in kinds


def _check_numbers(value: Any, field: str, by_default: Any) -> None:
    """Raises InputError if a number is NaN, infinite or out of range.

    Recurses into tuples, but not into nested sections, which are checked when their part is built.
    """
    if isinstance(value, (tuple, list)):
        for item in value:
            _check_numbers(item, field, by_default)
    if not isinstance(value, (int, float)) or (isinstance(by_default, float) and value == by_default == math.inf):
        return
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise InputError(field, f"must be at most {LARGEST_INT:,} in magnitude, got {value}")
    if not abs(value) <= LARGEST_FLOAT:  # also true for NaN
        raise InputError(field, f"must be finite in float32, got {value}")


def _import(name: str, field: str) -> Callable[..., Any]:
    """Imports `package.module:attribute`, where the attribute may contain dots."""
    module, _, attribute = name.partition(":")
    try:
        found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        hint = "; options are given as {'name': 'cfg', 'scale': 2}" if "=" in attribute else ""
        raise InputError(field, f"cannot import {name!r}: {error}{hint}") from error
    if not callable(found):
        raise InputError(field, f"{name!r} is not callable")
    try:
        inspect.signature(found)
    except ValueError as error:  # some functions of C extensions
        raise InputError(field, f"{name!r} cannot be used: {error}; wrap it in a Python function") from error
    return found


def _has_files(module: types.ModuleType) -> bool:
    """Returns whether the parts of a family are the files of its package."""
    return hasattr(module, "__path__") and not hasattr(module, "__all__")


@functools.cache
def _has_make(module: str) -> bool:
    # Reads the source instead of importing it: listing a family must not import its optional dependencies.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or spec.submodule_search_locations:
        return False
    with open(spec.origin, encoding="utf-8") as source:
        return any(line.startswith("def make(") for line in source)


def nearest(name: str, known: list[str]) -> str:
    """Returns the end of a message about an unknown name: the known one that it resembles, if any, and all of them."""
    guess = [other for other in known if name and other.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    return (f"; did you mean {guess[0]!r}?" if guess else ";") + f" one of: {', '.join(known)}"


def _spell(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        return _spell(annotation.__origin__)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):  # omit arrays, which no config can contain
        return " | ".join(_spell(kind) for kind in typing.get_args(annotation) if kind is not Array)
    if annotation is types.NoneType:
        return "None"
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return name.replace("typing.", "").replace("collections.abc.", "")
