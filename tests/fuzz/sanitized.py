"""Build the kernel with a sanitizer, and let it be attacked: ``python -m tests.fuzz.sanitized [--seconds S]``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CHECKED = "-O0 -g -fno-omit-frame-pointer -fsanitize="
_STOP = "halt_on_error=1:abort_on_error=0:exitcode=99"


class Found(Exception):
    """What a sanitizer or a comparison had to say."""


def attack(seconds: float, first: int = 0) -> str:
    """Generated calls under AddressSanitizer and UndefinedBehaviorSanitizer; returns how many there were.

    Raises:
        Found: with the number of the case, from which to begin again.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        flags = f"{_CHECKED}address,undefined -fno-sanitize-recover=all"
        _run("setup.py", "--quiet", "build", "--build-base", name, "--build-lib", name, CXXFLAGS=flags)
        case = folder / "case"
        preload = " ".join(_runtime(library) for library in ("libasan.so", "libubsan.so", "libstdc++.so"))
        try:
            return _run(
                *("-m", "tests.fuzz.attack", str(seconds), str(first), str(case)),
                PYTHONPATH=f"{folder}{os.pathsep}{ROOT}",
                LD_PRELOAD=preload,
                ASAN_OPTIONS=f"{_STOP}:detect_leaks=0",  # Python leaves what the process takes along
                UBSAN_OPTIONS=f"{_STOP}:print_stacktrace=1",
                cwd=name,
            )
        except Found as found:
            where = case.read_text() if case.exists() else first
            raise Found(f"case {where}; again: python -m tests.fuzz.sanitized --first {where}\n{found}") from None


def race(rounds: int) -> None:
    """Calls at the same time under ThreadSanitizer.

    Raises:
        Found: what it says.
    """
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        sources = [
            ROOT / "hvd_sketch" / "native" / f"{part}.cpp" for part in ("hadamard", "sketch", "sparse", "stage")
        ]
        flags = ("-std=c++17", "-pthread", "-ffp-contract=off", *f"{_CHECKED}thread".split())
        program = str(Path(name, "race"))
        compiler = os.environ.get("CXX") or "g++"
        _run(*flags, str(ROOT / "tests" / "fuzz" / "race.cpp"), *map(str, sources), "-o", program, program=compiler)
        # Where addresses are drawn too freely for its shadow memory, it does not start.
        _run("-R", program, str(rounds), program="setarch", TSAN_OPTIONS="halt_on_error=1")


def _runtime(library: str) -> str:
    """Where the compiler keeps it."""
    compiler = os.environ.get("CXX") or "g++"
    return subprocess.run(
        [compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _run(*arguments: str, program: str = sys.executable, cwd: str | Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [program, *arguments],
        env={**os.environ, **environment},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Found(f"exit status {done.returncode} of {program} {' '.join(arguments)}:\n{done.stdout}")
    return done.stdout


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.sanitized", description=str(__doc__))
    parser.add_argument("--seconds", type=float, default=120.0, help="of the attack")
    parser.add_argument("--first", type=int, default=time.time_ns() // 10**9, help="number of the first case")
    options = parser.parse_args()
    try:
        race(200)
        print(attack(options.seconds, options.first), end="")
    except Found as found:
        print(found)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
