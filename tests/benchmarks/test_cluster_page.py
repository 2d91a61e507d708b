"""The parts of the cluster's page beside its large table, from rows as they are measured."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.cluster import bench, sections
from benchmarks.cluster.bench import Cell, Row

PLAIN = Cell(2, 1000.0, "transformer-1M", "ddp")


def row(seconds: float, sent: float = 2e5) -> Row:
    times = {f"seconds_{name}": seconds for name in ("step", "compute", "exchange")}
    return {
        **times,
        "bytes_per_rank": sent,
        "counter_bytes_per_rank": sent,
        "load": 3.0,
        "runs": 9,
        "ratio": 40.0,
        "wire_limit_seconds": 8e-9 * sent,
    }


def test_a_series_is_compared_with_itself_alone() -> None:
    series = replace(PLAIN, series="ddp")
    rows = {PLAIN: row(9.0), series: row(0.4), replace(series, method="ddp-sharded-40"): row(0.1)}
    text = sections.ddp(rows)
    assert "| 4.00 |" in text
    assert "9.0000" not in text


def test_delays_are_columns_and_methods_lines() -> None:
    far = [replace(PLAIN, delay=delay, hosts=hosts) for delay in (1.0, 20.0) for hosts in (2, 8)]
    text = sections.far({cell: row(index + 0.5) for index, cell in enumerate(far)})
    assert "| 1 ms, 2 hosts | 1 ms, 8 hosts | 20 ms, 2 hosts | 20 ms, 8 hosts |" in text
    assert "| `ddp` | 0.500 | 1.500 | 2.500 | 3.500 |" in text
    direct = {replace(cell, series="direct"): row(7.0) for cell in far[-1:]}
    assert "| `ddp`, direct |  |  |  | 7.000 |" in sections.far(dict.fromkeys(far, row(1.0)) | direct)


def test_bytes_of_a_hosts_interface_stand_beside_those_of_one_rank() -> None:
    packed = [replace(PLAIN, series="packed", ranks_per_host=ranks) for ranks in (1, 2, 4)]
    text = sections.packed({cell: row(1.0, 1e6 * cell.ranks_per_host) for cell in packed})
    assert [line.split("|")[-2].strip() for line in text.splitlines() if "ddp" in line] == ["1.00", "2.00", "4.00"]


def test_there_is_no_section_without_rows() -> None:
    assert [part({PLAIN: row(1.0)}) for part in (sections.ddp, sections.far, sections.packed)] == ["", "", ""]


@pytest.mark.parametrize("part", sorted(bench.PARTS))
def test_cells_of_a_part_are_measured_cluster_by_cluster(part: str) -> None:
    cells = bench.PARTS[part][0]()
    assert len(set(cells)) == len(cells)
    places = [(cell.hosts, cell.mbit, cell.delay) for cell in cells]
    changes = sum(before != after for before, after in pairwise(places))
    assert changes + 1 == len(set(places))


def test_rows_that_were_measured_before_delay_are_rows_without_it() -> None:
    assert any(cell.of_table for cell in bench.read())
