"""What the page of the measurements on a GPU says around its tables."""

from __future__ import annotations

HEAD = """\
# On a GPU, measured

Written by `python -m benchmarks.gpu.page` from the rows that `python -m benchmarks.gpu`, `benchmarks.gpu.training` and
`benchmarks.accuracy --large` leave in `benchmarks/results/`. Everything here ran on **{devices}**, one card; of other
GPUs, and of several in one machine, nothing is known. Software:
{facts}.

{runs}

The tables are of the third run unless they say otherwise; what others do was measured in the first one only. The host
of the third run was slower than that of the second (see *launch* and *wait* below), which shows wherever the host is
the bound. **What was changed after 11:18 is not measured:** `topk` falls back to counting all coordinates where its
sample promises too few candidates, which took 3.7 of its 7.5 ms at 100 M and is repaired since; `stride` hands its
values to the gradients without a vector between them; values in half precision travel on shared grids; gradients are
handed in at the step.

Times are medians, in milliseconds: until the device was done, with its second-level cache overwritten before each
call, and until the host was (*host*). A **pass** is 4 bytes for each coordinate, read or written: half of what a copy
of that size takes. *Waits*: how often the host waited for the device in a call; *launches*: kernels, copies and fills.
*Peak* is all device memory in use; of it 12 bytes a coordinate are the parameters, their gradients and the benchmark's
copy of these.
"""

GOAL_LEAD = """\
## The goal, and by how much it is missed

The aim is a step's own work below 1.5 ms at 100 M coordinates, below 3 ms with `Anticipate`, so that at any network up
to 100 Gbit/s a step at ratio 40 is bound by the wire. **Nothing here reaches it.** What the host
bounds needs fewer launches, or more of them recorded and replayed (`sketch` records none); what the device bounds,
fewer passes.
"""

STEPS = """
## Whole steps

All gradients of a transformer in, the update in their places: the exchange of one rank of {ranks} that all send the
same, the network left out, at ratio {ratio:g} (PowerSGD at rank 4).
"""

PEERS = """
## Beside what others do

Theirs over ours: above 1 ours is faster. *classic* is a Count Sketch of looked-up buckets and signs with a choice from
all estimates, as csvec does it, of as many rows and columns. *DGC* is the threshold of a sample, loosened up to ten
times; its k is approximate. They and `torch.topk` choose one in 40 coordinates in any order, ours three in 40, in
ascending order. *ddp* is PyTorch's data parallelism of one rank with its hooks, a backward pass that computes nearly
nothing included; its PowerSGD has rank 4 as well.
"""

CORRECT = """
## Correct there

The tests that need a device (`tests/exchange/test_device.py`, and those of the kernels) ran before the measurements:
{counts} passed.

What failed in the first run were subnormal numbers and PyTorch's QR decomposition called from several threads; both
are repaired. In the third run this failed:
{failed}.
A recording of launches was ended by something else. The likely cause: several simulated ranks of one process record at
the same time, and one of them switched Python's garbage collection on again while another recorded. Recordings exclude
each other since; that was not run on a GPU again.

Every exchange but PowerSGD's has the bits of the processor's kernel: gradients of float32, float16 and bfloat16,
zeros, ties, subnormal numbers, momentum correction, simulated ranks; codes have the same bytes; what is chosen is the
same beyond 2^31 coordinates; a step that is not finite changes nothing; a table of NaN is not left; a second run has
the same bits. Of `sharded`, `topk` and `stride` nothing but the reading of the header waits, which
`torch.cuda.set_sync_debug_mode("error")` shows. `compute-sanitizer --tool memcheck` over six of the tests of choosing
and coding: no errors (second run).

## Where the host waits

Counted from the code as it is now: `sharded`, `topk` and `stride` to read the first message's header; `powersgd` for
it and for its digest; `sketch` for the gradient's norm and for each of its two sums. Beside these: with a
`torch.amp.GradScaler`, once a step, for its scale; the grids of half precision until their first scales are known;
`FactoredMoments` where it measures; gradients that are not handed in together (weight decay under
`momentum_correction`, sparse ones), for their norm. Whatever travels through host memory is waited for by the network.
"""

LARGE = """
## Accuracy at a real size

A transformer of {millions} M parameters with AdamW, products in bfloat16, on the Python sources of the installed
packages byte by byte; {ranks} simulated ranks on one GPU ({device}, {when}), {tokens_per_step} tokens a step, {steps}
steps, one seed, one learning rate for all. In "auto, dense at first" the
ratio grows from 1 over the first hundred steps, hence its ratio.

**PowerSGD is ahead of every sparse method here, and of dense.** On the small transformer of the
[accuracy page](accuracy.md) it is behind `sharded`. Each rank's gradient is clipped before it is compressed and not in
the dense run, which may be why dense is behind: that was not taken apart. Dense had not levelled off after {steps}
steps, and one seed shows no spread. `sharded` without anticipation ran out of time.
"""

TRAINING = """
## A training of two ranks on one GPU

A transformer, float32 parameters with products in bfloat16, AdamW, 4096 tokens a rank and step
(`mpirun -np 2 python -m benchmarks.gpu.training`, in the second run). Two processes share the GPU; messages go through
pinned host memory and MPI over shared memory, so *dense* is bound by summing on the processor. *alone* exchanges
nothing.
"""

MISSING = """
## What is missing

Not measured, and so not known:

- any other card than the one above; two or more GPUs, in one process or in several; NCCL; a real network between GPUs;
- everything that was changed after the third run (see the top), and whether the goal is nearer for it;
- what others do, with the third run's host: theirs are of the first run;
- accuracy at ratios 100 and 400, with `sketch` and `sharded` to the end, with local steps, with more than one seed;
- `SwarmSGD`, `CSER` and `OverlapLocalSGD` on a GPU; `LocalSGD` was trained there in a test, and not timed;
- a model under `torch.compile` (on a processor it is compiled once and trains as it does uncompiled); backward on
  several streams (each message follows all of them, tested with a stand-in); a CUDA graph of the user's around an
  exchange is refused, which was never seen there;
- the one copy through pinned memory by which `SwarmSGD`, `DmSGD`, `DecentLaM` and `LEAD`, whose vectors are on the
  host, read and write a GPU's parameters;
- compute-sanitizer over the other kernels, and its race and initialisation checks.
"""
