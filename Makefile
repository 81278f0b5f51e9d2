# make demo: install and run the main job on this machine's CPU. make test: install and pass the tests.
PYTHON ?= python3
VENV ?= .venv
LOCK := requirements/cpu.txt
STAMP := $(VENV)/.installed

.PHONY: demo install test test-slow test-slurm check

demo: $(STAMP)
	$(VENV)/bin/rapo demo --out runs/demo

install: $(STAMP)

$(STAMP): $(LOCK) requirements/install.sh pyproject.toml
	@requirements/install.sh $(PYTHON) $(VENV) $(LOCK)
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
