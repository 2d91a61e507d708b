"""Hugging Face Accelerate with compressed gradients: one line after ``prepare``.

torchrun --nproc-per-node 2 examples/with_accelerate.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import hvd_sketch

STEPS = 40


def main() -> None:
    """Train a small network on points of a curve, and tell what it took."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    inputs = torch.linspace(-3, 3, 64 * STEPS).unsqueeze(1)
    data = DataLoader(TensorDataset(inputs, inputs.sin()), batch_size=32, shuffle=True)
    tanh, hidden = torch.nn.Tanh(), torch.nn.Linear(64, 64)
    model = torch.nn.Sequential(torch.nn.Linear(1, 64), tanh, hidden, tanh, torch.nn.Linear(64, 1))
    model, optimizer, data = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=3e-3), data)
    compression = hvd_sketch.Compression.sharded(ratio=10, warmup_steps=0)
    state = hvd_sketch.ddp.register(model, optimizer, compression)
    loss = torch.tensor(0.0)
    for points, values in data:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(points), values)
        accelerator.backward(loss)
        optimizer.step()
    stats = state.exchange.stats
    accelerator.print(f"loss {loss.item():.4f} after {stats.steps} steps, {stats.ratio:.1f} times fewer bytes")


if __name__ == "__main__":
    main()
