# SPDX-License-Identifier: GPL-2.0-only
# `make` lists what there is to do.  `make demo` and `make test` need only git, make and Python 3.11 on Debian 12.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/pytest
WORKERS ?= 2
KERNEL ?=
RESULTS ?=
SEED ?=
SHARD ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check golden sim crash damage flips nofalse vm over-ublk campaign repaired system bench docs compiled plain clean setup setup-dev debian-packages

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: setup ## set everything up and show the engine at work
	$(BIN)/bcachectl demo

test: setup-dev ## set everything up and run every test
	$(BIN)/ruff check
	$(BIN)/mypy
	$(PYTEST) -n $(WORKERS) --dist worksteal

check: setup-dev ## ruff, mypy --strict, unit, property and tidy tests: under a minute
	$(BIN)/ruff check
	$(BIN)/mypy
	$(PYTEST) -n $(WORKERS) -m "unit or property or tidy"

golden: setup-dev ## every test on the images that the kernel's driver wrote
	$(PYTEST) -n $(WORKERS) -m golden

sim: setup-dev ## the engine on simulated disks; SEED=n replays a seed
	$(if $(SEED),BCACHECTL_SIM_SEED=$(SEED)) $(PYTEST) -n $(WORKERS) -m sim

crash: setup-dev ## power loss at every point of every story, three times (about an hour); SEED=n for other choices
	$(if $(SEED),BCACHECTL_SIM_SEED=$(SEED)) BCACHECTL_CRASH=all $(PYTEST) -n $(WORKERS) --timeout 7200 -m crash

damage: setup-dev ## every case of damage: exact findings, exact cost, clean after repair, interrupted at every write
	BCACHECTL_IMAGES=all BCACHECTL_DAMAGE=all $(PYTEST) -n $(WORKERS) --timeout 3600 tests/fsck/test_damage.py \
		tests/fsck/test_repair.py tests/fsck/test_interrupted.py tests/fsck/test_image.py tests/fsck/test_combined.py

flips: setup-dev ## every byte of all metadata flipped (40 minutes of processor time); SHARD=3/8 takes the third eighth
	$(if $(SHARD),BCACHECTL_SHARD=$(SHARD)) BCACHECTL_FLIPS=all $(PYTEST) -n $(WORKERS) --timeout 7200 -rP tests/fsck/test_flip.py

nofalse: setup-dev ## fsck finds nothing on thousands of images from the simulator
	BCACHECTL_NOFALSE_EVERY=10 $(PYTEST) -n $(WORKERS) tests/fsck/test_no_false.py

over-ublk: setup-dev ## the tests of engines over ublk, in the virtual machine (half an hour); RESULTS=file to go on
	$(BIN)/python -m tests.vm.over_ublk $(if $(RESULTS),--results $(RESULTS))

system: setup-dev ## engines as processes: fio, ext4, SIGKILL, dying devices, damaged images
	$(PYTEST) -n $(WORKERS) -m system

vm: setup-dev ## the kernel's own driver as the judge; KERNEL=6.1 or KERNEL=6.12 for one kernel only
	$(if $(KERNEL),BCACHECTL_VM_KERNEL=$(KERNEL)) $(PYTEST) -n $(WORKERS) -m vm

campaign: setup-dev ## sets of every shape that a kernel makes, judged by every program; SEEDS=1-40 (half a minute each)
	$(BIN)/python -m tests.vm.campaign $(or $(SEEDS),1-10)

repaired: setup-dev ## the kernel registers what fsck repaired, for every case of damage and some combinations (half an hour)
	BCACHECTL_REPAIRED=all $(PYTEST) -n $(WORKERS) -m vm tests/vm/test_repaired.py

bench: setup-dev ## figures beside their targets, first of plain Python, then of all with the hot path compiled
	@$(MAKE) --no-print-directory plain
	$(BIN)/python -m bench.hot
	$(BIN)/python -m bench.nbd
	$(BIN)/python -m bench.fsck
	@$(MAKE) --no-print-directory compiled
	$(BIN)/python -m bench.hot
	$(BIN)/python -m bench.nbd --verify
	$(BIN)/python -m bench.nbd --direct --verify
	$(BIN)/python -m bench.fuse --verify
	$(BIN)/python -m bench.ring
	$(BIN)/python -m bench.scale
	$(BIN)/python -m bench.growth
	$(BIN)/python -m bench.gc
	$(BIN)/python -m bench.hours
	$(BIN)/python -m bench.tick
	$(BIN)/python -m bench.fsck
	$(BIN)/python -m bench.rescue
	$(BIN)/python -m bench.vm --verify
	$(BIN)/python -m bench.ublk_copy
	$(BIN)/python -m bench.kernel
	@$(MAKE) --no-print-directory plain

docs: setup-dev ## write the manual pages anew from the program's help
	COLUMNS=100 $(BIN)/python man/generate.py

compiled: setup ## compile the hot path and fsck (optional, needs a C compiler): the same sources, faster
	@packaging/debian-packages.sh compiled
	$(BIN)/pip install -q -r requirements-compile.txt
	$(BIN)/python packaging/compile.py

plain: setup ## undo `make compiled`
	$(BIN)/python packaging/compile.py --remove

clean: ## remove the virtual environment, what is compiled, and all caches of this tree
	find bcachectl -name '*.so' -delete
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis

setup: $(VENV)/.runtime

setup-dev: debian-packages $(VENV)/.dev

# First, so that one `apt-get update` serves all.
debian-packages:
	@packaging/debian-packages.sh test

$(VENV)/.runtime: requirements.txt pyproject.toml
	@packaging/debian-packages.sh demo
	test -x $(BIN)/python || "$$(packaging/find-python.sh)" -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	@touch $@
