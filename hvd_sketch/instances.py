"""The living objects of a class, where nobody hands them to us."""

from __future__ import annotations

import gc
from typing import TypeVar

T = TypeVar("T")


def instances_of(kind: type[T]) -> list[T]:
    """All instances of a class and its subclasses.

    Found by who refers to the classes: to list all objects would give away tuples that another thread is about to
    make, which then fails in that thread.
    """
    kinds: list[type] = [kind]
    for each in kinds:
        kinds.extend(type.__subclasses__(each))
    return [found for found in gc.get_referrers(*kinds) if issubclass(type(found), kind)]
