"""Compressors: one algorithm a file, its settings, its plan and its exchange together."""

from hvd_sketch.compressors.auto import Auto
from hvd_sketch.compressors.base import Compressor, Sparsifier
from hvd_sketch.compressors.compression import Compression
from hvd_sketch.compressors.mixed import Mixed
from hvd_sketch.compressors.powersgd import PowerSGD
from hvd_sketch.compressors.sharded import Sharded
from hvd_sketch.compressors.sign import Sign
from hvd_sketch.compressors.sketch import Sketch
from hvd_sketch.compressors.stride import Stride
from hvd_sketch.compressors.tensor_topk import TensorTopK
from hvd_sketch.compressors.topk import TopK
from hvd_sketch.compressors.uncompressed import HalfPrecision, NoCompression

__all__ = [
    "Auto",
    "Compression",
    "Compressor",
    "HalfPrecision",
    "Mixed",
    "NoCompression",
    "PowerSGD",
    "Sharded",
    "Sign",
    "Sketch",
    "Sparsifier",
    "Stride",
    "TensorTopK",
    "TopK",
]
