"""Lightning with compressed gradients: a callback that registers the hook.

python examples/with_lightning.py                             # Lightning starts both processes
torchrun --nproc-per-node 2 examples/with_lightning.py        # or torchrun does
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import hvd_sketch

STEPS = 40


class Sketched(lightning.Callback):
    """Registers the hook when model and optimizer are there."""

    def __init__(self, compression: Any) -> None:
        self.compression = compression

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Called once, with the wrapped model in place."""
        self.state = hvd_sketch.ddp.register(trainer.strategy.model, trainer.optimizers[0], self.compression)


class Curve(lightning.LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        tanh, hidden = torch.nn.Tanh(), torch.nn.Linear(64, 64)
        self.network = torch.nn.Sequential(torch.nn.Linear(1, 64), tanh, hidden, tanh, torch.nn.Linear(64, 1))
        self.last = torch.tensor(0.0)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        """The loss of one batch."""
        loss = torch.nn.functional.mse_loss(self.network(batch[0]), batch[1])
        self.last = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main() -> None:
    """Train on points of a curve, and tell what it took."""
    torch.manual_seed(0)
    inputs = torch.linspace(-3, 3, 64 * STEPS).unsqueeze(1)
    data = DataLoader(TensorDataset(inputs, inputs.sin()), batch_size=32, shuffle=True)
    sketched, curve = Sketched(hvd_sketch.Compression.sharded(ratio=10, warmup_steps=0)), Curve()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[sketched], **quiet
    )
    trainer.fit(curve, data)
    stats = sketched.state.exchange.stats
    if trainer.is_global_zero:
        print(f"loss {float(curve.last):.4f} after {stats.steps} steps, {stats.ratio:.1f} times fewer bytes")


if __name__ == "__main__":
    main()
