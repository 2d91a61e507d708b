"""SketchedSGD: its settings, its plan, a bucket's arithmetic, and the exchange."""

from hvd_sketch.compressors.sketch.settings import Sketch

__all__ = ["Sketch"]
