# make install    an environment in $(VENV) with the tested versions and this checkout
# make demo       train and evaluate a tiny model on the samples in this repository
# make test       the fast tests, in JOBS processes
# make test-all   every test, the slow ones included
# make lint       ruff and mypy
# make bench      all benchmarks of this machine, under 30 minutes: runs/bench/report.html

VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
# Many tests start two to four processes of their own.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
PYTEST = PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

.PHONY: help install demo test test-all lint bench

help:
	@sed -n 's/^# //p' Makefile

$(STAMP): setup.py requirements-tested.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements-tested.txt
	$(BIN)/python -m pip install -e . --no-deps
	touch $(STAMP)

install: $(STAMP)

demo: install
	PATH="$(BIN):$$PATH" $(BIN)/unival demo

test: install
	$(PYTEST)

test-all: install
	$(PYTEST) -m ""

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: install
	$(BIN)/python benchmarks/bench.py
