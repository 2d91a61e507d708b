"""The two-way top-k of mixed coefficients, by tensor, of a memory that fades: what a sign step is made for."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_sketch.compressors.sharded import Sharded


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixed(Sharded):
    """`Sharded` with the settings that belong to `hvd_sketch.SoftSign`; see docs/recipe.md.

    A coefficient that is sent moves a whole block of its tensor, and a step that depends on the sign of an entry more
    than on its size makes use of it everywhere. The memory decays, for what is old would have the wrong sign; it is
    neither clipped nor anticipated.
    """

    clip_norm: float | None = None
    anticipate: bool | None = False
    mixing: str | None = "dct"
    tensor_power: float = 0.7
    decay: float = 0.99
