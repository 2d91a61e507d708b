"""Where ranks are born: a process that has imported PyTorch already, which takes a rank longer than most tests.

A launcher starts ``python tests/support/rank.py FOLDER``, as it starts any program. That asks a nursery, one of those
of the running tests, for a process with its own environment, folder and streams, forwards signals to it, and ends as
it does. There are two, for ranks of even and of odd number: sets of words then have another order on each, as they
have in programs that are started apart.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

import psutil

from tests.support.rank import LENGTH, NURSERIES, STATUS

_started: list[subprocess.Popen[bytes]] = []


@cache
def folder() -> str:
    """Where they are asked; they are started, where they have not been, and end with this process."""
    place = tempfile.mkdtemp(prefix="nursery-")
    for number in range(NURSERIES):
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(f"{place}/{number}")
            door.listen(64)
            command = [sys.executable, "-m", "tests.support.nursery", place, str(door.fileno())]
            root, silent = Path(__file__).resolve().parents[2], subprocess.DEVNULL
            _started.append(
                subprocess.Popen(
                    command, cwd=root, stdin=subprocess.PIPE, stdout=silent, pass_fds=[door.fileno()], process_group=0
                )
            )
    return place


def close() -> None:
    """End them."""
    for nursery in _started:
        if nursery.stdin is not None:
            nursery.stdin.close()
        nursery.wait()


def alive() -> list[int]:
    """The processes that were born here and have not ended."""
    return [child.pid for nursery in _started for child in psutil.Process(nursery.pid).children()]


def serve(place: str, number: int) -> None:
    """Bear processes until the one that started this ends."""
    with socket.socket(fileno=number) as door, selectors.DefaultSelector() as events:
        import pytest  # noqa: F401
        import torch  # noqa: F401

        gc.freeze()
        events.register(door, selectors.EVENT_READ)
        events.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fileobj is sys.stdin:
                    shutil.rmtree(place, ignore_errors=True)
                    return
                if key.fileobj is door:
                    _bear(door, events)
                else:
                    key.data()


def _bear(door: socket.socket, events: selectors.BaseSelector) -> None:
    asking, _ = door.accept()
    length, streams, _, _ = socket.recv_fds(asking, LENGTH, 3)
    request = asking.recv(int.from_bytes(length), socket.MSG_WAITALL)
    pid = os.fork()
    if pid == 0:
        _live(request, streams, {door, asking, *(key.fileobj for key in events.get_map().values())})
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(pid)

    def forward() -> None:
        if asking.fileno() < 0:  # the process has ended in the same moment
            return
        number = asking.recv(1)
        os.kill(pid, number[0] if number else signal.SIGKILL)  # who asked for it was killed
        if not number:
            events.unregister(asking)

    def tell() -> None:
        _, status = os.waitpid(pid, 0)
        events.unregister(ended)
        os.close(ended)
        if asking in events.get_map():
            events.unregister(asking)
            with contextlib.suppress(OSError):  # who asked for it was killed in the same moment
                asking.sendall(status.to_bytes(STATUS))
        asking.close()

    events.register(asking, selectors.EVENT_READ, forward)
    events.register(ended, selectors.EVENT_READ, tell)


def _live(request: bytes, streams: list[int], others: set[object]) -> None:
    """Be the rank."""
    try:
        os.setpgid(0, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        for other in others:
            if isinstance(other, socket.socket):
                other.close()
            elif isinstance(other, int):
                os.close(other)
        environment, place, arguments = pickle.loads(request)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(place)
        sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        import numpy

        numpy.random.seed()
        from tests.support.ranks import rank_main

        rank_main(Path(*arguments))
    except BaseException:
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
