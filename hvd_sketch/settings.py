"""Settings that are numbers, and are given as something else, such as the text of a file or of a command line."""

from __future__ import annotations

from dataclasses import fields
from numbers import Real
from typing import Any

from hvd_sketch.errors import ConfigurationError

_NUMBERS = frozenset({"bool", "int", "float"})


def check_numbers(settings: Any) -> None:
    """Refuse a field of a dataclass that is declared a number, or True or False, and is none.

    Raises:
        ConfigurationError: names the field and what it was given.
    """
    for entry in fields(settings):
        declared, value = {kind.strip() for kind in str(entry.type).split("|")}, getattr(settings, entry.name)
        if not declared <= _NUMBERS | {"None"} or isinstance(value, Real) or (value is None and "None" in declared):
            continue
        kind = "True or False" if "bool" in declared else "a number"
        raise ConfigurationError(f"{entry.name} must be {kind}, got {value!r}")
