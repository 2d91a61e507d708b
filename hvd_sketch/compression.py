"""`Compression`: the namespace that stands in for ``hvd.Compression``."""

from __future__ import annotations

from hvd_sketch.compressors import Auto, PowerSGD, Sharded, Sketch, Stride, TopK
from hvd_sketch.uncompressed import HalfPrecision, NoCompression


class Compression:
    """Optional gradient compression algorithms, by name.

    ``none`` and ``fp16`` are Horovod's; ``auto(ratio=…)``, ``sharded(ratio=…)``, ``sketch(ratio=…)``,
    ``topk(ratio=…)``, ``stride(ratio=…)`` and ``powersgd(rank=…)`` make a compressor for one optimizer.
    """

    none = NoCompression
    fp16 = HalfPrecision
    auto = Auto
    sketch = Sketch
    topk = TopK
    sharded = Sharded
    stride = Stride
    powersgd = PowerSGD
