"""The cluster on one machine: real hosts to every program on it, and nothing of it left behind.

Needs root, and the programs that `benchmarks.cluster.missing` names; skipped where they are not there.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cluster import Cluster, ClusterError, bench, missing, network, report, take_down
from benchmarks.cluster.cluster import STATE, AlreadyUpError
from benchmarks.cluster.launchers import LAUNCHERS
from benchmarks.cluster.models import parameters_of
from hvd_sketch.sketch import native
from tests.support.ranks import ROOT

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason="; ".join(missing()) or "nothing is missing"),
    pytest.mark.timeout(300),
]
NAME = f"test{os.getpid()}"
SUM = """\
import torch, horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.full((250_000,), float(hvd.rank())), op=hvd.Sum, name="sum")
hvd.barrier()
sent = int(open("/sys/class/net/eth0/statistics/tx_bytes").read())
print(f"sum {total.unique().tolist()} {'enough' if sent >= 1_000_000 else sent}", flush=True)
hvd.shutdown()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2, 1000.0, NAME) as two_hosts:
        yield two_hosts


@pytest.fixture
def name() -> Iterator[str]:
    yield f"{NAME}x"
    take_down(f"{NAME}x")


def said(cluster: Cluster, *command: str, host: str = "h1") -> str:
    with tempfile.TemporaryFile("w+") as output:
        status = cluster.run(command, host=host, timeout=90, output=output)
        output.seek(0, io.SEEK_SET)
        text = output.read()
    assert status == 0, text
    return text


def traces(name: str) -> list[str]:
    folder = STATE / name
    return [*network.namespaces(f"hvdsketch-{name}-"), *([str(folder)] if folder.exists() else [])]


def until_up(process: subprocess.Popen[bytes], name: str) -> None:
    deadline = time.monotonic() + 30
    while not (STATE / name / "state.json").exists():
        assert process.poll() is None, f"ended with status {process.returncode}"
        assert time.monotonic() < deadline, "not up within 30 s"
        time.sleep(0.1)


