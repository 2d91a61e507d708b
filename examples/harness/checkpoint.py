"""Checkpoints: rank 0's model and optimizer, and on every rank the memory of what it has not sent yet.

Each is a folder of its own, and the file ``latest`` names the one that counts. It is replaced when all ranks have
written everything, so whenever a run is killed it names a whole checkpoint. Every file has a checksum beside it,
which ``sha256sum -c`` reads as well.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch

import hvd_sketch as hvd


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: Any, record: dict[str, Any]) -> None:
    """Write this rank's part; the checkpoint counts once every rank has written its own. The last one is kept."""
    names = _names(folder, step) if hvd.rank() == 0 else None
    fresh, former = hvd.broadcast_object(names, root_rank=0, name="checkpoint.names")
    for other in folder.glob("*-step-*"):
        if other.name not in (fresh, former):
            shutil.rmtree(other, ignore_errors=True)  # another rank may be at it, too
    (folder / fresh).mkdir(parents=True, exist_ok=True)
    _write(folder / fresh / _memory_file(), {"memory": _memory_of(optimizer)})
    if hvd.rank() == 0:
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "record": record}
        _write(folder / fresh / "model.pt", state)
    hvd.allreduce(torch.zeros(1), name="checkpoint.written")
    if hvd.rank() == 0:
        _replace(folder / "latest", fresh.encode())


def load(folder: Path, model: torch.nn.Module, optimizer: Any) -> tuple[int, dict[str, Any]]:
    """Restore what `save` wrote, on the same number of ranks; returns the step and rank 0's record.

    The order matters: a broadcast of the optimizer's state empties the memory, so that one comes last.

    Raises:
        SystemExit: on all ranks, when a file of any of them is missing, damaged, or does not fit.
    """
    latest = hvd.broadcast_object(_latest(folder) if hvd.rank() == 0 else None, name="checkpoint.latest")
    files = [folder / latest / _memory_file(), *([folder / latest / "model.pt"] if hvd.rank() == 0 else [])]
    _refuse_together(next((problem for problem in map(_problem, files) if problem), None))

    state: dict[str, Any] = {"step": 0, "record": {}}
    if hvd.rank() == 0:
        state = torch.load(files[1], weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    step, record = hvd.broadcast_object((state["step"], state["record"]), name="checkpoint.record")
    _refuse_together(_load_memory(optimizer, torch.load(files[0], weights_only=True)["memory"]))
    return step, record


def _load_memory(optimizer: Any, memory: dict[str, Any] | None) -> str | None:
    """Restore this rank's memory; why it does not fit."""
    if (memory is None) != (_memory_of(optimizer) is None):
        return "the checkpoint was saved with another --compression"
    try:
        if memory is not None:
            optimizer.load_memory_state_dict(memory)
    except hvd.ConfigurationError as error:
        return str(error)
    return None


def _refuse_together(problem: str | None) -> None:
    """Exit on all ranks if one of them has a problem, which it names."""
    refused = hvd.allreduce(torch.tensor([float(problem is not None)]), name="checkpoint.problem")
    if float(refused) > 0.0:
        raise SystemExit(f"rank {hvd.rank()}: cannot resume: {problem or 'another rank cannot, see its message'}")


def _memory_of(optimizer: Any) -> dict[str, Any] | None:
    """None for Horovod's own optimizer: what it sends leaves nothing behind."""
    return optimizer.memory_state_dict() if hasattr(optimizer, "memory_state_dict") else None


def _memory_file() -> str:
    return f"memory.{hvd.rank()}.pt"


def _names(folder: Path, step: int) -> tuple[str, str]:
    """A folder that is not there yet, and the one that counts until then."""
    numbers = [int(other.name.split("-")[0]) for other in folder.glob("*-step-*")]
    return f"{max(numbers, default=0) + 1:06d}-step-{step}", _latest(folder)


def _latest(folder: Path) -> str:
    pointer = folder / "latest"
    return pointer.read_text() if pointer.exists() else "no-checkpoint"


def _write(path: Path, state: dict[str, Any]) -> None:
    """A file and its checksum."""
    file = io.BytesIO()
    torch.save(state, file)
    _replace(path, file.getvalue())
    _replace(_checksum_file(path), f"{_digest(file.getvalue())}  {path.name}\n".encode())


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is whole or as it was, whenever the process or the machine ends."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _problem(path: Path) -> str | None:
    """Why a file cannot be used."""
    if not path.exists():
        return f"there is no {path}; resume on as many ranks as saved it"
    checksum = _checksum_file(path)
    told = checksum.read_text().split() if checksum.exists() else []
    if told[:1] != [_digest(path.read_bytes())]:
        return f"{path} is damaged: it has not the checksum in {checksum.name}; write the name of another into latest"
    return None


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
