"""Count Sketch: a small linear summary of a large vector."""

from hvd_sketch.sketch.count_sketch import CountSketch
from hvd_sketch.sketch.geometry import Geometry

__all__ = ["CountSketch", "Geometry"]
