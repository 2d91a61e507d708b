"""Few coordinates out of many: which they are, how they are written to a vector, and how they travel."""

from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.places import Places
from hvd_sketch.sparse.rows import Rows

__all__ = ["Chosen", "Places", "Rows"]
