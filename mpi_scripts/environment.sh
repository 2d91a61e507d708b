# shellcheck shell=bash
# Read by the other scripts here: puts the checkout's environment first on the PATH, unless one is active, and lets root
# train, which Open MPI asks to be said twice.
mpi_scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -d "$mpi_scripts/../.venv/bin" ]; then
    PATH=$(cd "$mpi_scripts/../.venv/bin" && pwd):$PATH
fi
export PATH
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
