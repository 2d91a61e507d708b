"""What has to be done to Horovod before an optimizer uses it, where a script imports Horovod by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable

_preparations: list[Callable[[], None]] = []


def prepared_by(preparation: Callable[[], None]) -> None:
    """From now on, do this before."""
    _preparations.append(preparation)


def prepare() -> None:
    """Do it, once Horovod is imported; called whenever a compressor is made."""
    if "horovod.torch" in sys.modules:
        for preparation in _preparations:
            preparation()
