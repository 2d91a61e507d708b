"""The model of what an exchange takes: held to the measured rows, and to what can be counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cluster import bench
from benchmarks.scale import fit, page
from benchmarks.scale.engines import ENGINES, Group
from benchmarks.scale.model import EXCHANGES, SOFTWARE, Place, interface_bytes, names_of_numbers, seconds, waiting

ROWS = fit.known(bench.read())
TABLE = {cell: row for cell, row in ROWS.items() if cell.of_table}
FITTED = fit.read()
HERE = Place("gloo", 8, 4e5, 40.0, 1000.0, 20.0)


def test_the_model_tells_the_measured_rows() -> None:
    assert len(TABLE) > 250
    median, ninth = fit.median_and_ninth(fit.errors_of(TABLE, FITTED))
    assert median <= 0.15
    assert ninth <= 0.4


@pytest.mark.parametrize("mbit", bench.RATES)
def test_each_rate_is_told_as_well_as_all(mbit: float) -> None:
    rows = {cell: row for cell, row in TABLE.items() if cell.mbit == mbit}
    assert fit.median_and_ninth(fit.errors_of(rows, FITTED))[0] <= 0.15


def test_the_kept_numbers_are_those_that_fit() -> None:
    """Rows that are measured again have to be fitted again: ``python -m benchmarks.scale fit``."""
    fresh = fit.median_and_ninth(fit.errors_of(TABLE, fit.fit(TABLE)))[0]
    assert fit.median_and_ninth(fit.errors_of(TABLE, FITTED))[0] <= 1.1 * fresh
    assert len(names_of_numbers()) == 17


def test_eight_hosts_are_told_by_two_and_four() -> None:
    smaller = fit.fit({cell: row for cell, row in TABLE.items() if cell.hosts < 8})
    rows = {cell: row for cell, row in TABLE.items() if cell.hosts == 8}
    assert fit.median_and_ninth(fit.errors_of(rows, smaller))[0] <= 0.2


@pytest.mark.parametrize(
    ("engine", "exchange", "round_trips"),
    [
        ("gloo", "dense", 14),
        ("gloo", "sketch", 28),
        ("horovod", "dense", 28),
        ("horovod", "sketch", 56),
        ("horovod", "sharded", 9 * 7 + 2),
        ("horovod", "topk", 49),
        ("gloo, direct", "sketch", 4),
        ("gloo, direct", "sharded, header in its codes", 2),
    ],
)
def test_crossings_of_eight_hosts(engine: str, exchange: str, round_trips: int) -> None:
    plain = replace(FITTED, cycle=0.0)
    told = waiting(EXCHANGES[exchange], replace(HERE, engine=engine), plain)
    assert told == pytest.approx(round_trips * (0.04 + SOFTWARE))


def test_open_mpi_sends_small_vectors_along_a_tree_and_large_ones_around_a_ring() -> None:
    engine = ENGINES["mpi"]
    assert engine.crossings("allreduce", Group(8, 8, 1e4)) == 6
    assert engine.crossings("allreduce", Group(8, 8, 1e6)) == 14
    assert engine.crossings("alltoall", Group(8, 8, 1e6)) == 1


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_bytes_are_those_of_the_ratio_with_one_rank_a_host(exchange: str) -> None:
    ring = 2 * 7 / 8 * 4 * HERE.coordinates / HERE.ratio
    assert interface_bytes(EXCHANGES[exchange], replace(HERE, engine="horovod")) == pytest.approx(ring)


def test_bytes_of_hosts_with_four_ranks() -> None:
    four = Place("horovod", 2, 4e6, 40.0, 1000.0, ranks_per_host=4)
    assert interface_bytes(EXCHANGES["sketch"], four) == pytest.approx(4e5 * 7 / 4)
    assert interface_bytes(EXCHANGES["sharded"], four) == pytest.approx(4e5 * (4 / 2 + 7 / 8))
    assert interface_bytes(EXCHANGES["sharded"], replace(four, hierarchical=True)) == pytest.approx(4e5)


@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_more_hosts_more_delay_and_slower_links_never_take_less(engine: str, exchange: str) -> None:
    places = [replace(HERE, engine=engine, hosts=hosts) for hosts in (2, 8, 64, 512, 4096)]
    if ENGINES[engine].levels == 1:  # with more, larger groups have less to pass on
        told = [seconds(exchange, place, FITTED) for place in places]
        assert told == sorted(told)
    for place in places:
        here = seconds(exchange, place, FITTED)
        assert here <= seconds(exchange, replace(place, delay=80.0), FITTED)
        assert here <= seconds(exchange, replace(place, mbit=10.0), FITTED)


def test_the_page_has_all_sizes_and_says_that_it_is_predicted(tmp_path: Path) -> None:
    page.write(ROWS, FITTED, tmp_path / "scale.md")
    text = (tmp_path / "scale.md").read_text()
    assert "**Predicted, not measured.**" in text
    assert all(f"{hosts} hosts" in text for hosts in page.HOSTS)
