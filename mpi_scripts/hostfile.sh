#!/usr/bin/env bash
# Train on the machines of a host file, over TCP.
#
#   mpi_scripts/hostfile.sh HOSTFILE script.py arguments…
#   INTERFACE=eth0 COMPRESSION=auto RATIO=40 mpi_scripts/hostfile.sh hosts train.py --epochs 3
#
# HOSTFILE      one machine a line, `name slots=N`: N processes on it
# NP            processes in all (default: all slots)
# INTERFACE     the network interface to use, of the same name everywhere; needed where machines have several of which
#               some do not reach the others (docker0, a second network)
# COMPRESSION, RATIO   as in one_machine.sh
# FAR           set it where the machines are milliseconds apart: Open MPI's collectives then wait for fewer messages
#
# Needed on every machine: ssh without a password from this one; this folder, the environment and the script under the
# same paths (a shared file system, or the same set-up).
#
# --prefix tells ssh's non-interactive shell where Open MPI is. `pml ob1` and `btl tcp,self` keep Open MPI to TCP, whatever
# else it was built with. -x carries a variable over; names of which nothing is set are left out.
set -euo pipefail

if [[ $# -lt 2 || ! -r $1 ]]; then
    echo "usage: hostfile.sh HOSTFILE script.py arguments… (HOSTFILE: a machine a line, name slots=N)" >&2
    exit 2
fi
# shellcheck source=mpi_scripts/environment.sh
. "$(dirname "$0")/environment.sh"
hosts=$1
shift
prefix=$(cd "$(dirname "$(command -v mpirun)")/.." && pwd)

options=(--hostfile "$hosts" ${NP:+-np "$NP"} --bind-to none --prefix "$prefix" --mca pml ob1 --mca btl "tcp,self")
if [ -n "${INTERFACE:-}" ]; then
    options+=(--mca btl_tcp_if_include "$INTERFACE")
    # The launcher's own connections, in Open MPI 4 and 5; Horovod's, when it uses Gloo or NCCL.
    export OMPI_MCA_oob_tcp_if_include=$INTERFACE PRTE_MCA_prte_if_include=$INTERFACE
    export HOROVOD_GLOO_IFACE=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
carried='^(PATH|PYTHONPATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX|OMP_NUM_THREADS|COMPRESSION|RATIO|HOROVOD_.*|NCCL_.*)$'
for variable in $(compgen -e | grep -E "$carried"); do
    options+=(-x "$variable")
done
exec mpirun "${options[@]}" "$mpi_scripts/rank.sh" "$@"
