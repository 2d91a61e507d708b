"""What the page of the measurements on a GPU says around its tables."""

from __future__ import annotations

HEAD = """\
# On a GPU, measured

Written by `python -m benchmarks.gpu.page` from the rows that `python -m benchmarks.gpu`, `benchmarks.gpu.training` and
`benchmarks.accuracy --large` leave in `benchmarks/results/`. Everything here ran on **{devices}**, one card; of other
GPUs, and of several in one machine, nothing is known. Software:
{facts}.

{runs}

The tables are of the fifth run unless they say otherwise. `common_share`, `moments`, and Adam with anticipation around
it are of the fourth, what others do of the first. Hosts differ, and change within a run: a launch took 0.02 to 0.05 ms
(see *launch*), so that whatever the host bounds is good to a factor of two.

- Between the third run and the fourth, chunks of a sketch became shorter, for its accuracy. That made `add` five
  times slower, unseen, for want of a GPU. In the fifth a program takes the chunks on a list that is made for it.
- From the fourth run on, the sketch's choice reads all estimates twice in place of four times, and is recorded.
- `topk` no longer counts all coordinates where its sample promises too few candidates.
- `sketch` no longer waits for the gradient's norm: twice a step, once for each sum.
- Checksums of all messages came between the third run and the fourth: launches, but few passes.

**Changed since, and not measured:** the measuring sketches of `Anticipate`, which did not compile in the fifth run,
and then were compiled for that card and interpreted; mixing takes one launch for all neighbours that are alike, in
place of one for each matrix and side, and has a kernel for Hadamard transforms; a sparse code's levels have two bytes;
a ratio's sizes are fitted once, not in every step, which took half a millisecond of the host.

Times are medians, in milliseconds: until the device was done, with its second-level cache overwritten before each
call, and until the host was (*host*). A **pass** is 4 bytes for each coordinate, read or written: half of what a copy
of that size takes. *Waits*: how often the host waited for the device in a call; *launches*: kernels, copies and fills.
*Peak* is all device memory in use; of it 12 bytes a coordinate are the parameters, their gradients and the benchmark's
copy of these.
"""

GOAL_LEAD = """\
## The goal, and by how much it is missed

The aim is a step's own work below 1.5 ms at 100 M coordinates, below 3 ms with `Anticipate`, so that at any network up
to 100 Gbit/s a step at ratio 40 is bound by the wire. **Nothing here reaches it.** What the host bounds needs fewer
launches, or more of them recorded and replayed; what the device bounds, fewer passes. Of `sharded`, half of the
device's time goes into writing and reading some eight million chosen entries, each in a sector of memory of its own.
*Kernels* is the time of a step's sixteen longest kinds of kernels, added up under a profiler: about what a step would
take if launches cost nothing. On these hosts one took 0.02 to 0.05 ms.
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

What failed in the first run were subnormal numbers and PyTorch's QR decomposition called from several threads, in the
third a recording of launches that another thread's garbage collection ended. All are repaired, and passed in the fifth
run. Of that run's 25 failures 13 had one cause, the measuring sketches of `Anticipate`, which did not compile after a
change of the same day (repaired since); 9 asked PowerSGD in four bits for the processor's bits, which nobody promises
of matrix products; 3 counted waits of the first steps, when tables are made.

DistributedDataParallel, its hook and process groups (`tests/frontends/test_ddp_device.py`), in the fourth run: one
rank over NCCL, and two over Gloo on one GPU; every compressor, mixing by cosines and Hadamard transforms, direct sums,
one memory a host, float16 and bfloat16 with a scaler, `static_graph`, views, resuming. 79 of 84 passed, with the bits
and bytes of the processor where products of matrices are not involved. Three failed because a header on the host met a
problem of the device: **one memory a host did not work with parameters on a GPU**. It is repaired, and the three
passed in the fifth run, where what failed in 5 of 49 was the measuring sketches again. Two asked for `delayed=True`,
which is refused there.

Every exchange but PowerSGD's has the bits of the processor's kernel: gradients of float32, float16 and bfloat16,
zeros, ties, subnormal numbers, momentum correction, simulated ranks; codes have the same bytes; what is chosen is the
same beyond 2^31 coordinates; a step that is not finite changes nothing; a table of NaN is not left; a second run has
the same bits. Of `sharded`, `topk` and `stride` nothing but the reading of the header waits, which
`torch.cuda.set_sync_debug_mode("error")` shows. `compute-sanitizer --tool memcheck` over six of the tests of choosing
and coding: no errors (second run).

## Where the host waits

Counted from the code as it is now: `sharded`, `topk` and `stride` to read the first message's header; `powersgd` for
it and for its digest; `sketch` for each of its two sums. Beside these: with a
`torch.amp.GradScaler`, once a step, for its scale; the grids of half precision until their first scales are known;
`FactoredMoments` where it measures; gradients that are not handed in together (weight decay under
`momentum_correction`, sparse ones), for their norm. Whatever travels through host memory is waited for by the network.
"""

LARGE = """
## Accuracy at a real size

A transformer of {millions} M parameters with AdamW, products in bfloat16, on the Python sources of the installed
packages byte by byte; {ranks} simulated ranks on one GPU ({device}, {when}), {tokens_per_step} tokens a step, {steps}
steps, one seed, one learning rate for all. In "auto, dense at first" the ratio grows from 1 over the first hundred
steps, hence its ratio. Compressed, each rank's gradient is clipped to a norm of 1 before anything else; "dense,
clipped" does that and sends everything.

**500 steps are too few to tell what compression costs.** All trainings rest for a while at 2.5 to 2.7, where single
bytes and pairs of them are learned; the clipped dense one leaves that after 200 steps, the others have just done so,
or not yet. So the distances to it say who left earlier, and not where each will end. Dense without clipping leaves as
late as PowerSGD does, which an earlier version of this page took for a merit of PowerSGD: **clip, or you compare with
a training that suffers from something else.** The recipe of [high ratios](../recipe.md) is not ahead here at ratio 40;
its 261 seconds, beside tests on the same card, probably went into launches: it had one for each matrix, side and rank.
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

- any other card than the one above; two or more GPUs, in one process or in several; NCCL between ranks (one rank ran);
  a real network between GPUs;
- `Anticipate` and `FactoredMoments` after the fourth run;
- what others do, with the later runs' hosts: theirs are of the first run;
- accuracy at a real size, over so many steps that dense levels off; at ratios 100 and 400, with `sketch` and
  `sharded` to the end, with local steps, with more than one seed;
- `SwarmSGD`, `CSER` and `OverlapLocalSGD` on a GPU; `LocalSGD` was trained there in a test, and not timed; whole
  steps of mixing, of one memory a host and of DistributedDataParallel were trained, and not timed;
- a model under `torch.compile` (on a processor it is compiled once and trains as it does uncompiled); backward on
  several streams (each message follows all of them, tested with a stand-in); a CUDA graph of the user's around an
  exchange is refused, which was never seen there;
- the one copy through pinned memory by which `SwarmSGD`, `DmSGD`, `DecentLaM` and `LEAD`, whose vectors are on the
  host, read and write a GPU's parameters;
- compute-sanitizer over the other kernels, and its race and initialisation checks.
"""
