"""``python -m benchmarks.accuracy --large``: see `benchmarks.accuracy.large`."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.large.model import LARGE, MEDIUM, SMALL, Language, Size
from benchmarks.accuracy.large.text import Text
from benchmarks.accuracy.large.train import Method, Plan, train
from benchmarks.accuracy.methods import ANTICIPATE
from benchmarks.gpu.record import Record, Row
from hvd_sketch import Compression, ConfigurationError, FactoredMoments

RESULTS = "benchmarks/results/accuracy-{size}.json"
SIZES: dict[str, Size] = {"large": LARGE, "medium": MEDIUM, "small": SMALL}
PERIOD = 8
_PLAIN: dict[str, Any] = {"warmup_steps": 0}
METHODS: dict[str, Any] = {
    "dense": lambda setting: Method(),
    "dense, clipped": lambda ratio: Method(Compression.sharded(ratio=ratio, **_PLAIN)),
    "sharded, anticipate": lambda ratio: Method(Compression.sharded(ratio=ratio, **_PLAIN), ANTICIPATE),
    "powersgd": lambda rank: Method(Compression.powersgd(rank=int(rank), start_step=0)),
    "powersgd, anticipate": lambda rank: Method(Compression.powersgd(rank=int(rank), start_step=0), ANTICIPATE),
    "soft sign, mixed by dct": lambda ratio: Method(Compression.mixed(ratio=ratio, **_PLAIN), soft_sign=True),
    "sketch, anticipate": lambda ratio: Method(
        Compression.sketch(ratio=ratio, in_turn=0.75, dense_below=0, **_PLAIN), ANTICIPATE
    ),
    "auto, dense at first": lambda ratio: Method(Compression.auto(ratio=ratio, warmup_steps=100)),
    "sharded": lambda ratio: Method(Compression.sharded(ratio=ratio, **_PLAIN)),
    "sharded, anticipate, by tensor": lambda ratio: Method(
        Compression.sharded(ratio=ratio, tensor_power=0.7, **_PLAIN), ANTICIPATE
    ),
    "sharded, anticipate, factored": lambda ratio: Method(
        Compression.sharded(ratio=ratio, **_PLAIN), replace(ANTICIPATE, second_moments=FactoredMoments())
    ),
    "sharded, anticipate, mixed by dct": lambda ratio: Method(
        Compression.sharded(ratio=ratio, mixing="dct", tensor_power=0.7, **_PLAIN), ANTICIPATE
    ),
    "soft sign, uncompressed": lambda setting: Method(soft_sign=True),
    "sketch": lambda ratio: Method(Compression.sketch(ratio=ratio, **_PLAIN)),
    "local SGD": lambda ratio: Method(
        Compression.sharded(ratio=ratio / PERIOD, clip_norm=None, **_PLAIN), period=PERIOD
    ),
}
"""By name, of the ratio or of PowerSGD's rank."""
_IMPORTANT = (
    ("dense", 1.0),
    ("dense, clipped", 1.0),
    ("sharded, anticipate", 40.0),
    ("powersgd", 8.0),
    ("soft sign, mixed by dct", 40.0),
    ("soft sign, mixed by dct", 400.0),
    ("powersgd", 1.0),
    ("sharded, anticipate", 100.0),
    ("soft sign, mixed by dct", 100.0),
    ("powersgd", 4.0),
    ("sketch, anticipate", 40.0),
    ("local SGD", 40.0),
)
"""What is trained first."""


def main(arguments: Sequence[str]) -> None:
    """Train what is missing, and keep each row as it is done."""
    options = _parse(arguments)
    out = options.out or Path(RESULTS.format(size=options.size))
    until, record = time.monotonic() + 60 * options.minutes, Record(out)
    rows = record.rows() if out.exists() else []
    size, device = SIZES[options.size], torch.device(options.device)
    size = replace(size, rate=options.lr_scale * size.rate)
    text = Text.read(device, size.text_bytes)
    for method, setting, seed in _runs(options):
        key = {"method": method, "setting": setting, "ranks": options.ranks, "seed": seed, "steps": options.steps}
        key["lr_scale"] = options.lr_scale
        if any(row["finished"] and _matches(row, key) for row in rows) or time.monotonic() > until:
            continue
        plan = Plan(size, text, options.ranks, options.steps, seed, until)
        row = _row(key, plan, METHODS[method](setting))
        rows = [other for other in rows if not _matches(other, key)] + [row]
        record.replace(rows)
        print(f"{method:22} {setting:5g} {_told(row)}", flush=True)


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """(method, ratio or rank, seed): what was asked for, or everything, what matters most before the rest."""
    if options.only:
        for seed, each in itertools.product(range(options.seeds), options.only):
            yield *each, seed
        return
    ratios, ranks = (40.0, 100.0, 400.0), (8.0, 4.0, 1.0)
    whole = ("dense", "dense, clipped", "soft sign, uncompressed")
    settings: dict[str, tuple[float, ...]] = {
        "powersgd": ranks,
        "powersgd, anticipate": ranks,
        **dict.fromkeys(whole, (1.0,)),
    }
    everything = [(method, setting) for method in METHODS for setting in settings.get(method, ratios)]
    for seed in range(options.seeds):
        for method, setting in dict.fromkeys([*_IMPORTANT, *everything]):
            if method in METHODS:
                yield method, setting, seed


def _row(key: Row, plan: Plan, method: Method) -> Row:
    name = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "cpu"
    parameters = sum(parameter.numel() for parameter in Language(plan.size).parameters())
    tokens = plan.ranks * plan.size.batch * plan.size.context
    row = {**key, "parameters": parameters, "tokens_per_step": tokens, "device": name, "finished": True}
    row["when"] = time.strftime("%Y-%m-%d %H:%M")
    try:
        outcome = train(method, plan)
    except ConfigurationError as error:
        return {**row, "refused": str(error)}
    steps, sent, loss = outcome.losses[-1]
    dense_bytes = steps * 2 * (plan.ranks - 1) * 4 * parameters // plan.ranks
    return {
        **row,
        "finished": steps == plan.steps,
        "ratio": round(dense_bytes / max(1, sent), 2),
        "final_loss": loss,
        "bytes_per_rank": sent,
        "losses": outcome.losses,
        "seconds": round(outcome.seconds, 2),
    }


def _matches(row: Row, key: Row) -> bool:
    return all(row[name] == value for name, value in key.items())


def _told(row: Row) -> str:
    if "refused" in row:
        return f"refused: {row['refused']}"
    steps, _, loss = row["losses"][-1]
    return f"loss {loss:.4f} after {steps} steps in {row['seconds']} s, ratio {row['ratio']}"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy --large", description=str(__doc__))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="large", help="of the model: 32, 2.8 or 0.13 M parameters")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr-scale", type=float, default=1.0, help="times dense's learning rate (default: 1)")
    parser.add_argument("--only", nargs="+", type=_asked, help="a method and its ratio or rank, as in 'powersgd=8'")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="train no longer")
    parser.add_argument("--out", type=Path, help=f"(default: {RESULTS})")
    return parser.parse_args(arguments)


def _asked(text: str) -> tuple[str, float]:
    """A method and its setting, of the command line."""
    method, _, setting = text.partition("=")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"{method!r} is none of {', '.join(METHODS)}")
    return method, float(setting or 1.0)
