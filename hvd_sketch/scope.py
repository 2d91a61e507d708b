"""Names of collectives: equal on all ranks, different for every exchange."""

from __future__ import annotations

from collections import Counter

_given: Counter[str] = Counter()
_generation = 0


def generation() -> int:
    """How often the ranks have been others; names that were given before are given anew."""
    return _generation


def begin_generation() -> None:
    """There are other ranks now, some of which have given no name yet."""
    global _generation
    _generation += 1
    _given.clear()


def next_scope(group: str) -> str:
    """The prefix of one exchange's names, among the exchanges of one group of ranks.

    Asked for when an exchange runs for the first time: runs come in the program's order, which all
    ranks share, while hooks fire in any order. Nothing of the parameters is in the name, or ranks
    that differ in them would wait for each other instead of being told.
    """
    _given[group] += 1
    return f"hvd_sketch.{group}.{_given[group]}"
