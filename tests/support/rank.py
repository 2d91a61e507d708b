"""What is started for a process that `tests.support.nursery` bears. It imports little, to start at once.

``rank.py NURSERY FOLDER`` is a rank of a test, ``rank.py NURSERY python …`` is what ``python …`` would be.
"""

import os
import pickle
import signal
import socket
import sys
from types import FrameType

RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "RANK")
NURSERIES = 2
LENGTH, STATUS = 8, 4
"""Bytes that say how long a request is, and how a process ended."""


def main(nursery: str, *arguments: str) -> None:
    """Ask for a process, and end as it does."""
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    request = pickle.dumps((dict(os.environ), os.getcwd(), arguments))
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(f"{nursery}/{int(rank) % NURSERIES}")

        def forward(number: int, frame: FrameType | None) -> None:
            asking.send(bytes([number]))

        socket.send_fds(asking, [len(request).to_bytes(LENGTH)], [0, 1, 2])
        asking.sendall(request)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, forward)
        status = int.from_bytes(asking.recv(STATUS) or (1 << 8).to_bytes(STATUS))
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
