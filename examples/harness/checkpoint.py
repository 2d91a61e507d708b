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
        SystemExit: on all ranks, when a file of any of them is missing or does not fit.
    """
    needed = [_memory_file(folder), *([folder / "model.pt"] if hvd.rank() == 0 else [])]
    missing = [str(path) for path in needed if not path.exists()]
    _refuse_together(f"there is no {missing[0]}; resume on as many ranks as saved it" if missing else None)

    state: dict[str, Any] = {"step": 0, "record": {}}
    if hvd.rank() == 0:
        state = torch.load(folder / "model.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    step, record = hvd.broadcast_object((state["step"], state["record"]), root_rank=0)

    mine = torch.load(_memory_file(folder), weights_only=True)
    _refuse_together(_unfit(mine, step, optimizer))
    if mine["memory"] is not None:
        optimizer.load_memory_state_dict(mine["memory"])
    return step, record


def _unfit(mine: dict[str, Any], step: int, optimizer: Any) -> str | None:
    if mine["step"] != step:
        return f"its memory is of step {mine['step']}, rank 0's model of step {step}: the folder mixes two checkpoints"
    if (mine["memory"] is None) != (not hasattr(optimizer, "memory_state_dict")):
        return "the checkpoint was saved with another --compression"
    return None


def _refuse_together(problem: str | None) -> None:
    """Exit on all ranks if one of them has a problem, which it names."""
    refused = hvd.allreduce(torch.tensor([float(problem is not None)]), name="checkpoint.problem")
    if float(refused) > 0.0:
        raise SystemExit(f"rank {hvd.rank()}: cannot resume: {problem or 'another rank cannot, see its message'}")


def _memory_of(optimizer: Any) -> dict[str, Any] | None:
    """None for Horovod's own optimizer: what it sends leaves nothing behind."""
    return optimizer.memory_state_dict() if hasattr(optimizer, "memory_state_dict") else None


def _memory_file(folder: Path) -> Path:
    return folder / f"memory.{hvd.rank()}.pt"
