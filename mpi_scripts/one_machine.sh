#!/usr/bin/env bash
# Train on several processes of this machine.
#
#   mpi_scripts/one_machine.sh NP script.py arguments…
#   COMPRESSION=auto RATIO=40 mpi_scripts/one_machine.sh 4 train.py --epochs 3
#
# NP            processes; more than there are cores are allowed, and slow
# COMPRESSION   none, fp16, auto, sharded, sketch or topk: run an unmodified Horovod script with it
# RATIO         dense bytes over bytes sent
#
# slot:OVERSUBSCRIBE allows more processes than cores. `--bind-to none` leaves every process all cores: with two or less
# processes Open MPI would tie each to one core, its helper threads included. Both are the same in Open MPI 4 and 5.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: one_machine.sh NP script.py arguments… (NP is the number of processes)" >&2
    exit 2
fi
# shellcheck source=mpi_scripts/environment.sh
. "$(dirname "$0")/environment.sh"
processes=$1
shift
exec mpirun -np "$processes" --map-by slot:OVERSUBSCRIBE --bind-to none "$mpi_scripts/rank.sh" "$@"
