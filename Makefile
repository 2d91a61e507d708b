# `make` lists the targets. Each of them creates the environment in .venv when it is missing.
SHELL := /bin/bash
DEMO ?= python examples/demo.py
# Three on two cores: tests that wait for what they started leave theirs to others. In the order of tests/conftest.py.
PYTEST ?= python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Open MPI wants this said when root trains; nobody else is affected.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: help env demo test quick check fuzz soak faults bench cluster-bench time-to-loss scale accuracy clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## create the environment in .venv, or bring it up to date
	@environment/create

demo test quick check fuzz soak faults bench cluster-bench time-to-loss scale accuracy: export PATH := $(CURDIR)/.venv/bin:$(PATH)

demo: env ## train a small transformer on 2 processes, dense and sketched, and compare
	$(DEMO)

# Threads of a kernel that wait for one on a busy core sleep.
test quick: export OMP_WAIT_POLICY := passive
test: env ## run all tests, on real ranks
	$(PYTEST)

quick: env ## run the tests that start no processes: two minutes; for while you work
	$(PYTEST) --quick

check: env ## lint and type-check
	ruff check
	ruff format --check
	mypy

SECONDS_TO_FUZZ ?= 120
fuzz: env ## attack the native kernel under sanitizers, for SECONDS_TO_FUZZ (120) seconds
	python -m tests.fuzz.sanitized --seconds $(SECONDS_TO_FUZZ)

soak: env ## wrap, train and drop on two real ranks for ten minutes: memory, threads and files must stay
	python -m tests.soak

bench: env ## time the kernels against one copy of the vector: some minutes
	python -m benchmarks.kernels

cluster-bench: env ## time the methods on a cluster of network namespaces on this machine (root)
	python -m benchmarks.cluster

time-to-loss: env ## train every method until it has dense Horovod's loss, on that cluster (root): hours, resumable
	python -m benchmarks.time_to_loss $(TIME_TO_LOSS)

scale: env ## predict exchanges on clusters that are not at hand, by a model fitted to that cluster's rows
	python -m benchmarks.scale fit

accuracy: env ## train dense and with every method on three tasks, 8 simulated ranks: hours, resumable run by run
	python -m benchmarks.accuracy $(ACCURACY)

faults: env ## let a rank fail in every way, ten minutes, and flip bits in 1000 messages, an hour, resumable
	python -m benchmarks.faults
	python -m benchmarks.faults.flips 1040

clean: ## remove what was built, except for the environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis hvd_sketch/native/_kernel.so
	find . -name __pycache__ -prune -exec rm -rf {} +
