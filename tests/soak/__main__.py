"""``python -m tests.soak``: two real ranks wrap, train and drop for minutes; exit status 1 if what they hold grows."""

import argparse
import sys

from tests.soak.rounds import growing, soak
from tests.support.ranks import ranks


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=str(__doc__))
    parser.add_argument("--minutes", type=float, default=10.0, help="half of them on Horovod, half on mpi4py")
    seconds = 30.0 * parser.parse_args().minutes
    status = 0
    for use_mpi4py in (False, True):
        for rank, seen in enumerate(ranks(2, soak, seconds, use_mpi4py, timeout=2 * seconds + 120)):
            grown = growing(seen)
            status |= grown is not None
            way = "mpi4py" if use_mpi4py else "Horovod"
            print(f"{way}, rank {rank}: {len(seen)} rounds, {seen[-1]}: {grown or 'flat'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
