"""What the examples share: options, the record of a run, checkpoints, the final table and the picture."""

from harness.options import compression_of, parser
from harness.record import Record
from harness.report import compare
from harness.run import Run, mean_over_ranks

__all__ = ["Record", "Run", "compare", "compression_of", "mean_over_ranks", "parser"]
