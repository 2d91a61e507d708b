"""Trains as Horovod's documentation shows it; knows nothing of compression. The tests run it as it is."""

import argparse
import hashlib

import horovod.torch as hvd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--ratio", type=float, default=0.1, help="of the learning rate, an option that the runner has too")
parser.add_argument("--clip", type=float, default=1.0)
parser.add_argument("--fp16-allreduce", action="store_true")
args = parser.parse_args()

hvd.init()
torch.manual_seed(hvd.rank())
model = nn.Sequential(nn.Linear(30, 60), nn.BatchNorm1d(60), nn.Tanh(), nn.Linear(60, 40))

generator = torch.Generator().manual_seed(1)
inputs = torch.randn(256, 30, generator=generator)
targets = inputs @ torch.randn(30, 40, generator=generator) / 5
dataset = TensorDataset(inputs, targets)
sampler: DistributedSampler[int] = DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank(), shuffle=False)
loader = DataLoader(dataset, batch_size=16, sampler=sampler)

compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none
optimizer = torch.optim.SGD(model.parameters(), lr=args.ratio, momentum=0.9)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = hvd.DistributedOptimizer(
    optimizer, named_parameters=model.named_parameters(), compression=compression, op=hvd.Average
)

for epoch in range(args.epochs):
    model.train()
    total = torch.zeros(1)
    for batch, target in loader:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch), target)
        loss.backward()
        optimizer.synchronize()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        nonzero = int(torch.cat(gradients).count_nonzero())
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        with optimizer.skip_synchronize():
            optimizer.step()
        total += loss.detach() / len(loader)
    average = hvd.allreduce(total, name="average_loss").item()
    digest = hashlib.sha256(
        torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes()
    ).hexdigest()
    print(f"rank={hvd.rank()} epoch={epoch} loss={average:.4f} nonzero={nonzero} parameters={digest[:16]}", flush=True)
