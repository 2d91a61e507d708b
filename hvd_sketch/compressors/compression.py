"""`Compression`: the namespace that stands in for ``hvd.Compression``."""

from __future__ import annotations

from hvd_sketch.compressors.auto import Auto
from hvd_sketch.compressors.mixed import Mixed
from hvd_sketch.compressors.powersgd import PowerSGD
from hvd_sketch.compressors.sharded import Sharded
from hvd_sketch.compressors.sign import Sign
from hvd_sketch.compressors.sketch import Sketch
from hvd_sketch.compressors.stride import Stride
from hvd_sketch.compressors.topk import TopK
from hvd_sketch.compressors.uncompressed import HalfPrecision, NoCompression


class Compression:
    """Optional gradient compression algorithms, by name.

    ``none`` and ``fp16`` are Horovod's; ``auto(ratio=…)``, ``sharded(ratio=…)``, ``mixed(ratio=…)``,
    ``sketch(ratio=…)``, ``topk(ratio=…)``, ``stride(ratio=…)``, ``sign()`` and ``powersgd(rank=…)`` make a
    compressor for one optimizer.
    """

    none = NoCompression
    fp16 = HalfPrecision
    auto = Auto
    sketch = Sketch
    topk = TopK
    sharded = Sharded
    mixed = Mixed
    stride = Stride
    sign = Sign
    powersgd = PowerSGD
