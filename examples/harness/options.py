"""The options of every example, and the compressor they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import hvd_sketch as hvd


def parser(description: str, *, steps: int, lr: float, batch_size: int) -> argparse.ArgumentParser:
    """A parser of the common options; the three numbers are this example's defaults."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = options.add_argument
    add("--compression", choices=("none", "fp16", "sketch", "sharded", "topk"), default="none", help="what travels")
    add("--ratio", type=float, default=20.0, help="dense bytes over bytes sent, for sketch, sharded and topk")
    no_step_ahead = "take gradients at the model, not where what is unsent will have taken it"
    add("--no-anticipate", dest="anticipate", action="store_false", help=no_step_ahead)
    add("--warmup-steps", type=int, default=0, help="steps in which the ratio grows from 1")
    add("--steps", type=int, default=steps, help="optimizer steps")
    add("--lr", type=float, default=lr, help="learning rate, the same for all kinds of compression")
    add("--batch-size", type=int, default=batch_size, help="samples per rank and step")
    add("--seed", type=int, default=0, help="of the weights and the batches")
    add("--eval-every", type=int, default=25, metavar="STEPS", help="steps between two evaluations")
    add("--save", type=Path, metavar="DIR", help="write a checkpoint at every evaluation")
    add("--resume", type=Path, metavar="DIR", help="go on from the checkpoint in DIR")
    add("--results", type=Path, metavar="FILE.json", help="write the records of the run")
    add("--baseline", type=Path, metavar="FILE.json", help="compare with this run without compression")
    add("--plot", type=Path, metavar="FILE.png", help="draw both curves; trains dense first if there is no --baseline")
    return options


def compression_of(options: argparse.Namespace) -> Any:
    """The member of ``hvd.Compression`` that the options name; a new one for each optimizer."""
    member = getattr(hvd.Compression, options.compression)
    if options.compression in ("none", "fp16"):
        return member
    return member(ratio=options.ratio, warmup_steps=options.warmup_steps, anticipate=options.anticipate)


def label_of(options: argparse.Namespace) -> str:
    """What to call a run in the table and the picture."""
    if options.compression in ("none", "fp16"):
        return {"none": "dense", "fp16": "fp16"}[options.compression]
    return f"{options.compression}, ratio {options.ratio:g}{'' if options.anticipate else ', not anticipating'}"


def without_compression(options: argparse.Namespace) -> argparse.Namespace:
    """The same run, dense, and without checkpoints."""
    return argparse.Namespace(
        **{**vars(options), "compression": "none", "anticipate": True, "save": None, "resume": None}
    )
