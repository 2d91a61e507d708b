"""From one number, the ratio, to the bytes of a step's messages."""

from __future__ import annotations

from hvd_sketch.errors import NothingGainedError
from hvd_sketch.layout import Layout


def unreachable(layout: Layout, ratio: float, dense: int, others: int) -> NothingGainedError:
    """The error of a ratio for which even the least message is too large.

    Args:
        layout: of the parameters.
        ratio: that was asked for.
        dense: bytes of the values that are not compressed.
        others: the least bytes of all else: headers, checksums, and one value.
    """
    whole = 4 * layout.total
    if others <= whole / ratio:
        cause = (
            f"{layout.dense} of the {layout.total} parameters are 1-D, small or excluded and travel whole in every "
            "step"
        )
        remedy = "lower dense_below, or exclude fewer parameters"
    else:
        cause = (
            f"{layout.total} parameters are too few for it on these ranks: headers, checksums and one value take as "
            f"much as {others} of the {whole} bytes of the gradients"
        )
        remedy = "train so small a model without a compressor"
    return NothingGainedError(
        f"ratio={ratio:g} cannot be reached: {cause}; at most about {whole / (dense + others):.1f} is possible. "
        f"Lower the ratio, or {remedy}"
    )
