"""Compressors: settings that build an exchange, a file for each."""

from hvd_sketch.compressors.auto import Auto
from hvd_sketch.compressors.base import Compressor, Sparsifier
from hvd_sketch.compressors.powersgd import PowerSGD
from hvd_sketch.compressors.sharded import Sharded
from hvd_sketch.compressors.sketch import Sketch
from hvd_sketch.compressors.stride import Stride
from hvd_sketch.compressors.topk import TopK

__all__ = [
    "Auto",
    "Compressor",
    "PowerSGD",
    "Sharded",
    "Sketch",
    "Sparsifier",
    "Stride",
    "TopK",
]
