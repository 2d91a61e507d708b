"""Accuracy at a real size: a transformer of tens of millions of parameters on a GPU, with simulated ranks.

``python -m benchmarks.accuracy --large --minutes 6`` trains what is missing in
``benchmarks/results/accuracy-large.json``, dense first and what matters most before the rest; ``--size`` has smaller
ones, whose rows are kept in files of their own. The text is the Python sources of the installed packages, byte by
byte, so the numbers of two installations differ a little; those of one file are of one text.

Where the ranks share the model, as they do when gradients are exchanged in every step, one model serves all of them:
their gradients are computed one after the other, at the point where each rank takes its own, and then their exchanges
run, one thread for each. Where every rank has a model of its own, each has a thread from the start.
"""
