"""Swap the optimizer under a script that knows nothing of us, and run it."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hvd_sketch.compressors import Compression
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.frontends.report import links, report
from hvd_sketch.frontends.substitute import substitute

_COMPRESSIONS = ("none", "fp16", "auto", "sketch", "topk", "sharded")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse our own options, put our optimizer in Horovod's place, and hand over to the script.

    Args:
        arguments: by default the command line's; this is the command ``hvd-sketch``.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.check:
        rank, told = links()
        if rank == 0:
            print("\n".join([*report(), *told]))  # noqa: T201 - what the user asked for
        return
    if not options.script:
        parser.error("the script to run is missing")
    name, *its_own = options.script
    run = _module(parser, name) if options.m else _file(parser, name)
    try:
        compression = _compression(options)
    except ConfigurationError as error:
        parser.error(str(error))
    ours = None if compression is None else substitute(compression)
    sys.argv = [name, *its_own]
    try:
        run()
    except SystemExit as leaving:
        if leaving.code:
            raise
    if ours is not None:
        ours.tell_if_unused()


def _file(parser: argparse.ArgumentParser, script: str) -> Callable[[], Any]:
    """To run a file, as ``python script`` does."""
    if not os.path.isfile(script):
        parser.error(f"there is no script {script!r} in {os.getcwd()}")
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    return functools.partial(runpy.run_path, script, run_name="__main__")


def _module(parser: argparse.ArgumentParser, name: str) -> Callable[[], Any]:
    """To run a module, or a package's ``__main__``, as ``python -m name`` does."""
    sys.path[0] = os.getcwd()
    try:
        found = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):  # a parent that is not there; a name that cannot be one
        found = None
    if found is None:
        parser.error(f"there is no module {name!r} in {os.getcwd()} or among the installed ones")
    return functools.partial(runpy.run_module, name, run_name="__main__", alter_sys=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvd_sketch",
        description="Run an unmodified Horovod script with compressed gradients.",
        epilog="Everything behind the script's name is the script's own.",
    )
    parser.add_argument("--compression", choices=_COMPRESSIONS, default="auto")
    parser.add_argument("--ratio", type=float, default=40.0, help="dense bytes over bytes sent (default: 40)")
    parser.add_argument("--warmup-steps", type=int, default=0, help="steps until the full ratio (default: 0)")
    parser.add_argument(
        "--clip-norm", type=float, default=1.0, help="clip each rank's gradient to this norm; 0 leaves it (default: 1)"
    )
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="parameters to send whole")
    parser.add_argument("--check", action="store_true", help="report what is installed, and how far ranks are")
    parser.add_argument("-m", action="store_true", help="the script is a module, as for python -m")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="the script, and its own arguments")
    return parser


def _compression(options: argparse.Namespace) -> Any:
    if options.compression == "none":
        return None
    if options.compression == "fp16":
        return Compression.fp16
    return getattr(Compression, options.compression)(
        ratio=options.ratio,
        warmup_steps=options.warmup_steps,
        clip_norm=options.clip_norm or None,
        exclude=tuple(options.exclude),
    )
