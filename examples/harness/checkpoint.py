"""Checkpoints: rank 0's model and optimizer, and on every rank the memory of what it has not sent yet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import hvd_sketch as hvd


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: Any, record: dict[str, Any]) -> None:
    """Write this rank's part; the old checkpoint is replaced once every rank has written its own."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {_memory_file(folder): {"step": step, "memory": _memory_of(optimizer)}}
    if hvd.rank() == 0:
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "record": record}
        parts[folder / "model.pt"] = state
    for path, part in parts.items():
        torch.save(part, path.with_suffix(".new"))
    hvd.allreduce(torch.zeros(1), name="checkpoint.written")
    for path in parts:
        os.replace(path.with_suffix(".new"), path)


def load(folder: Path, model: torch.nn.Module, optimizer: Any) -> tuple[int, dict[str, Any]]:
    """Restore what `save` wrote, on the same number of ranks; returns the step and rank 0's record.

    The order matters: a broadcast of the optimizer's state empties the memory, so that one comes last.

    Raises:
        SystemExit: when a file is missing, or is of another step than rank 0's.
    """
    state: dict[str, Any] = {"step": 0, "record": {}}
    if hvd.rank() == 0:
        state = _read(folder / "model.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    step, record = hvd.broadcast_object((state["step"], state["record"]), root_rank=0)
    mine = _read(_memory_file(folder))
    if mine["step"] != step:
        raise SystemExit(
            f"rank {hvd.rank()}: {_memory_file(folder)} is of step {mine['step']}, rank 0's model of step {step}; "
            "the folder mixes two checkpoints, use another one"
        )
    if mine["memory"] is not None:
        optimizer.load_memory_state_dict(mine["memory"])
    return step, record


def _memory_of(optimizer: Any) -> dict[str, Any] | None:
    """None for Horovod's own optimizer: what it sends leaves nothing behind."""
    return optimizer.memory_state_dict() if hasattr(optimizer, "memory_state_dict") else None


def _memory_file(folder: Path) -> Path:
    return folder / f"memory.{hvd.rank()}.pt"


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"rank {hvd.rank()}: --resume: there is no {path}; save with as many ranks as now") from None
    return state
