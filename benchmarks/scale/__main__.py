"""``python -m benchmarks.scale``: the page of predictions; with ``fit`` the model's numbers first."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.cluster import bench
from benchmarks.scale import fit, page


def main() -> None:
    """Fit where that is asked for, then write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("action", nargs="?", choices=("page", "fit"), default="page")
    parser.add_argument("--results", type=Path, default=bench.RESULTS, help="the rows of the cluster")
    parser.add_argument("--page", type=Path, default=page.PAGE)
    options = parser.parse_args()
    rows = bench.read(options.results)
    if options.action == "fit":
        table = {cell: row for cell, row in fit.known(rows).items() if cell.of_table}
        fit.write(fit.fit(table))
    page.write(rows, fit.read(), options.page)
    print(f"see {options.page}")


if __name__ == "__main__":
    main()
