"""From one number, the ratio, to the bytes of a step's messages."""

from __future__ import annotations

from hvd_sketch.errors import NothingGainedError
from hvd_sketch.layout import Layout


def unreachable(layout: Layout, ratio: float, least: int) -> NothingGainedError:
    """The error of a ratio for which even the least message, of so many bytes, is too large."""
    reachable = 4 * layout.total / least
    return NothingGainedError(
        f"ratio={ratio:g} cannot be reached: {layout.dense} of the {layout.total} parameters are 1-D, small or "
        f"excluded and travel whole in every step; at most about {reachable:.1f} is possible. "
        "Lower the ratio, or lower dense_below, or exclude fewer parameters"
    )
