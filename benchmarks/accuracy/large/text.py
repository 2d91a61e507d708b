"""What is learned: the Python sources of the installed packages, as bytes."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Text:
    """Bytes to learn from and others to be tested on, uint8, on a device."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def read(cls, device: torch.device, most_bytes: int) -> Text:
        """The standard library and the installed packages by their paths; every tenth file is held out."""
        paths = sysconfig.get_paths()
        folders = dict.fromkeys((Path(paths["stdlib"]), Path(paths["purelib"])))
        files = sorted({file for folder in folders for file in folder.rglob("*.py") if file.is_file()})
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        size = 0
        for number, file in enumerate(files):
            if size >= most_bytes:
                break
            parts[number % 10 == 9].append(file.read_bytes())
            size += len(parts[number % 10 == 9][-1])
        train, held_out = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
        return cls(train.to(device), held_out.to(device))

    def batch(self, generator: torch.Generator, size: int, context: int, *, held_out: bool = False) -> Batch:
        """Windows drawn from a generator of the processor: the same ones on every device."""
        text = self.held_out if held_out else self.train
        starts = torch.randint(len(text) - context - 1, (size, 1), generator=generator).to(text.device)
        windows = text[starts + torch.arange(context + 1, device=text.device)].to(torch.int64)
        return windows[:, :-1].contiguous(), windows[:, 1:].reshape(-1)
