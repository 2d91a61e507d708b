"""Names of collectives: equal on all ranks, different for every exchange."""

from __future__ import annotations

import zlib
from collections import Counter

from hvd_sketch.layout import Layout

_made: Counter[int] = Counter()


def unique_scope(layout: Layout) -> str:
    """A prefix for one exchange's collectives, from its parameter names and a count.

    Two models with equal parameter names get different scopes, as long as every rank makes
    their optimizers in the same order.
    """
    key = zlib.crc32(" ".join(slot.name for slot in layout.slots).encode())
    _made[key] += 1
    return f"hvd_sketch.{key:08x}.{_made[key]}"
