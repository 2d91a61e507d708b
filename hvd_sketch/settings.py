"""Settings that are numbers, and are given as something else, such as the text of a file or of a command line."""

from __future__ import annotations

import re
from dataclasses import fields
from numbers import Real
from typing import Any

from hvd_sketch.errors import ConfigurationError

_NUMBERS = frozenset({"bool", "int", "float"})
_BESIDE = frozenset({"None", "Optional", "Union", "class", "typing"})


def check_numbers(settings: Any) -> None:
    """Refuse a field of a dataclass that is declared a number, or True or False, and is none.

    Raises:
        ConfigurationError: names the field and what it was given.
    """
    for entry in fields(settings):
        words, value = set(re.findall(r"\w+", str(entry.type))), getattr(settings, entry.name)
        declared = words & _NUMBERS and words <= _NUMBERS | _BESIDE
        left_out = value is None and words & {"None", "Optional"}
        if declared and not left_out and not isinstance(value, Real):
            kind = "True or False" if words & _NUMBERS == {"bool"} else "a number"
            raise ConfigurationError(f"{entry.name} must be {kind}, got {value!r}")
