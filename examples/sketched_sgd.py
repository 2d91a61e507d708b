"""SketchedSGD in plain PyTorch over mpi4py, to be read beside the paper (Ivkin et al., arXiv 1903.04488).

    mpirun -np 2 python examples/sketched_sgd.py

Every rank sketches what it has computed and not sent; the sketches are summed; all ranks read the same heavy
coordinates out of the sum and fetch their exact values. `Compression.sketch` of the package takes the same steps.
"""

from __future__ import annotations

import torch
from mpi4py import MPI
from torch import Tensor, nn

ROWS, COLS, K = 3, 200, 100


def draw(dim: int, rows: int, cols: int, step: int) -> tuple[Tensor, Tensor]:
    """The cell and the sign of every coordinate in every row, the same on all ranks."""
    generator = torch.Generator().manual_seed(step)
    cells = torch.randint(cols, (rows, dim), generator=generator)
    return cells, torch.randint(2, (rows, dim), generator=generator) * 2.0 - 1.0


def summed(tensor: Tensor, comm: MPI.Intracomm) -> Tensor:
    """The sum over the ranks."""
    result = torch.empty_like(tensor)
    comm.Allreduce(tensor.numpy(), result.numpy())
    return result


class SketchedSGD:
    """SGD whose gradients are exchanged by Algorithm 3 of the paper, without its momentum."""

    def __init__(self, parameters: list[Tensor], lr: float, comm: MPI.Intracomm) -> None:
        self.parameters, self.lr, self.comm, self.steps = parameters, lr, comm, 0
        self.unsent = torch.zeros(sum(parameter.numel() for parameter in parameters))

    def step(self) -> None:
        """Exchange the gradients and move the parameters."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        update = self.exchange(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        pieces = update.split([parameter.numel() for parameter in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.detach().sub_(piece.view_as(parameter), alpha=self.lr)

    def exchange(self, gradient: Tensor) -> Tensor:
        """The mean over the ranks of the heavy coordinates; each rank keeps the others for later."""
        self.unsent += gradient
        cells, signs = draw(gradient.numel(), ROWS, COLS, self.steps)
        table = torch.zeros(ROWS, COLS).scatter_add_(1, cells, signs * self.unsent)
        estimates = (summed(table, self.comm).gather(1, cells) * signs).median(dim=0).values
        heavy = estimates.abs().sort(descending=True, stable=True).indices[:K]  # of equals the first, on all ranks
        update = torch.zeros_like(gradient)
        update[heavy] = summed(self.unsent[heavy], self.comm) / self.comm.size
        self.unsent[heavy] = 0.0
        self.steps += 1
        return update


def main() -> None:
    comm = MPI.COMM_WORLD
    torch.manual_seed(0)
    model, teacher = nn.Linear(200, 20), nn.Linear(200, 20)
    optimizer = SketchedSGD(list(model.parameters()), lr=0.2, comm=comm)
    torch.manual_seed(1 + comm.rank)
    for step in range(401):
        inputs = torch.randn(64, 200)
        loss = nn.functional.mse_loss(model(inputs), teacher(inputs).detach())
        model.zero_grad()
        loss.backward()
        optimizer.step()
        if comm.rank == 0 and step % 100 == 0:
            share = (ROWS * COLS + K) / optimizer.unsent.numel()
            print(f"step {step}: loss {loss:.4f}, {share:.0%} of the values sent")


if __name__ == "__main__":
    main()
