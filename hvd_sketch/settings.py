"""Settings that are numbers, and are given as something else, such as the text of a file or of a command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import get_annotations, signature
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from hvd_sketch.errors import ConfigurationError

_NUMBERS = frozenset({"bool", "int", "float"})
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def check_numbers(settings: Any) -> None:
    """Refuse a field of a dataclass that is declared a number, a whole one, or True or False, and is none.

    Raises:
        ConfigurationError: names the field and what it was given.
    """
    for entry in fields(settings):
        _check(entry.name, entry.type, getattr(settings, entry.name))


def check_given(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments of a function as `check_numbers` refuses fields; for ``locals()``, as they are at first."""
    for name, annotation in get_annotations(function).items():
        if name in given:
            _check(name, annotation, given[name])


def given_numbers(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function, such as a constructor, that refuses arguments so before anything else."""
    names = tuple(signature(function).parameters)

    @wraps(function)
    def checked(*arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        check_given(function, {**dict(zip(names, arguments, strict=False)), **keywords})
        return function(*arguments, **keywords)

    return checked


def _check(name: str, annotation: Any, value: Any) -> None:
    declared = {kind.strip() for kind in str(annotation).split("|")}
    if not declared <= _NUMBERS | {"None"} or (value is None and "None" in declared):
        return
    kind = "True or False" if "bool" in declared else "a number"
    if isinstance(value, Real):
        if "float" in declared or ("int" in declared and _is_whole(value)) or ("bool" in declared and value in (0, 1)):
            return
        kind = "a whole number" if "int" in declared else kind
    raise ConfigurationError(f"{name} must be {kind}, got {value!r}")


def _is_whole(value: Real) -> bool:
    return isinstance(value, Integral) or float(value).is_integer()
