"""Where ranks are born: a process that has imported PyTorch already, which takes a rank longer than most tests.

A launcher starts ``python tests/support/rank.py …``, as it starts any program. That asks a nursery, one of those
of the running tests, for a process with its own environment, folder and streams, forwards signals to it, and ends as
it does. There are two, for ranks of even and of odd number: sets of words then have another order on each, as they
have in programs that are started apart.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import runpy
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
from typing import cast

import psutil

from tests.support.leave import leave
from tests.support.rank import LENGTH, NURSERIES, STATUS

ASK = Path(__file__).with_name("rank.py")

PYTHON = """#!/bin/sh
case "$1" in
-m | -c | [!-]*) exec "{executable}" "{ask}" "{place}" python "$@" ;;
*) exec "{executable}" "$@" ;;
esac
"""
"""The program that asks for a process, and is as Python where one says more than a script, a module or a text."""
_started: list[subprocess.Popen[bytes]] = []


@cache
def folder() -> str:
    """Where they are asked; they are started, where they have not been, and end with this process.

    There is a program of the name ``python`` that asks.
    """
    place = tempfile.mkdtemp(prefix="nursery-")
    program = Path(place, "python")
    program.write_text(PYTHON.format(executable=sys.executable, ask=ASK, place=place))
    program.chmod(0o755)
    for number in range(NURSERIES):
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(f"{place}/{number}")
            door.listen(64)
            command = [sys.executable, "-m", "tests.support.nursery", place, str(door.fileno())]
            _started.append(
                subprocess.Popen(
                    command,
                    cwd=Path(__file__).resolve().parents[2],
                    env={**os.environ, "PYTHONUNBUFFERED": ""},  # unbuffered, the words of two ranks mix within a line
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[door.fileno()],
                    process_group=0,
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


def serve(place: str, number: int) -> tuple[str, ...]:
    """Bear processes until the one that started this ends; in a process born as Python, return its arguments."""
    with socket.socket(fileno=number) as door, selectors.DefaultSelector() as events:
        import pytest  # noqa: F401
        import torch._dynamo  # noqa: F401  # the first optimizer would import it: two seconds more

        gc.freeze()
        events.register(door, selectors.EVENT_READ)
        events.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fileobj is sys.stdin:
                    shutil.rmtree(place, ignore_errors=True)
                    return ()
                if key.fileobj is door:
                    born = _bear(door, events)
                    if born:
                        return born
                else:
                    key.data()


def _bear(door: socket.socket, events: selectors.BaseSelector) -> tuple[str, ...]:
    asking, _ = door.accept()
    length, streams, _, _ = socket.recv_fds(asking, LENGTH, 3)
    request = asking.recv(int.from_bytes(length), socket.MSG_WAITALL)
    pid = os.fork()
    if pid == 0:
        return _live(request, streams, {door, asking, *(key.fileobj for key in events.get_map().values())})
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
    return ()


def _live(request: bytes, streams: list[int], others: set[object]) -> tuple[str, ...]:
    """Be the rank, or return what the process is to be by Python's arguments."""
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
        environment, place, arguments = cast(tuple[dict[str, str], str, tuple[str, ...]], pickle.loads(request))
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(place)
        sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        import numpy

        numpy.random.seed()
        if arguments[0] == "python":
            return arguments[1:]
        from tests.support.ranks import rank_main

        rank_main(Path(*arguments))
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def be(first: str, *others: str) -> None:
    """What Python is by these arguments, a script's or ``-m`` or ``-c``: its ``__main__`` is this one."""
    sys.orig_argv[:] = (sys.executable, first, *others)
    if first == "-m":
        sys.argv[:], sys.path[0] = others, os.getcwd()
        runpy._run_module_as_main(others[0])  # type: ignore[attr-defined]
        return
    main = sys.modules["__main__"]
    main.__spec__ = None
    if first == "-c":
        del main.__file__
        sys.argv[:], sys.path[0] = (first, *others[1:]), ""
        code = compile(others[0], "<string>", "exec")
    else:
        main.__file__ = first
        sys.argv[:], sys.path[0] = (first, *others), str(Path(first).resolve().parent)
        code = compile(Path(first).read_bytes(), first, "exec")
    exec(code, main.__dict__)


def status_of(arguments: tuple[str, ...]) -> int:
    """Be that, and tell what is not caught, as Python does."""
    try:
        be(*arguments)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    else:
        return 0
    return 1


if __name__ == "__main__":
    born = serve(sys.argv[1], int(sys.argv[2]))
    leave(status_of(born) if born else 0)
