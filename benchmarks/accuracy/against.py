"""Which dense training a row is compared with."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def settle_dense(rows: list[Row]) -> None:
    """Set every row's ``dense_loss``: that of its own seed and length, at dense's learning rate or at its best one.

    What is dropped in keeps dense's hyper-parameters and is compared with dense at these, what is done by hand with
    dense at the learning rate at which it ended lowest. Only rates count that ran with all seeds of the first.
    """
    for row in rows:
        if "refused" in row:
            continue
        dense = {(each["lr_scale"], each["seed"]): each["final_loss"] for each in rows if _is_its_dense(each, row)}
        scale = 1.0 if row["way"] == "dropped in" else _best_scale(dense)
        row["dense_loss"] = dense.get((scale, row["seed"]), row.get("dense_loss", row["final_loss"]))


def gap(row: Row) -> float:
    """The loss above dense's, in percent."""
    return float(100.0 * (row["final_loss"] / row["dense_loss"] - 1.0))


def _is_its_dense(row: Row, of: Row) -> bool:
    return row["method"] == "dense" and all(row[name] == of[name] for name in ("task", "ranks", "steps"))


def _best_scale(losses: dict[tuple[float, int], float]) -> float:
    seeds = {seed for scale, seed in losses if scale == 1.0}
    scales = {scale for scale, _ in losses if _seeds(losses, scale) >= seeds}
    return min(scales, key=lambda scale: statistics.mean(losses[scale, seed] for seed in seeds), default=1.0)


def _seeds(losses: Iterable[tuple[float, int]], scale: float) -> set[int]:
    return {seed for its, seed in losses if its == scale}
