"""Builds a part from its name and keywords: `build("samplers", {"name": "ddim", "eta": 0.5})`.

There is no registry: a family is a package, `diffusion.samplers`, whose modules each hold a `make`, or one module,
`diffusion.times`, whose public functions are the parts. A new file is found by being there.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable

from diffusion.types import Array, InputError

_NUMBERS = BeartypeConf(is_pep484_tower=True)  # an int will do where a float is asked for


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
    if name not in names(family):
        raise InputError(field, f"no {name!r} in {family}{_nearest(name, names(family))}")
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
    """`make(**keywords)` once they pass `check`; what it refuses itself is named under `field`."""
    check(make, keywords, field=field)
    try:
        return make(**keywords)
    except InputError as error:
        raise error.within(field) from None


def check(make: Callable[..., Any], keywords: Mapping[str, Any], *, field: str, later: Collection[str] = ()) -> None:
    """Holds keywords against the signature and the type annotations of `make`.

    Args:
      later: parameters that will be given when it is called.

    Raises:
      InputError: an unknown, ill-typed or missing keyword.
    """
    parameters = inspect.signature(make).parameters
    named = [key for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD and key not in later]
    where = inspect.getmodule(make).__name__.replace(".", "/") + ".py"
    for key, value in keywords.items():
        if key not in named:
            if len(named) + len(later) < len(parameters):  # it takes any keyword
                continue
            raise InputError(f"{field}.{key}", f"{where} takes no {key!r}{_nearest(key, named)}")
        wanted = parameters[key].annotation
        if wanted is inspect.Parameter.empty or isinstance(wanted, str):
            continue
        if not is_bearable(value, wanted, conf=_NUMBERS) or (isinstance(value, bool) and wanted in (int, float)):
            raise InputError(f"{field}.{key}", f"{where} wants {_spell(wanted)}, got {value!r}")
    for key in named:
        if key not in keywords and parameters[key].default is inspect.Parameter.empty:
            raise InputError(f"{field}.{key}", f"is missing; {where} needs it")


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
