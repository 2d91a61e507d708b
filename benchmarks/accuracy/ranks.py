"""``mpirun -np 4 python -m benchmarks.accuracy.ranks TASK METHOD RATIO``: one of the trainings on real ranks.

From the same start, on the same batches as the simulation with as many ranks; rank 0 prints the losses.
"""

from __future__ import annotations

import argparse

import torch
from mpi4py import MPI

from benchmarks.accuracy.methods import BY_RATIO, LOW_RANK, make
from benchmarks.accuracy.simulate import begin, train_rank
from benchmarks.accuracy.tasks import TASKS
from hvd_sketch.comm import as_communicator


def main() -> None:
    """Train and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.ranks", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("method", choices=("dense", *BY_RATIO, *LOW_RANK))
    parser.add_argument("setting", type=float, help="ratio, or PowerSGD's rank")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task, comm = TASKS[options.task], as_communicator(MPI.COMM_WORLD)
    model, batches = begin(task, comm.size, options.seed, options.steps)
    outcome = train_rank(task, make(options.method, options.setting), model, comm, batches)
    if comm.rank == 0:
        for step, sent, loss in outcome.losses:
            print(f"{step:6d} steps {sent / 1e6:10.3f} MB sent per rank   loss {loss:.6f}")


if __name__ == "__main__":
    main()
