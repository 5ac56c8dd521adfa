"""Builds a part from its name and keywords: `build("samplers", {"name": "ddim", "eta": 0.5})`.

There is no registry: a family is a package, `diffusion.samplers`, whose modules each hold a `make`, or one module,
`diffusion.times`, whose public functions are the parts. A new file is found by being there.
"""

import difflib
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

from diffusion.types import Array, InputError

_NUMBERS = BeartypeConf(is_pep484_tower=True)  # an int will do where a float is asked for
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, (2 - 2.0**-23) * 2.0**127  # of int32 and float32, in which JAX computes


def build(family: str, spec: str | Mapping[str, Any], *, field: str | None = None, **given: Any) -> Any:
    """Builds one part.

    Args:
      family: a package or module under `diffusion`.
      spec: `{"name": ..., **keywords}` as it stands in a config; a bare name is short for `{"name": name}`.
      field: where `spec` stands in the config, for error messages; the family's name if not given.
      **given: keywords that the caller supplies and no config can set (a network's `shape`, say).

    Raises:
      InputError: an unknown name, an unknown, missing or ill-typed keyword, or a value that the part refuses.
    """
    field = field or family
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise InputError(f"{field}.name", f"is missing; one of: {', '.join(names(family))}")
    keywords = {key: value for key, value in spec.items() if key != "name"}
    clash = sorted(keywords.keys() & given.keys())
    if clash:
        raise InputError(f"{field}.{clash[0]}", "follows from the other parts of the config; remove it")
    return call(find(family, spec["name"], field=f"{field}.name"), {**keywords, **given}, field=field)


def find(family: str, name: str, *, field: str) -> Callable[..., Any]:
    """The callable that makes part `name` of a family. Raises InputError with all names if there is none."""
    if not isinstance(name, str) or name not in names(family):
        raise InputError(field, f"no {name!r} in {family}{_nearest(str(name), names(family))}")
    module = importlib.import_module(f"diffusion.{family}")
    if hasattr(module, "__path__"):
        return importlib.import_module(f"diffusion.{family}.{name}").make
    return getattr(module, name)


def names(family: str) -> list[str]:
    """The names of a family's parts, found by listing its folder or its functions."""
    module = importlib.import_module(f"diffusion.{family}")
    if hasattr(module, "__path__"):
        modules = (info.name for info in pkgutil.iter_modules(module.__path__))
        return sorted(name for name in modules if _has_make(f"diffusion.{family}.{name}"))
    return sorted(
        name
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__ and name[0] != "_"
    )


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


def at_most(most: int, number: int, field: str) -> int:
    """The number. Raises InputError naming `field` if it is larger: what is a slip, and would fill the memory."""
    if number > most:
        raise InputError(field, f"must be at most {most:,}, got {number}")
    return number


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
