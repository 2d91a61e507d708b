"""Swap the optimizer under a script that knows nothing of us, and run it."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from hvd_sketch.comm import has_horovod
from hvd_sketch.compressors import Compression
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.frontends.optimizer import DistributedOptimizer
from hvd_sketch.frontends.report import report

_COMPRESSIONS = ("none", "fp16", "auto", "sketch", "topk", "sharded")


def main(arguments: Sequence[str]) -> None:
    """Parse our own options, put our optimizer in Horovod's place, and hand over to the script."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.check:
        print("\n".join(report()))  # noqa: T201 - what the user asked for
        return
    if not options.script:
        parser.error("the script to run is missing")
    script, *script_arguments = options.script
    if not os.path.isfile(script):
        parser.error(f"there is no script {script!r} in {os.getcwd()}")
    try:
        compression = _compression(options)
    except ConfigurationError as error:
        parser.error(str(error))
    if compression is not None:
        substitute(compression)
    sys.argv = [script, *script_arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


def substitute(compression: Any) -> None:
    """Make ``horovod.torch.DistributedOptimizer`` ours, with this compression, in this process.

    Horovod's files stay as they are. A script that chooses ``none`` or ``fp16`` itself gets the
    given compression instead; one that brings a compressor of its own keeps it. A script with
    several optimizers gets a compressor for each.

    Raises:
        ConfigurationError: when Horovod is not installed.
    """
    if not has_horovod():
        raise ConfigurationError("scripts are run unmodified only where Horovod is installed; see the README")
    import horovod.torch as hvd

    stock = hvd.DistributedOptimizer
    plain = (hvd.Compression.none, hvd.Compression.fp16, Compression.none, Compression.fp16)

    def distributed_optimizer(optimizer: Any, named_parameters: Any = None, *args: Any, **kwargs: Any) -> Any:
        own = args[0] if args else kwargs.pop("compression", hvd.Compression.none)
        chosen = compression if own in plain else own
        return DistributedOptimizer(optimizer, named_parameters, chosen, *args[1:], **kwargs)

    distributed_optimizer.stock = stock  # type: ignore[attr-defined]
    hvd.DistributedOptimizer = distributed_optimizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvd_sketch",
        description="Run an unmodified Horovod script with compressed gradients.",
        epilog="Everything behind the script's name is the script's own.",
    )
    parser.add_argument("--compression", choices=_COMPRESSIONS, default="auto")
    parser.add_argument("--ratio", type=float, default=40.0, help="dense bytes over bytes sent (default: 40)")
    parser.add_argument("--warmup-steps", type=int, default=100, help="steps until the full ratio (default: 100)")
    parser.add_argument(
        "--clip-norm", type=float, default=1.0, help="clip each rank's gradient to this norm; 0 leaves it (default: 1)"
    )
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="parameters to send whole")
    parser.add_argument("--check", action="store_true", help="report what is installed and what is missing")
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
