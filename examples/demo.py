"""Train the character transformer on 2 processes, without compression and with, and compare: ``make demo``.

Further options go to the example: ``python examples/demo.py --ratio 100 --steps 1000``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = Path("runs/demo")
OPTIONS = "--compression sharded --ratio 40 --steps 600"


def launcher() -> list[str]:
    """mpirun where there is one, else torchrun, which comes with PyTorch."""
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if mpirun is None:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "2"]
    as_root = ["--allow-run-as-root"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    return [mpirun, "-np", "2", "--oversubscribe", "--bind-to", "none", *as_root]


def main() -> int:
    """Launch the example and pass its exit status on."""
    output = ["--results", f"{RUNS}/results.json", "--plot", f"{RUNS}/curves.png"]
    script = [sys.executable, str(HERE / "char_transformer.py"), *shlex.split(OPTIONS), *output]
    command = [*launcher(), *script, *sys.argv[1:]]
    print(shlex.join(command), flush=True)
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main())
