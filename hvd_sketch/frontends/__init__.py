"""The ways in: the optimizer, the runner of unmodified scripts, and the world without Horovod."""
