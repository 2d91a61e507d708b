#!/usr/bin/env bash
# What every rank runs; the launch scripts call it.
#
#   rank.sh script.py arguments…
#
# With COMPRESSION or RATIO set, the script runs unmodified under `python -m hvd_sketch`, which replaces the optimizer it
# wraps; otherwise it runs as it is. The cores are shared out among the ranks of this machine: without that each rank
# starts a thread for every core, and they fight.
set -euo pipefail
# shellcheck source=mpi_scripts/environment.sh
. "$(dirname "$0")/environment.sh"

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=${SLURM_CPUS_PER_TASK:-$(($(nproc) / ${OMPI_COMM_WORLD_LOCAL_SIZE:-1}))}
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
if [ -n "${COMPRESSION:-}${RATIO:-}" ]; then
    set -- -m hvd_sketch --compression "${COMPRESSION:-auto}" ${RATIO:+--ratio "$RATIO"} "$@"
fi
exec "$(command -v python || echo python3)" "$@"