def command_line(action: str, name: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.cluster", action, "--name", name, *more]


def sleeping(name: str, *more: str) -> subprocess.Popen[bytes]:
    """A cluster whose command runs for longer than any test."""
    command = command_line("run", name, "--hosts", "2", "--launcher", "none", *more, "--", "ssh", "h2", "sleep", "300")
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_each_rank_runs_on_its_own_host(cluster: Cluster, launcher: str) -> None:
    words = said(cluster, *LAUNCHERS[launcher](cluster.hosts), "hostname").split()
    assert sorted(word.removeprefix("[0]<stdout>:").removeprefix("[1]<stdout>:") for word in words) == ["h1", "h2"]


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_horovod_sums_over_the_links(cluster: Cluster, launcher: str) -> None:
    text = said(cluster, *LAUNCHERS[launcher](cluster.hosts), sys.executable, "-c", SUM)
    assert text.count("sum [1.0] enough") == 2, text


def test_hosts_see_their_network_and_no_other(cluster: Cluster) -> None:
    assert said(cluster, "ls", "/sys/class/net", host="h2").split() == ["eth0", "lo"]
    assert "10.77.0.2" in said(cluster, "getent", "hosts", "h2")
    assert said(cluster, "ip", "route").splitlines() == [
        "10.77.0.0/24 dev eth0 proto kernel scope link src 10.77.0.1 "
    ]


def test_temporary_folders_differ(cluster: Cluster) -> None:
    said(cluster, "sh", "-c", "touch $TMPDIR/mine")
    assert said(cluster, "sh", "-c", "ls $TMPDIR", host="h1").split() == ["mine"]
    assert "mine" not in said(cluster, "ssh", "h2", "ls $TMPDIR").split()


def test_the_link_is_limited(cluster: Cluster) -> None:
    assert "rate 1Gbit" in said(cluster, "tc", "qdisc", "show", "dev", "eth0")


def test_a_command_out_of_time_is_ended_everywhere(cluster: Cluster) -> None:
    hosts = [f"hvdsketch-{NAME}-{host}" for host in cluster.hosts]
    before = network.processes(hosts)
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run(["ssh", "h2", "sleep", "300"], timeout=1)
    assert network.processes(hosts) == before


def test_exit_status_is_the_commands(cluster: Cluster) -> None:
    assert cluster.run(["sh", "-c", "exit 7"], timeout=10) == 7


def test_a_second_cluster_of_the_name_is_refused_and_the_first_stays(cluster: Cluster) -> None:
    with pytest.raises(AlreadyUpError, match=f"down --name {NAME}"), Cluster(1, 10.0, NAME):
        pass
    assert cluster.run(["ssh", "h2", "true"], timeout=10) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_everything_down(name: str, number: signal.Signals) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:  # as in a shell's background job, whose children inherit it
        signal.signal(number, signal.SIG_DFL)
    process = sleeping(name)
    until_up(process, name)
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    assert traces(name) == []


def test_what_a_killed_process_leaves_is_cleared_by_down_and_by_the_next_cluster(name: str) -> None:
    for clear in ("down", "run"):
        process = sleeping(name)
        until_up(process, name)
        process.kill()
        process.wait(timeout=10)
        assert traces(name)
        more = () if clear == "down" else ("--hosts", "1", "--launcher", "none", "--", "true")
        assert subprocess.run(command_line(clear, name, *more), cwd=ROOT, timeout=60, check=False).returncode == 0
        assert traces(name) == []


def test_up_stays_and_down_is_idempotent(name: str) -> None:
    etc = [Path(file).read_bytes() for file in ("/etc/hosts", "/etc/ssh/ssh_config")]
    subprocess.run(command_line("up", name, "--hosts", "2"), cwd=ROOT, timeout=60, check=True)
    run = command_line("run", name, "--launcher", "mpirun", "--", "hostname")
    environment = dict(os.environ)  # without what MPI in this process has set for its own children
    told = subprocess.run(run, cwd=ROOT, env=environment, timeout=60, check=True, capture_output=True, text=True)
    words = told.stdout.split()
    assert sorted(words) == ["h1", "h2"]
    for _ in range(2):
        subprocess.run(command_line("down", name), cwd=ROOT, timeout=60, check=True)
        assert traces(name) == []
    assert etc == [Path(file).read_bytes() for file in ("/etc/hosts", "/etc/ssh/ssh_config")]


@pytest.mark.skipif(bool(missing(compiler=True)), reason="no compiler for the switch")
def test_a_switch_with_delay_keeps_it_and_ends_with_the_cluster(name: str) -> None:
    seconds = "import socket, time; begin = time.perf_counter(); socket.create_connection(('h2', 22)).close(); "
    seconds += "print(time.perf_counter() - begin)"
    with Cluster(2, 1000.0, name, delay=50.0) as cluster:
        there_and_back = float(said(cluster, sys.executable, "-c", seconds))
        text = said(cluster, *LAUNCHERS["mpirun"](cluster.hosts, 2), "hostname")
        switch = network.processes([f"hvdsketch-{name}-switch"])
    assert there_and_back >= 0.1
    assert sorted(text.split()) == ["h1", "h1", "h2", "h2"]
    assert len(switch) == 1
    assert_ends(switch.pop())
    assert traces(name) == []


@pytest.mark.skipif(bool(missing(compiler=True)), reason="no compiler for the switch")
def test_a_switch_with_delay_ends_with_the_process_that_made_it(name: str) -> None:
    process = sleeping(name, "--delay", "5")
    until_up(process, name)
    (switch,) = network.processes([f"hvdsketch-{name}-switch"])
    process.kill()
    process.wait(timeout=10)
    assert_ends(switch)


def assert_ends(switch: int) -> None:
    deadline = time.monotonic() + 10
    while network.is_alive(switch):
        assert time.monotonic() < deadline, "the switch is still there"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("hosts", "mbit", "name", "delay"),
    [
        (0, 100.0, "a", 0.0),
        (2, 0.0, "a", 0.0),
        (2, float("nan"), "a", 0.0),
        (2, 1.0, "../a", 0.0),
        (2, 1.0, "a", -1.0),
        (2, 1.0, "a", float("nan")),
    ],
)
def test_numbers_that_make_no_sense_are_refused(hosts: int, mbit: float, name: str, delay: float) -> None:
    with pytest.raises(ClusterError, match=r"hosts must|mbit must|name of a cluster|delay must"):
        Cluster(hosts, mbit, name, delay=delay)


def test_rows_are_measured_once_and_bytes_agree_with_the_links_counters(name: str, tmp_path: Path) -> None:
    methods = ("horovod", "sketch-10") if native.available() else ("horovod", "topk-40")
    cells, file = bench.grid((2,), (1000.0,), ("transformer-1M",), methods), tmp_path / "rows.json"
    bench.measure(cells, file, seconds=1.0, again=False, name=name)
    rows = bench.read(file)
    assert list(rows) == cells
    for row in rows.values():
        assert "error" not in row, row["error"]
        assert row["params"] == parameters_of("transformer-1M")
        assert row["counter_bytes_per_rank"] == pytest.approx(row["bytes_per_rank"], rel=0.05)
        assert row["wire_limit_seconds"] == pytest.approx(row["bytes_per_rank"] * 8e-9)
    assert [row["ratio"] for row in rows.values()] == pytest.approx([1.0, float(methods[1].split("-")[1])], rel=0.01)
    written = file.stat().st_mtime_ns
    bench.measure(cells, file, seconds=1.0, again=False, name=name)
    assert file.stat().st_mtime_ns == written
    report.write(rows, tmp_path / "page" / "cluster.md")
    page = (tmp_path / "page" / "cluster.md").read_text()
    assert all(cell.method in page for cell in cells)
    assert (tmp_path / "page" / "cluster-1000.svg").stat().st_size > 0


def test_a_run_that_fails_is_a_row_with_its_reason(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_START", -30.0)
    cells, file = [bench.Cell(2, 1000.0, "transformer-1M", "horovod")], tmp_path / "rows.json"
    bench.measure(cells, file, seconds=12.0, again=False, name=name)
    rows = bench.read(file)
    assert rows[cells[0]]["error"] == "not done after 2 s"
    report.write(rows, tmp_path / "cluster.md")
    assert "not done after 2 s" in (tmp_path / "cluster.md").read_text()
