"""``python -m benchmarks.cluster``: a cluster for a command, or the whole benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cluster import bench, report
from benchmarks.cluster.cluster import Cluster, take_down
from benchmarks.cluster.launchers import LAUNCHERS
from benchmarks.cluster.methods import METHODS
from benchmarks.cluster.models import MODELS
from benchmarks.cluster.network import ClusterError


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for; returns the exit status."""
    options = _parser().parse_args(arguments or ["bench"])
    try:
        status: int = options.action(options)
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _up(options: argparse.Namespace) -> int:
    cluster = _cluster(options)
    try:
        cluster.up()
    except BaseException:
        cluster.down()
        raise
    links = f"{options.mbit:g} Mbit/s, {options.delay:g} ms apart"
    print(f"{options.hosts} hosts at {links}, are up: {' '.join(cluster.hosts)}")
    return 0


def _down(options: argparse.Namespace) -> int:
    take_down(options.name)
    return 0


def _run(options: argparse.Namespace) -> int:
    running = Cluster.running(options.name)
    if running is not None:
        return _start(running, options)
    with _cluster(options) as cluster:
        return _start(cluster, options)


def _cluster(options: argparse.Namespace) -> Cluster:
    return Cluster(options.hosts, options.mbit, options.name, delay=options.delay)


def _start(cluster: Cluster, options: argparse.Namespace) -> int:
    launch = LAUNCHERS[options.launcher](cluster.hosts, options.ranks_per_host)
    return cluster.run([*launch, *options.command], timeout=options.timeout)


def _action(actions: Any, name: str, function: Callable[[argparse.Namespace], int], text: str) -> Any:
    action = actions.add_parser(name, help=text, description=text)
    action.set_defaults(action=function)
    return action


def _bench(options: argparse.Namespace) -> int:
    cells = options.part() if options.part else bench.grid(*(getattr(options, column) for column in bench.COLUMNS))
    bench.measure(cells, options.results, seconds=options.seconds, again=options.again, name=options.name)
    return _report(options)


def _report(options: argparse.Namespace) -> int:
    report.write(bench.read(options.results), options.page)
    print(f"see {options.page}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    up = _action(actions, "up", _up, "bring a cluster up and leave it up")
    run = _action(actions, "run", _run, "run a command on the cluster that is up, or on one made for it")
    down = _action(actions, "down", _down, "take a cluster down, also what a killed process left of it")
    for action in (up, run):
        action.add_argument("--hosts", type=int, default=4, help="number of hosts (default: 4)")
        action.add_argument("--mbit", type=float, default=100.0, help="Mbit/s of each link (default: 100)")
        action.add_argument("--delay", type=float, default=0.0, help="ms from any host to any other (default: 0)")
    table = _action(actions, "bench", _bench, "measure the table, or what is missing of it (default)")
    for action in (up, run, down, table):
        action.add_argument("--name", default="main", help="which cluster, where several are up (default: main)")
    run.add_argument("--launcher", choices=tuple(LAUNCHERS), default="mpirun", help="(default: mpirun)")
    run.add_argument("--ranks-per-host", type=int, default=1, help="ranks that the launcher starts (default: 1)")
    run.add_argument("--timeout", type=float, help="seconds until everything is ended (default: never)")
    run.add_argument("command", nargs="+", help="behind --: the command and its arguments")
    part = table.add_mutually_exclusive_group()
    for name, (cells, text) in bench.PARTS.items():
        part.add_argument(f"--{name}", dest="part", action="store_const", const=cells, help=text)
    table.add_argument("--hosts", type=int, nargs="+", default=bench.HOSTS)
    table.add_argument("--mbit", type=float, nargs="+", default=bench.RATES)
    table.add_argument("--models", choices=tuple(MODELS), nargs="+", default=bench.MODELS_OF_TABLE)
    table.add_argument("--methods", choices=tuple(METHODS), nargs="+", default=bench.METHODS_OF_TABLE)
    table.add_argument("--delay", type=float, nargs="+", default=(0.0,), help="ms (default: 0)")
    table.add_argument("--ranks-per-host", type=int, nargs="+", default=(1,), help="(default: 1)")
    table.add_argument("--seconds", type=float, default=10.0, help="timed steps of a row, about (default: 10)")
    table.add_argument("--again", action="store_true", help="measure rows that are there once more")
    page = _action(actions, "report", _report, "write the page and the pictures from the rows that are there")
    for action in (table, page):
        action.add_argument("--results", type=Path, default=bench.RESULTS, help="the file of rows")
        action.add_argument("--page", type=Path, default=report.PAGE, help="the page to write, pictures beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
