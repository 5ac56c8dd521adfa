"""Builds a part from its name and keywords: `build("samplers", {"name": "ddim", "eta": 0.5})`.

There is no registry. A family is a package whose modules each define `make` (`diffusion.sampling.samplers`), or one
module whose public functions are the parts (`diffusion.sampling.grids`). Adding a file adds a part. Wherever a name is
accepted, so are `"package.module:attribute"` and a callable, which name a part outside this package.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable

from diffusion.core.types import Array, InputError

FAMILIES = {
    "data": "diffusion.data.sources",
    "discretization": "diffusion.objectives.base.discretization",
    "evaluation": "diffusion.evaluation",
    "grids": "diffusion.sampling.grids",
    "guidance": "diffusion.sampling.guidance",
    "networks": "diffusion.networks",
    "objectives": "diffusion.objectives",
    "parameterization": "diffusion.process.parameterization",
    "samplers": "diffusion.sampling.samplers",
    "schedules": "diffusion.process.schedules",
    "time_sampling": "diffusion.process.time_sampling",
    "weighting": "diffusion.process.weighting",
}
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, (2 - 2.0**-23) * 2.0**127  # int32 and float32, in which JAX computes

_NUMBERS = BeartypeConf(is_pep484_tower=True)  # accept an int where a float is expected


def build(
    family: str, spec: str | Mapping[str, Any] | Callable[..., Any], *, field: str | None = None, **given: Any
) -> Any:
    """Builds one part.

    Args:
      family: a key of `FAMILIES`.
      spec: `{"name": ..., **keywords}` as in a config, or a bare name, which is short for `{"name": name}`. The name
        may also be `"package.module:attribute"` or a callable; either is called with the keywords.
      field: the path of `spec` in the config, for error messages; defaults to the name of the family.
      **given: keywords that the caller supplies and no config may set (a network's `shape`, for example). A callable
        or attribute receives only those that its signature accepts.

    Raises:
      InputError: an unknown name, an unknown, missing or ill-typed keyword, or a value that the part rejects.
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
        parameters = inspect.signature(make).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        given = {key: value for key, value in given.items() if takes_all or key in parameters}
    return call(make, {**keywords, **given}, field=field)


def find(family: str, name: str | Callable[..., Any], *, field: str) -> Callable[..., Any]:
    """Returns the callable that makes part `name` of a family.

    Raises:
      InputError: there is no such part; the message lists all names.
    """
    if callable(name):
        return name
    if isinstance(name, str) and is_external(name):
        return _import(name, field)
    if not isinstance(name, str) or name not in names(family):
        raise InputError(field, f"no {name!r} in {family}{_nearest(str(name), names(family))}")
    module = importlib.import_module(FAMILIES[family])
    if hasattr(module, "__path__"):
        return importlib.import_module(f"{FAMILIES[family]}.{name}").make
    return getattr(module, name)


def is_external(name: Any) -> bool:
    """Returns whether a part's name is a callable or `"package.module:attribute"`, and not the name of a family's."""
    return callable(name) or (isinstance(name, str) and ":" in name)


def names(family: str) -> list[str]:
    """Returns the names of a family's parts, found by listing its folder or its functions."""
    module = importlib.import_module(FAMILIES[family])
    if hasattr(module, "__path__"):
        modules = (info.name for info in pkgutil.iter_modules(module.__path__) if not info.ispkg)
        return sorted(name for name in modules if _has_make(f"{FAMILIES[family]}.{name}"))
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


def call(make: Callable[..., Any], keywords: Mapping[str, Any], *, field: str) -> Any:
    """`make(**keywords)` once they pass `check`, with a float for an integer where it wants one; what it refuses itself
    is named under `field`."""
    check(make, keywords, field=field)
    parameters = inspect.signature(make).parameters
    floats = {key: float(value) for key, value in keywords.items()
              if type(value) is int and key in parameters and _wants_float(parameters[key].annotation)}  # fmt: skip
    try:
        return make(**{**keywords, **floats})
    except InputError as error:
        raise error.within(field) from None


def check(make: Callable[..., Any], keywords: Mapping[str, Any], *, field: str, later: Collection[str] = ()) -> None:
    """Holds keywords against the signature and the type annotations of `make`.

    Args:
      later: parameters that will be given when it is called.

    Raises:
      InputError: an unknown, ill-typed or missing keyword, or a number that JAX does not have: NaN, one beyond int32 or
        float32, or infinity where the keyword is not infinite by default.
    """
    parameters = inspect.signature(make).parameters
    named = [key for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD and key not in later]
    where = inspect.getmodule(make).__name__.replace(".", "/") + ".py"
    for key, value in keywords.items():
        if key not in named:
            if len(named) + len(later) < len(parameters):  # it takes any keyword
                continue
            raise InputError(f"{field}.{key}", f"{where} takes no {key!r}{_nearest(key, named)}")
        _check_numbers(value, f"{field}.{key}", by_default=parameters[key].default)
        wanted = parameters[key].annotation
        if wanted is inspect.Parameter.empty or isinstance(wanted, str):
            continue
        if not _is_a(value, wanted):
            raise InputError(f"{field}.{key}", f"{where} wants {_spell(wanted)}, got {value!r}")
    for key in named:
        if key not in keywords and parameters[key].default is inspect.Parameter.empty:
            raise InputError(f"{field}.{key}", f"is missing; {where} needs it")


def _is_a(value: Any, wanted: Any) -> bool:
    """Whether a value has a type, with all its items: beartype looks at one of them, drawn at random."""
    kinds = typing.get_args(wanted)
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return any(_is_a(value, kind) for kind in kinds)
    if typing.get_origin(wanted) is tuple and kinds[-1] is ...:
        return isinstance(value, tuple) and all(_is_a(item, kinds[0]) for item in value)
    if typing.get_origin(wanted) is tuple and kinds:
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
    return is_bearable(value, wanted, conf=_NUMBERS) and not (isinstance(value, bool) and wanted in (int, float))


def _wants_float(annotation: Any) -> bool:
    # The square of an integer may be beyond int32, where that of a float is not beyond float32.
    kinds = typing.get_args(annotation) or (annotation,)
    return float in kinds and int not in kinds


def _check_numbers(value: Any, field: str, by_default: Any) -> None:
    """Those in a tuple as well; in a section they are the part's that is built of it."""
    if isinstance(value, (tuple, list)):
        for item in value:
            _check_numbers(item, field, by_default)
    if not isinstance(value, (int, float)) or (isinstance(by_default, float) and value == by_default == math.inf):
        return
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise InputError(field, f"must be at most {LARGEST_INT:,} in size, got {value}")
    if not abs(value) <= LARGEST_FLOAT:  # nor is NaN
        raise InputError(field, f"must be a finite number, in float32, got {value}")


def _import(name: str, field: str) -> Callable[..., Any]:
    """Imports `package.module:attribute`; the attribute may have dots."""
    module, _, attribute = name.partition(":")
    try:
        found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(field, f"cannot import {name!r}: {error}") from error
    if not callable(found):
        raise InputError(field, f"{name!r} is not callable")
    return found


@functools.cache
def _has_make(module: str) -> bool:
    # Read from the source, so that listing a family imports none of its optional dependencies.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or spec.submodule_search_locations:
        return False
    with open(spec.origin, encoding="utf-8") as source:
        return any(line.startswith("def make(") for line in source)


def _nearest(name: str, known: list[str]) -> str:
    guess = difflib.get_close_matches(name, known, n=1)
    return (f"; did you mean {guess[0]!r}?" if guess else ";") + f" one of: {', '.join(known)}"


def _spell(annotation: Any) -> str:
    kinds = [kind for kind in typing.get_args(annotation) if kind is not Array]
    if Array in typing.get_args(annotation) and len(kinds) == 1:  # an array where a config gives a number
        annotation = kinds[0]
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
