#!/usr/bin/env bash
# Train without an allreduce (SwarmSGD), on several processes of this machine or on the machines of a host file.
#
#   mpi_scripts/swarm.sh NP script.py arguments…
#   HOSTFILE=hosts INTERFACE=eth0 SURVIVE=1 mpi_scripts/swarm.sh 8 examples/swarm_transformer.py --straggler 5
#
# NP            nodes; more than there are cores are allowed
# HOSTFILE      one machine a line, `name slots=N`; this machine alone when not set
# INTERFACE     as in hostfile.sh
# SURVIVE       set it to let the others live when a process dies (Open MPI 4; use on_lost='continue' in the script)
#
# Each node looks for messages in a thread of its own and waits asleep, so `mpi_yield_when_idle` only matters to the
# collectives around the training. Without SURVIVE a script's error ends all ranks (python -m mpi4py), instead of leaving
# the others in MPI_Finalize.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: swarm.sh NP script.py arguments… (NP is the number of nodes)" >&2
    exit 2
fi
# shellcheck source=mpi_scripts/environment.sh
. "$(dirname "$0")/environment.sh"
processes=$1
shift

options=(-np "$processes" --map-by slot:OVERSUBSCRIBE --bind-to none --mca mpi_yield_when_idle 1)
if [ -n "${HOSTFILE:-}" ]; then
    prefix=$(cd "$(dirname "$(command -v mpirun)")/.." && pwd)
    options+=(--hostfile "$HOSTFILE" --prefix "$prefix" --mca pml ob1 --mca btl "tcp,self" -x PATH)
fi
if [ -n "${INTERFACE:-}" ]; then
    options+=(--mca btl_tcp_if_include "$INTERFACE")
    export OMPI_MCA_oob_tcp_if_include=$INTERFACE PRTE_MCA_prte_if_include=$INTERFACE
fi
if [ -n "${SURVIVE:-}" ]; then
    options+=(--enable-recovery)
else
    set -- -m mpi4py "$@"
fi
unset COMPRESSION RATIO
exec mpirun "${options[@]}" "$mpi_scripts/rank.sh" "$@"
