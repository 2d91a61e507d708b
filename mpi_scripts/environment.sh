# shellcheck shell=bash
# Read by the other scripts here: puts the checkout's environment first on the PATH, unless one is active, and lets root
# train, which Open MPI asks to be said twice. With FAR set, Open MPI does what is best where messages take milliseconds:
# it halves and doubles in place of a ring (3), and sends a message of up to 1 MiB without asking first. mpirun and srun
# pass both on.
mpi_scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -d "$mpi_scripts/../.venv/bin" ]; then
    PATH=$(cd "$mpi_scripts/../.venv/bin" && pwd):$PATH
fi
export PATH
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
if [ -n "${FAR:-}" ]; then
    export OMPI_MCA_coll_libnbc_iallreduce_algorithm=3 OMPI_MCA_btl_tcp_eager_limit=1048576
fi
