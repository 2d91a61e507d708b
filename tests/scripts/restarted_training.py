"""A script for ``torchrun --max-restarts 1``: rank 1 is killed in the first attempt, and the second one goes on.

Argument: a folder, for every rank's checkpoint after each step and its parameters at the end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import hvd_sketch as hvd
from hvd_sketch import Compression
from tests.support.ddp import PLAIN, STEPS, sgd, step, wrapped
from tests.support.training import flat, net

LOST_IN = 3

hvd.init()
file = Path(sys.argv[1]) / f"rank{dist.get_rank()}"
model = wrapped(net())
optimizer = sgd(model, momentum=0.5)
state = hvd.ddp.register(model, optimizer, Compression.topk(**PLAIN))
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
start = 0
if not first:
    saved = torch.load(file, weights_only=False)
    start = saved["step"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    state.load_memory_state_dict(saved["memory"])
for number in range(start, STEPS):
    if first and number == LOST_IN:
        dist.barrier()  # every rank has its checkpoint of this step
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    step(model, optimizer, number)
    entries = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "memory": state.memory_state_dict()}
    torch.save({"step": number + 1, **entries}, file)
torch.save((start, flat(model)), file.with_suffix(".end"))
dist.destroy_process_group()
