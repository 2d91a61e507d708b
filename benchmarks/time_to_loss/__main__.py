"""``python -m benchmarks.time_to_loss``: train every method until it has dense training's loss; resumable."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.cluster import ClusterError
from benchmarks.time_to_loss import report, rows
from benchmarks.time_to_loss.methods import METHODS
from benchmarks.time_to_loss.tasks import GOALS


def main() -> None:
    """Measure the rows that are missing, then write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_loss", description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=(4,))
    parser.add_argument("--mbit", type=float, nargs="+", default=(1000.0, 100.0), help="faster links first")
    parser.add_argument("--models", choices=tuple(GOALS), nargs="+", default=("transformer-10M", "cnn-10M"))
    parser.add_argument("--methods", choices=tuple(METHODS), nargs="+", default=tuple(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--compose", action="store_true", help="take steps from a training on other links")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds of a run at most (default: 3600)")
    parser.add_argument("--steps", type=int, default=0, help="of dense training, in place of the model's own")
    parser.add_argument("--interval", type=int, default=0, help="steps between two evaluations, likewise")
    parser.add_argument("--name", default="main", help="of the cluster (default: main)")
    parser.add_argument("--page-only", action="store_true", help="only write the page from the rows that are there")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--page", type=Path, default=report.PAGE)
    options = parser.parse_args()
    cells = rows.grid(options.hosts, options.mbit, options.models, options.methods, options.seeds)
    effort = rows.Effort(options.limit, options.compose, options.steps, options.interval)
    if not options.page_only:
        try:
            rows.measure(cells, options.results, options.name, effort)
        except ClusterError as error:
            parser.error(str(error))
    report.write(rows.read(options.results), options.page)
    print(f"see {options.page}")


if __name__ == "__main__":
    main()
